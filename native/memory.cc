#include "memory.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <new>

namespace fewbits {
namespace {

constexpr size_t kCacheLine = 64;
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kSlab = 32 * kHugePage;
constexpr size_t kMostKept = 12;  // more than a layer has at once
constexpr size_t kPage = size_t{64}
                         << 10;  // the largest page that systems use, a multiple of others

size_t mapped_bytes(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

// Memory of its own from the system, aligned to a huge page. The system zeroes each page for the
// thread that first writes there; memory of malloc's would have to be zeroed here, by one thread.
void* map_pages(size_t bytes) {
  const size_t size = mapped_bytes(bytes), whole = size + kHugePage;
  void* const mapped =
      mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  char* const begin = static_cast<char*>(mapped);
  const size_t before = -reinterpret_cast<uintptr_t>(begin) % kHugePage;
  char* const data = begin + before;
  if (before != 0) munmap(begin, before);
  munmap(data + size, whole - before - size);
#if defined(MADV_HUGEPAGE)
  // Only whole huge pages: rounding the last one up would make it resident in full.
  madvise(data, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  return data;
}

}  // namespace

Buffer::Buffer(size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  if (bytes >= kHugePage) {
    data_ = map_pages(bytes);
    return;
  }
  if (posix_memalign(&data_, kCacheLine, bytes) != 0) throw std::bad_alloc();
  memset(data_, 0, bytes);
}

namespace {

// The slab that lasting buffers come from, which only they keep, and how much of it is taken.
struct Slabs {
  std::mutex turn;
  std::weak_ptr<Buffer> last;
  size_t taken = 0;
};

// Never destroyed, as the threads that may still take from it.
Slabs& slabs() {
  static Slabs* const all = new Slabs;
  return *all;
}

}  // namespace

Buffer Buffer::lasting(size_t bytes) {
  if (bytes == 0 || bytes > kSlab / 8) return Buffer(bytes);
  Slabs& all = slabs();
  const std::lock_guard<std::mutex> lock(all.turn);
  std::shared_ptr<Buffer> slab = all.last.lock();
  if (!slab || all.taken + bytes > kSlab) {
    slab = std::make_shared<Buffer>(kSlab);
    all.last = slab;
    all.taken = 0;
  }
  Buffer part;
  part.data_ = slab->as<char>() + all.taken;
  part.bytes_ = bytes;
  part.slab_ = std::move(slab);
  all.taken += (bytes + kCacheLine - 1) / kCacheLine * kCacheLine;
  return part;
}

Buffer::~Buffer() {
  if (slab_) return;
  if (bytes_ >= kHugePage) {
    munmap(data_, mapped_bytes(bytes_));
  } else {
    free(data_);
  }
}

namespace {

bool smaller(const Buffer& buffer, size_t bytes) { return buffer.bytes() < bytes; }

}  // namespace

Buffer BufferPool::take(size_t bytes) {
  const auto found = std::lower_bound(kept_.begin(), kept_.end(), bytes, smaller);
  if (found == kept_.end()) return Buffer(bytes);
  Buffer buffer = std::move(*found);
  kept_.erase(found);
  return buffer;
}

void BufferPool::give_back(Buffer buffer) {
  kept_.insert(std::lower_bound(kept_.begin(), kept_.end(), buffer.bytes(), smaller),
               std::move(buffer));
  if (kept_.size() > kMostKept) kept_.erase(kept_.begin());
}

}  // namespace fewbits
