// The dot with integers of sixteen bits, made of two with integers of eight.
#pragma once

#include "gemm/words.h"

namespace fewbits {
namespace {

// x = 256 * high + low. `Narrow` is a dot with signed integers of eight bits, that also has
//   join(high, low)   256 * high + low
template <class Narrow>
struct Wide : Narrow {
  static constexpr int kMaxRows = Narrow::kMaxRows / 2;
  static constexpr int kRowsBesideWords = kMaxRows;
  static constexpr int kRowsWithTotals = kMaxRows - 1;
  template <WeightKind kind>
  static constexpr int decoding_rows = kMaxRows;
  // Never: each operand is used twice a row.
  template <WeightKind kind>
  static constexpr int decode_once_rows = fewbits::kMaxRows + 1;
  static constexpr int kValueWords = 2;
  using Operand = typename Narrow::Operand;
  struct Value {
    Operand high, low;
  };
  struct Sum {
    typename Narrow::Sum high, low;
  };

  static Value broadcast(const uint32_t* x) {
    return {Narrow::broadcast(x), Narrow::broadcast(x + 1)};
  }
  static Sum zero() { return {Narrow::zero(), Narrow::zero()}; }
  static Sum dot(Sum sum, Operand weight, Value x) {
    return {Narrow::dot(sum.high, weight, x.high), Narrow::dot(sum.low, weight, x.low)};
  }
  static typename Narrow::Float to_float(Sum sum) {
    return Narrow::to_float(Narrow::join(sum.high, sum.low));
  }
};

// Four integers in two words: their upper bytes, rounded, and what is left.
struct WideWords : WordByWord {
  template <int stride>
  static uint32_t word(const float* x, int part) {
    uint32_t word = 0;
    for (int i = 0; i < 4; ++i) {
      const int value = as_integer(x[i * stride]);
      const int high = (value + 128) >> 8;
      word |= uint32_t{static_cast<uint8_t>(part == 0 ? high : value - 256 * high)} << (8 * i);
    }
    return word;
  }
  static float sum(const uint32_t* words, int64_t count) {
    int32_t high = 0, low = 0;
    for (int64_t i = 0; i < count; i += 2) {
      for (int j = 0; j < 4; ++j) {
        high += static_cast<int8_t>(words[i] >> (8 * j));
        low += static_cast<int8_t>(words[i + 1] >> (8 * j));
      }
    }
    return static_cast<float>(256 * high + low);
  }
};

// The kernels of a tier whose instruction multiplies integers of eight bits.
template <class Narrow, class NarrowWords, class Words>
const GemmKernel* integer_kernel(WeightKind kind, DotKind dot) {
  static constexpr GemmKernel kNarrow4 = make_kernel<Narrow, NarrowWords, WeightKind::int4>();
  static constexpr GemmKernel kNarrow8 = make_kernel<Narrow, NarrowWords, WeightKind::int8>();
  static constexpr GemmKernel kNarrowFp4 = make_kernel<Narrow, NarrowWords, WeightKind::fp4>();
  static constexpr GemmKernel kWide4 = make_kernel<Wide<Narrow>, Words, WeightKind::int4>();
  static constexpr GemmKernel kWide8 = make_kernel<Wide<Narrow>, Words, WeightKind::int8>();
  if (dot == DotKind::floats) return nullptr;
  const bool wide = dot == DotKind::int16;
  if (kind == WeightKind::int4) return wide ? &kWide4 : &kNarrow4;
  if (kind == WeightKind::int8) return wide ? &kWide8 : &kNarrow8;
  return kind == WeightKind::fp4 && !wide ? &kNarrowFp4 : nullptr;
}

}  // namespace
}  // namespace fewbits
