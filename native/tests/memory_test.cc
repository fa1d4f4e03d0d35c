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

}  // namespace
}  // namespace fewbits

int main() {
  fewbits::test_neighbours();
  fewbits::test_contents();
}
