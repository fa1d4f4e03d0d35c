#include "memory.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <new>

namespace fewbits {
namespace {

constexpr size_t kCacheLine = 64;
constexpr size_t kHugePage = size_t{2} << 20;

}  // namespace

Buffer::Buffer(size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  const size_t alignment = bytes >= kHugePage ? kHugePage : kCacheLine;
  if (posix_memalign(&data_, alignment, bytes) != 0) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  // Only whole huge pages: rounding the last one up would make it resident in full.
  if (bytes >= kHugePage) madvise(data_, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  memset(data_, 0, bytes);
}

Buffer::~Buffer() { free(data_); }

}  // namespace fewbits
