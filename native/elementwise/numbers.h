// The number formats of caches and weights, one value at a time: bf16, f16, fp8 (e4m3fn) and int8,
// to and from f32. To nearest, ties to even; the vector tiers give the same bits for every input.
//
// Everything is static: a tier file that includes this exports nothing of it.
#pragma once

#include <stdint.h>

namespace fewbits {
namespace {

[[maybe_unused]] inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

[[maybe_unused]] inline float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

[[maybe_unused]] inline float from_bf16(uint16_t code) {
  return float_of(static_cast<uint32_t>(code) << 16);
}

[[maybe_unused]] inline uint16_t to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40);  // keep a NaN a NaN
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

[[maybe_unused]] inline float from_f16(uint16_t code) {
  const uint32_t sign = static_cast<uint32_t>(code & 0x8000) << 16;
  const uint32_t magnitude = code & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | ((magnitude & 0x3ff) << 13));
  if (magnitude < 0x400) {  // subnormal: a multiple of 2^-24
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return sign ? -value : value;
  }
  return float_of(sign | ((magnitude << 13) + (112u << 23)));
}

[[maybe_unused]] inline uint16_t to_f16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    return static_cast<uint16_t>(sign | 0x7e00 | ((magnitude >> 13) & 0x3ff));
  }
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and above
  if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 rounds to a multiple of 2^-24
    return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
}

constexpr float kFp8Largest = 448.0f;

[[maybe_unused]] inline float from_fp8(uint8_t code) {
  const uint32_t sign = static_cast<uint32_t>(code & 0x80) << 24;
  const uint32_t magnitude = code & 0x7f;
  if (magnitude == 0x7f) return float_of(sign | 0x7fc00000);
  if (magnitude < 8) {  // subnormal: a multiple of 2^-9
    const float value = static_cast<float>(magnitude) * 0x1p-9f;
    return sign ? -value : value;
  }
  return float_of(sign | ((magnitude << 20) + (120u << 23)));
}

// Values beyond +-448 become +-448; only NaN becomes NaN.
[[maybe_unused]] inline uint8_t to_fp8(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 24) & 0x80;
  if (value != value) return static_cast<uint8_t>(sign | 0x7f);
  float magnitude = float_of(bits & 0x7fffffff);
  if (magnitude > kFp8Largest) magnitude = kFp8Largest;
  if (magnitude < 0x1p-6f) {  // adding 2^14 rounds to a multiple of 2^-9
    return static_cast<uint8_t>(sign | (bits_of(magnitude + 0x1p14f) - bits_of(0x1p14f)));
  }
  const uint32_t code = bits_of(magnitude);
  return static_cast<uint8_t>(sign | ((code + 0x7ffff + ((code >> 20) & 1) - (120u << 23)) >> 20));
}

// To nearest, ties to even; 0 for what doesn't round to +-127 or less.
[[maybe_unused]] inline uint8_t to_int8(float value) {
  if (!(value > -127.5f && value < 127.5f)) return 0;
  return static_cast<uint8_t>(bits_of(value + 0x1.8p23f));
}

[[maybe_unused]] inline float from_int8(uint8_t code) {
  return static_cast<float>(static_cast<int8_t>(code));
}

}  // namespace
}  // namespace fewbits
