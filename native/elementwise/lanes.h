// Sixteen float32 lanes: the vocabulary in which attention and elementwise kernels are written once
// and compiled once per tier, as a zmm register, two ymm registers or four 128-bit vectors of the
// compiler.
//
// Per tier: zero broadcast load store add subtract multiply divide multiply_add
//   maximum minimum                      the second where either is NaN
//   minus_magnitude                      -|v|
//   where_negative(v, a, b)              a where v has its sign bit set, else b
//   select_range(v, begin, end, other)   lanes [begin, end) of v, elsewhere `other`
//   sum_lanes maximum_lanes              in a fixed order
//   swap_pairs                           lanes 1 0 3 2 ...
//   exp_lanes                            e^x for x <= 0, see below
//   load_bf16 load_f16 load_fp8 load_int8 store_bf16 store_f16 store_fp8 store_int8
//                                        16 codes, as numbers.h defines them
//   load_bytes                           any 64 bytes, or fewer
//   low_bf16 high_bf16                   of 16 pairs of bf16, those in the low or high halves
//   transpose                            of 16 x 16, in place
// Here: the partial forms, for the last elements of a row.
//
// The exponential. x = n ln 2 + r with |r| <= ln 2 / 2; e^r = 1 + r + r^2 P(r), P (degree 4) being
// a minimax fit of the relative error (1.6e-8 with the rounded coefficients below); 2^n goes into
// the exponent. tests/elementwise_exp.cc measures the largest error over every float of [-87, 0].
// Below -87 the result is 0, so that no subnormal appears in the kernels; NaN stays NaN.
//
// All is in an anonymous namespace: a tier file that includes this exports nothing of it.
#pragma once

#include <stdint.h>

#include "elementwise/numbers.h"

// The kernels keep arrays of Lanes in registers, which takes that what handles them is inlined.
#define FEWBITS_INLINE __attribute__((always_inline)) inline

namespace fewbits {
namespace {

constexpr int kLanes = 16;
constexpr float kExpLowest = -87.0f;
constexpr float kLog2E = 1.442695041f;
constexpr float kLn2High = 0.693359375f;  // 355 / 512: n times it is exact
constexpr float kLn2Low = -2.12194440e-4f;
constexpr float kExpC2 = 0x1.fffff4p-2f;
constexpr float kExpC3 = 0x1.555504p-3f;
constexpr float kExpC4 = 0x1.5566a0p-5f;
constexpr float kExpC5 = 0x1.120300p-7f;
constexpr float kExpC6 = 0x1.5e51b6p-10f;

}  // namespace
}  // namespace fewbits

#if defined(__AVX512F__)
#include "elementwise/lanes_avx512.h"
#elif defined(__AVX2__)
#include "elementwise/lanes_avx2.h"
#else
#include "elementwise/lanes_ref.h"
#endif

namespace fewbits {
namespace {

// The first `count` elements, zeros after them.
[[maybe_unused]] inline Lanes load_part(const float* source, int count) {
  if (count >= kLanes) return load(source);
  float part[kLanes] = {};
  for (int i = 0; i < count; ++i) part[i] = source[i];
  return load(part);
}

[[maybe_unused]] inline void store_part(float* target, Lanes value, int count) {
  if (count >= kLanes) {
    store(target, value);
    return;
  }
  float part[kLanes];
  store(part, value);
  for (int i = 0; i < count; ++i) target[i] = part[i];
}

}  // namespace
}  // namespace fewbits
