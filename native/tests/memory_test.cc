// Buffers hold what they are asked for, and giving one back takes nothing from its neighbours.
#include "memory.h"

#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#include <vector>

#include "check.h"

namespace fewbits {
namespace {

constexpr size_t kPage = 65536;  // a whole number of pages on every system
constexpr size_t kHugePage = size_t{2} << 20;

// Pages between them give the buffers every place that they can have beside a huge page's border.
void test_neighbours() {
  std::vector<char*> neighbours;
  for (size_t i = 0; i < 3 * kHugePage / kPage; ++i) {
    void* const page =
        mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(page != MAP_FAILED, "no memory for page %zu", i);
    neighbours.push_back(static_cast<char*>(page));
    *neighbours.back() = static_cast<char>(i);
    const Buffer buffer(kHugePage + 1);
    CHECK(reinterpret_cast<uintptr_t>(buffer.as<char>()) % kHugePage == 0, "buffer %zu", i);
    buffer.as<char>()[kHugePage] = 1;
  }
  for (size_t i = 0; i < neighbours.size(); ++i) {
    CHECK(msync(neighbours[i], kPage, MS_ASYNC) == 0, "page %zu is gone", i);
    CHECK(*neighbours[i] == static_cast<char>(i), "page %zu has changed", i);
    munmap(neighbours[i], kPage);
  }
}

void test_contents() {
  for (const size_t bytes : {size_t{0}, size_t{1}, size_t{100}, kHugePage, kHugePage + 5000}) {
    Buffer buffer(bytes);
    CHECK(buffer.bytes() == bytes, "%zu bytes", buffer.bytes());
    for (size_t i = 0; i < bytes; ++i) CHECK(buffer.as<char>()[i] == 0, "byte %zu isn't 0", i);
    if (bytes > 0) memset(buffer.as<void>(), 1, bytes);
    const char* const data = buffer.as<char>();
    const Buffer moved = std::move(buffer);
    CHECK(moved.as<char>() == data && buffer.bytes() == 0, "a move copies");
  }
}

void test_lasting() {
  constexpr size_t kBytes =
      300000;  // no whole number of cache lines, hundreds of them more than a slab
  std::vector<Buffer> kept;
  for (int i = 0; i < 600; ++i) {
    Buffer buffer = Buffer::lasting(kBytes), gone = Buffer::lasting(1000);
    CHECK(buffer.bytes() == kBytes, "%zu bytes", buffer.bytes());
    CHECK(reinterpret_cast<uintptr_t>(buffer.as<char>()) % 64 == 0, "buffer %d", i);
    CHECK(buffer.as<char>()[0] == 0 && buffer.as<char>()[kBytes - 1] == 0, "buffer %d isn't 0", i);
    memset(buffer.as<void>(), i % 128, kBytes);
    memset(gone.as<void>(), -1, gone.bytes());
    if (i % 3) kept.push_back(std::move(buffer));
  }
  int i = 0;
  for (const Buffer& buffer : kept) {
    if (++i % 3 == 0) ++i;
    const char* const data = buffer.as<char>();
    CHECK(data[0] == i % 128 && data[kBytes - 1] == i % 128, "buffer %d has changed", i);
  }
  kept.clear();
  Buffer fresh = Buffer::lasting(10);
  for (int j = 0; j < 10; ++j) CHECK(fresh.as<char>()[j] == 0, "memory comes back as it was left");
  CHECK(Buffer::lasting(0).bytes() == 0 && Buffer::lasting(3 * kHugePage).bytes() == 3 * kHugePage,
        "none and many bytes");
  const size_t large = size_t{100} << 20;
  CHECK(Buffer::lasting(large).as<char>()[large - 1] == 0, "more than a slab");
}

void test_pool() {
  BufferPool pool;
  Buffer small = pool.take(1000), large = pool.take(5000);
  char* const at_small = small.as<char>();
  char* const at_large = large.as<char>();
  pool.give_back(std::move(large));
  pool.give_back(std::move(small));
  Buffer again = pool.take(900);
  CHECK(again.as<char>() == at_small, "the smallest that is large enough");
  Buffer next = pool.take(900);
  CHECK(next.as<char>() == at_large, "a larger one where there is no smaller");
  const Buffer fresh = pool.take(900);
  CHECK(fresh.bytes() >= 900 && pool.kept() == 0, "no buffer is given out twice");
  pool.give_back(std::move(next));
  CHECK(pool.take(6000).bytes() >= 6000, "none that is too small");
  for (size_t bytes = 1; bytes <= 100; ++bytes) pool.give_back(Buffer(bytes));
  CHECK(pool.kept() < 20, "%zu buffers are kept", pool.kept());
  CHECK(pool.take(1).bytes() > 80, "small ones are kept before large ones");
}

}  // namespace
}  // namespace fewbits

int main() {
  fewbits::test_neighbours();
  fewbits::test_contents();
  fewbits::test_lasting();
  fewbits::test_pool();
}
