// Headers of safetensors files, in the one form that the safetensors library writes them in.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace fewbits {

// What many tensors have in common.
struct TensorKind {
  std::string_view dtype;
  std::vector<int64_t> shape;
  int64_t nbytes = 0;
};

struct HeaderTensor {
  std::string_view name;
  size_t kind;    // an index into Header::kinds
  int64_t begin;  // counts from the end of the header
};

// Its views are into the text it was read from.
struct Header {
  std::vector<TensorKind> kinds;
  std::vector<HeaderTensor> tensors;
  int64_t nbytes = 0;  // of all tensors
};

using DtypeBits = std::map<std::string, int, std::less<>>;

// Reads
//
//   {"__metadata__":{"key":"value",...},"name":{"dtype":"F16","shape":[2,3],"data_offsets":[0,12]},...}
//
// and spaces behind it: __metadata__ may be missing, strings are printable ASCII without escapes,
// numbers have no sign, no leading zero and at most 18 digits, and each tensor begins where the one
// before it ends. Anything else gives nothing, be it a fault or another way to write the same:
// whoever asks then reads and explains it in a slower way. That a name stands twice isn't noticed
// here. `text` is hostile until proven otherwise.
std::optional<Header> read_header(std::string_view text, const DtypeBits& bits);

}  // namespace fewbits
