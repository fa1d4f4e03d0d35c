// What a tier does to rows of floats before and after the products; loops that every tier compiles
// for itself. The formulas are those of kernels/reference/activations.py, operation by operation.
#pragma once

#include <float.h>
#include <math.h>

#include "gemm/kernel.h"
#include "gemm/numbers.h"

namespace fewbits {
namespace {

constexpr float kE4m3Max = 448;
constexpr float kE2m1Max = 6;
constexpr float kE2m3Max = 7.5f;
constexpr float kE3m2Max = 28;

// Of magnitudes the bits order as the numbers do, NaN above all.
inline float largest_magnitude(const float* x, int64_t count) {
  uint32_t largest = 0;
  for (int64_t k = 0; k < count; ++k) {
    const uint32_t magnitude = to_bits(x[k]) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  return from_bits(largest);
}

// The scale, NaN where x's largest magnitude is: integer codes can't say so.
inline float with_nan(float scale, float largest) { return largest == largest ? scale : largest; }

// As integers that order as the floats do.
inline int32_t ordered(float value) {
  const int32_t bits = static_cast<int32_t>(to_bits(value));
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

inline void range(const float* x, int64_t count, float* low, float* high) {
  int32_t lowest = ordered(x[0]), highest = lowest;
  for (int64_t k = 0; k < count; ++k) {
    const int32_t value = ordered(x[k]);
    lowest = value < lowest ? value : lowest;
    highest = value > highest ? value : highest;
  }
  *low = from_bits(static_cast<uint32_t>(lowest ^ ((lowest >> 31) & 0x7fffffff)));
  *high = from_bits(static_cast<uint32_t>(highest ^ ((highest >> 31) & 0x7fffffff)));
}

// Not the standard library's: what isn't inlined of that would be one weak symbol for all tiers.
inline float larger(float a, float b) { return a > b ? a : b; }

inline float clamp(float value, float low, float high) {
  const float floored = value < low ? low : value;
  return floored > high ? high : floored;
}

// Rounding to nearest even by an addition; right below 2^22.
inline float rint_small(float value) { return (value + 0x1.8p23f) - 0x1.8p23f; }

inline float to_int8(float value) { return rint_small(clamp(value, -128, 127)); }

template <int mantissa, int lowest>
inline void round_group(const float* x, int64_t count, float factor, float largest, float* codes) {
  for (int64_t k = 0; k < count; ++k) {
    codes[k] = round_float<mantissa, lowest>(clamp(x[k] * factor, -largest, largest));
  }
}

template <int mantissa, int lowest>
inline void divide_group(const float* x, int64_t count, float scale, float largest, float* codes) {
  for (int64_t k = 0; k < count; ++k) {
    codes[k] = round_float<mantissa, lowest>(clamp(x[k] / scale, -largest, largest));
  }
}

inline void int8_by_absmax(const float* x, int64_t count, float* codes, float* scale) {
  const float largest = largest_magnitude(x, count);
  *scale = largest / 127.0f;
  const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
  // None is beyond 127: what rounding adds to the largest is less than a half.
  for (int64_t k = 0; k < count; ++k) codes[k] = rint_small(x[k] * inverse);
}

// Codes up to 127 * 256, so that their upper bytes, rounded, are signed bytes too.
inline void int16_by_absmax(const float* x, int64_t count, float* codes, float* scale) {
  constexpr float kLargest = 32512;
  const float step = largest_magnitude(x, count) / kLargest;
  *scale = step < FLT_MIN ? FLT_MIN : step;
  const float inverse = 1.0f / *scale;
  for (int64_t k = 0; k < count; ++k) codes[k] = rint_small(x[k] * inverse);
}

inline void int8_token_asymmetric(const float* x, int64_t K, float* codes, float* scale,
                                  float* zero) {
  float low, high;
  range(x, K, &low, &high);
  *scale = (high - low) / 255.0f;
  if (*scale == 0) {
    *scale = low;
    *zero = 0;
    for (int64_t k = 0; k < K; ++k) codes[k] = 1;
    return;
  }
  const float step = *scale, shift = rintf(-128.0f - low / step);
  for (int64_t k = 0; k < K; ++k) codes[k] = to_int8(rintf(x[k] / step) + shift);
  *zero = shift;
}

inline void int8_static(const Activation& how, const float* x, int64_t K, float* codes) {
  if (how.quantizer == Quantizer::int8_static) {
    for (int64_t k = 0; k < K; ++k) codes[k] = to_int8(x[k] / how.scale);
    return;
  }
  const float inverse = 1.0f / how.scale;
  for (int64_t k = 0; k < K; ++k) {
    const float whole = clamp(rintf(x[k] * inverse), -0x1p31f, 0x1p31f);
    codes[k] = to_int8(whole + how.zero);
  }
}

inline uint32_t biased_exponent(int exponent) {
  return static_cast<uint32_t>(exponent < 0 ? 0 : exponent > 254 ? 254 : exponent);
}

// The exponent of a group's largest magnitude, less that of the largest element.
inline float shared_exponent(ScaleRounding rounding, float largest, int mantissa, int top) {
  const uint32_t added = rounding == ScaleRounding::even    ? 1u << (23 - mantissa - 1)
                         : rounding == ScaleRounding::floor ? 0
                                                            : (1u << 23) - 1;
  const int32_t exponent = static_cast<int32_t>((to_bits(largest) + added) >> 23) - top;
  return from_e8m0(biased_exponent(exponent));
}

// The exponent that brings a group's largest magnitude to at most 448.
inline float ceiling_exponent(float largest) {
  if (!(largest > 0)) return from_e8m0(0);
  int exponent;
  const float fraction = frexpf(largest / kE4m3Max, &exponent);
  const int ceiling = exponent - (fraction == 0.5f ? 1 : 0);
  return from_e8m0(biased_exponent(ceiling + 127));
}

// Scales in e4m3, and codes by what they stand for; scales of several groups at once, because each
// is a chain of operations on one number.
inline void nvfp4(const Activation& how, const float* x, int64_t K, float* codes, float* scales) {
  constexpr int64_t kGroups = 64;
  const float divisor = static_cast<float>(1 / how.global_scale), unit = 1.0f / divisor;
  const int64_t size = how.group_size ? how.group_size : K;
  for (int64_t begin = 0; begin < K; begin += kGroups * size, scales += kGroups) {
    const int64_t left = K - begin < kGroups * size ? K - begin : kGroups * size;
    const int64_t groups = (left + size - 1) / size;
    const auto count = [&](int64_t g) { return left - g * size < size ? left - g * size : size; };
    float factors[kGroups];
    for (int64_t g = 0; g < groups; ++g) {
      scales[g] = largest_magnitude(x + begin + g * size, count(g));
    }
    for (int64_t g = 0; g < groups; ++g) {
      const float wanted = divisor * (scales[g] * static_cast<float>(1.0 / 6));
      scales[g] = with_nan(round_float<3, -6>(clamp(wanted, -kE4m3Max, kE4m3Max)), wanted);
      factors[g] = scales[g] > 0 ? 1.0f / (scales[g] * unit) : 0.0f;
    }
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t k = begin + g * size;
      round_group<1, 0>(x + k, count(g), factors[g], kE2m1Max, codes + k);
    }
  }
}

inline void quantize_group(const Activation& how, const float* x, int64_t count, float* codes,
                           float* scale) {
  const float largest = largest_magnitude(x, count);
  switch (how.quantizer) {
    case Quantizer::int8_token:
    case Quantizer::int8_group:
      int8_by_absmax(x, count, codes, scale);
      break;
    case Quantizer::int16_group:
      int16_by_absmax(x, count, codes, scale);
      break;
    case Quantizer::fp8_token:
      *scale = larger(largest / kE4m3Max, static_cast<float>(1.0 / (448 * 512)));
      divide_group<3, -6>(x, count, *scale, kE4m3Max, codes);
      break;
    case Quantizer::fp8_group:
      *scale = larger(largest, 1e-10f) * static_cast<float>(1.0 / 448);
      divide_group<3, -6>(x, count, *scale, kE4m3Max, codes);
      break;
    case Quantizer::mxfp4:
      *scale = with_nan(shared_exponent(how.scale_rounding, largest, 1, 2), largest);
      divide_group<1, 0>(x, count, *scale, kE2m1Max, codes);
      break;
    case Quantizer::mxfp6:
      *scale = shared_exponent(how.scale_rounding, largest, 3, 2);
      divide_group<3, 0>(x, count, *scale, kE2m3Max, codes);
      break;
    case Quantizer::mxfp6e3m2:
      *scale = shared_exponent(how.scale_rounding, largest, 2, 4);
      divide_group<2, -2>(x, count, *scale, kE3m2Max, codes);
      break;
    case Quantizer::mxfp8:
      *scale = ceiling_exponent(largest);
      divide_group<3, -6>(x, count, *scale, kE4m3Max, codes);
      break;
    default:
      break;
  }
}

void quantize(const Activation& how, const float* x, int64_t K, float* codes, float* scales,
              float* zero) {
  switch (how.quantizer) {
    case Quantizer::none:
      return;
    case Quantizer::int8_token_asymmetric:
      int8_token_asymmetric(x, K, codes, scales, zero);
      return;
    case Quantizer::int8_static:
    case Quantizer::int8_static_asymmetric:
      *scales = with_nan(how.scale, largest_magnitude(x, K));
      *zero = how.zero;
      int8_static(how, x, K, codes);
      return;
    case Quantizer::fp8_static:
      *scales = how.scale;
      round_group<3, -6>(x, K, 1.0f / how.scale, kE4m3Max, codes);
      return;
    case Quantizer::nvfp4:
      nvfp4(how, x, K, codes, scales);
      return;
    default:
      break;
  }
  const int64_t size = how.group_size ? how.group_size : K;
  for (int64_t begin = 0; begin < K; begin += size) {
    const int64_t left = K - begin;
    quantize_group(how, x + begin, left < size ? left : size, codes + begin, scales++);
  }
}

template <bool zero, bool bias, bool add>
void finish_rows(const GemmOutput& out, int64_t rows, const float* totals) {
  const Target& target = out.target;
  for (int64_t m = 0; m < rows; ++m) {
    const float* const total = totals + m * kPanelRows;
    float* const y = target.y + (target.places ? target.places[m] : m) * target.stride;
    const float factor = out.factor[m], weight = target.weights ? target.weights[m] : 1;
    const float row_zero = zero ? out.row_zero[m] : 0;
    const auto finish_column = [&](int64_t j) {
      float value = total[j];
      if (zero) value -= row_zero * out.weight_sums[j];
      value *= factor;
      if (bias) value += out.bias[j];
      value *= weight;
      y[j] = add ? y[j] + value : value;
    };
    if (out.columns == kPanelRows) {
      for (int64_t j = 0; j < kPanelRows; ++j) finish_column(j);
    } else {
      for (int64_t j = 0; j < out.columns; ++j) finish_column(j);
    }
  }
}

void finish(const GemmOutput& out, int64_t rows, const float* totals) {
  using Finish = void (*)(const GemmOutput&, int64_t, const float*);
  static constexpr Finish kFinish[2][2][2] = {
      {{finish_rows<false, false, false>, finish_rows<false, false, true>},
       {finish_rows<false, true, false>, finish_rows<false, true, true>}},
      {{finish_rows<true, false, false>, finish_rows<true, false, true>},
       {finish_rows<true, true, false>, finish_rows<true, true, true>}},
  };
  kFinish[out.row_zero != nullptr][out.bias != nullptr][out.target.add](out, rows, totals);
}

}  // namespace
}  // namespace fewbits
