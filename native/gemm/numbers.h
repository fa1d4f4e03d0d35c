// Small number formats as float32, in loops that every tier compiles for itself.
#pragma once

#include <stdint.h>
#include <string.h>

#include "gemm/kernel.h"

namespace fewbits {
namespace {

// e2m1 doubled is an integer, and not negative with the largest of them added.
constexpr int kFp4Offset = 12;
alignas(16) constexpr uint8_t kDoubledFp4[16] = {12, 13, 14, 15, 16, 18, 20, 24,
                                                 12, 11, 10, 9,  8,  6,  4,  0};

inline float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// A small float's exponent and mantissa, in a float32's place, with `bias` added to the exponent.
// Subnormal ones have the exponent 0 and stand for what the mantissa is beyond the next: exactly,
// and without float32's own subnormals, with which each product takes Intel's cores 150 cycles.
template <uint32_t bias>
inline float rebiased(uint32_t magnitude) {
  const float normal = from_bits(magnitude + (bias << 23));
  const float next = from_bits((bias + 1) << 23);
  return magnitude < 1u << 23 ? normal * 2 - next : normal;
}

inline float from_half(uint32_t half) {
  const uint32_t sign = (half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7fff;
  const float value = rebiased<112>(magnitude << 13);
  return from_bits(sign | (magnitude >= 0x7c00 ? 0x7f800000 | magnitude << 13 : to_bits(value)));
}

inline float from_e4m3(uint32_t code) {
  const uint32_t magnitude = code & 0x7f;
  const float value = rebiased<120>(magnitude << 20);
  return from_bits((code & 0x80) << 24 | (magnitude == 0x7f ? 0x7fc00000 : to_bits(value)));
}

// 2^(code - 127), of which 2^-127 is subnormal; 255 is NaN.
inline float from_e8m0(uint32_t code) {
  return from_bits(code == 0 ? 0x00400000 : code == 255 ? 0x7fc00000 : code << 23);
}

// To the nearest number of `mantissa` bits, ties to even; below 2^lowest to multiples of the
// spacing there.
template <int mantissa, int lowest>
inline float round_float(float value) {
  constexpr int kDropped = 23 - mantissa;
  const uint32_t bits = to_bits(value);
  const uint32_t rounded =
      (bits + ((1u << (kDropped - 1)) - 1) + (bits >> kDropped & 1)) & ~((1u << kDropped) - 1);
  // A number between 2^e and 2^(e + 1) has a spacing of 2^(e - 23).
  constexpr int kExponent = lowest - mantissa + 23;
  constexpr float kMagic = 1.5f * static_cast<float>(int64_t{1} << kExponent);
  const float small = (value + kMagic) - kMagic;
  const uint32_t magnitude = bits & 0x7fffffff;
  return magnitude < static_cast<uint32_t>(127 + lowest) << 23 ? small : from_bits(rounded);
}

// `count` scales, or one that all share, as float32.
inline void widen_scales(ScaleKind kind, const void* from, bool shared, int64_t begin,
                         int64_t count, float* to) {
  const auto widen = [&](const auto* scales, auto convert) {
    if (shared) {
      for (int64_t i = 0; i < count; ++i) {
        const float scale = convert(scales[begin + i]);
        for (int n = 0; n < kPanelRows; ++n) to[i * kPanelRows + n] = scale;
      }
    } else {
      scales += begin * kPanelRows;
      for (int64_t i = 0; i < count * kPanelRows; ++i) to[i] = convert(scales[i]);
    }
  };
  switch (kind) {
    case ScaleKind::none:
      for (int64_t i = 0; i < count * kPanelRows; ++i) to[i] = 1;
      break;
    case ScaleKind::f32:
      widen(static_cast<const float*>(from), [](float scale) { return scale; });
      break;
    case ScaleKind::bf16:
      widen(static_cast<const uint16_t*>(from),
            [](uint32_t scale) { return from_bits(scale << 16); });
      break;
    case ScaleKind::f16:
      widen(static_cast<const uint16_t*>(from), [](uint32_t scale) { return from_half(scale); });
      break;
    case ScaleKind::e4m3:
      widen(static_cast<const uint8_t*>(from), [](uint32_t scale) { return from_e4m3(scale); });
      break;
    case ScaleKind::e8m0:
      widen(static_cast<const uint8_t*>(from), [](uint32_t scale) { return from_e8m0(scale); });
      break;
  }
}

}  // namespace
}  // namespace fewbits
