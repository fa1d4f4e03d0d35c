// Large aligned buffers.
#pragma once

#include <stddef.h>

#include <memory>
#include <utility>
#include <vector>

namespace fewbits {

// Zero-filled memory aligned to a cache line; from 2 MiB on in huge pages where the system has
// them. Moves, doesn't copy. Throws std::bad_alloc.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes);
  ~Buffer();

  // Memory that stays as long as what is asked for before and after it: in huge pages even where it
  // is small. It goes back to the system when its neighbours do.
  static Buffer lasting(size_t bytes);

  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(slab_, other.slab_);
    return *this;
  }

  size_t bytes() const { return bytes_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
  std::shared_ptr<Buffer> slab_;  // that it is a part of
};

// Buffers that are given back and taken again. Fresh memory costs a fault for each of its pages: a
// prefill of 512 tokens had 49,000, a twelfth of its time. For one thread at a time.
class BufferPool {
 public:
  // Of `bytes` at least; its contents are whatever was there.
  Buffer take(size_t bytes);
  void give_back(Buffer buffer);
  size_t kept() const { return kept_.size(); }

 private:
  std::vector<Buffer> kept_;  // the smallest first
};

}  // namespace fewbits
