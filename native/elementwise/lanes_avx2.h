// Lanes (see lanes.h) as two ymm registers: AVX2, FMA, F16C.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace fewbits {
namespace {

struct Lanes {
  __m256 low, high;
};

// Registers for a tile of rows x keys, and of rows x channels: 4 x 1 accumulators of two registers
// each.
constexpr int kKeyVectors = 1;
constexpr int kChannelVectors = 1;

inline Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Lanes broadcast(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Lanes load(const float* source) {
  return {_mm256_loadu_ps(source), _mm256_loadu_ps(source + 8)};
}
inline void store(float* target, Lanes value) {
  _mm256_storeu_ps(target, value.low);
  _mm256_storeu_ps(target + 8, value.high);
}
inline Lanes add(Lanes a, Lanes b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
inline Lanes subtract(Lanes a, Lanes b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
inline Lanes multiply(Lanes a, Lanes b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
inline Lanes divide(Lanes a, Lanes b) {
  return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Lanes maximum(Lanes a, Lanes b) {
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}

inline Lanes minimum(Lanes a, Lanes b) {
  return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}

inline Lanes minus_magnitude(Lanes value) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(value.low, sign), _mm256_or_ps(value.high, sign)};
}
inline Lanes where_negative(Lanes value, Lanes negative, Lanes other) {
  return {_mm256_blendv_ps(other.low, negative.low, value.low),
          _mm256_blendv_ps(other.high, negative.high, value.high)};
}

inline __m256 select_range_half(__m256 value, __m256i lane, int begin, int end, __m256 other) {
  const __m256i outside = _mm256_or_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(begin), lane),
                                          _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(end - 1)));
  return _mm256_blendv_ps(value, other, _mm256_castsi256_ps(outside));
}

inline Lanes select_range(Lanes value, int begin, int end, Lanes other) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {select_range_half(value.low, lane, begin, end, other.low),
          select_range_half(value.high, lane, begin - 8, end - 8, other.high)};
}

inline float sum_lanes(Lanes value) {
  const __m256 half = _mm256_add_ps(value.low, value.high);
  __m128 quad = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  quad = _mm_add_ps(quad, _mm_movehl_ps(quad, quad));
  return _mm_cvtss_f32(_mm_add_ss(quad, _mm_movehdup_ps(quad)));
}

inline float maximum_lanes(Lanes value) {
  const __m256 half = _mm256_max_ps(value.low, value.high);
  __m128 quad = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  quad = _mm_max_ps(quad, _mm_movehl_ps(quad, quad));
  return _mm_cvtss_f32(_mm_max_ss(quad, _mm_movehdup_ps(quad)));
}

inline Lanes swap_pairs(Lanes value) {
  return {_mm256_permute_ps(value.low, 0xb1), _mm256_permute_ps(value.high, 0xb1)};
}

inline __m256 exp_half(__m256 x) {
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(kLog2E)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(kLn2High), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(kLn2Low), r);
  __m256 p = _mm256_set1_ps(kExpC6);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(kExpC5));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(kExpC4));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(kExpC3));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(kExpC2));
  p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r);
  p = _mm256_add_ps(p, _mm256_set1_ps(1.0f));
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  const __m256 scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
  const __m256 vanished = _mm256_cmp_ps(x, _mm256_set1_ps(kExpLowest), _CMP_LT_OQ);
  return _mm256_blendv_ps(_mm256_andnot_ps(vanished, scaled), x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}

inline Lanes exp_lanes(Lanes x) { return {exp_half(x.low), exp_half(x.high)}; }

inline Lanes load_bf16(const uint16_t* codes) {
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 8));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(low), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(high), 16))};
}

inline Lanes load_f16(const uint16_t* codes) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 8)))};
}

inline __m256 fp8_from_half(__m128i half) {
  const __m256 value = _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0f));
  const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), value);
  const __m256 nan = _mm256_cmp_ps(magnitude, _mm256_set1_ps(480.0f), _CMP_EQ_OQ);
  return _mm256_blendv_ps(value, _mm256_set1_ps(__builtin_nanf("")), nan);
}

// e4m3's seven low bits, put at f16's bits 7 to 13, are the value times 2^-8; the NaN code would be
// 480.
inline Lanes load_fp8(const uint8_t* codes) {
  const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  const __m256i top = _mm256_slli_epi16(_mm256_cvtepu8_epi16(packed), 8);
  const __m256i half = _mm256_and_si256(_mm256_srai_epi16(top, 1), _mm256_set1_epi16(-0x4001));
  return {fp8_from_half(_mm256_castsi256_si128(half)),
          fp8_from_half(_mm256_extracti128_si256(half, 1))};
}

inline Lanes load_int8(const uint8_t* codes) {
  const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(packed)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(packed, 8)))};
}

// Sixteen 32-bit numbers below 2^16, narrowed.
inline __m256i narrow(__m256i low, __m256i high) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
}

inline __m256i bf16_from_half(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i high = _mm256_srli_epi32(bits, 16);
  const __m256i even = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, quiet, nan);
}

inline void store_bf16(uint16_t* codes, Lanes value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes),
                      narrow(bf16_from_half(value.low), bf16_from_half(value.high)));
}

inline void store_f16(uint16_t* codes, Lanes value) {
  constexpr int kRounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm256_cvtps_ph(value.low, kRounding));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + 8), _mm256_cvtps_ph(value.high, kRounding));
}

inline __m256i fp8_codes(__m256 value) {
  const __m256i sign =
      _mm256_and_si256(_mm256_srli_epi32(_mm256_castps_si256(value), 24), _mm256_set1_epi32(0x80));
  const __m256 magnitude =
      _mm256_min_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), value), _mm256_set1_ps(kFp8Largest));
  const __m256i bits = _mm256_castps_si256(magnitude);
  const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 20), _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(even, _mm256_set1_epi32(0x7ffff - (120 << 23)));
  __m256i code = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 20);
  const __m256 shifter = _mm256_set1_ps(0x1p14f);  // adding it rounds to a multiple of 2^-9
  const __m256i small = _mm256_sub_epi32(_mm256_castps_si256(_mm256_add_ps(magnitude, shifter)),
                                         _mm256_castps_si256(shifter));
  const __m256 is_small = _mm256_cmp_ps(magnitude, _mm256_set1_ps(0x1p-6f), _CMP_LT_OQ);
  code = _mm256_blendv_epi8(code, small, _mm256_castps_si256(is_small));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  code = _mm256_blendv_epi8(code, _mm256_set1_epi32(0x7f), nan);
  return _mm256_or_si256(code, sign);
}

// Numbers below 256.
inline void store_bytes(uint8_t* codes, __m256i low, __m256i high) {
  const __m256i words = narrow(low, high);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(codes),
      _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

inline void store_fp8(uint8_t* codes, Lanes value) {
  store_bytes(codes, fp8_codes(value.low), fp8_codes(value.high));
}

inline __m256i int8_codes(__m256 value) {
  const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), value);
  const __m256 kept = _mm256_cmp_ps(magnitude, _mm256_set1_ps(127.5f), _CMP_LT_OQ);
  const __m256i rounded = _mm256_cvtps_epi32(_mm256_and_ps(value, kept));
  return _mm256_and_si256(rounded, _mm256_set1_epi32(0xff));
}

inline void store_int8(uint8_t* codes, Lanes value) {
  store_bytes(codes, int8_codes(value.low), int8_codes(value.high));
}

// `bytes` (at most 64) from `source`, zeros after them.
inline Lanes load_bytes(const void* source, int bytes) {
  float part[16] = {};
  __builtin_memcpy(part, source, static_cast<unsigned>(bytes));
  return load(part);
}

inline __m256 low_bf16(__m256 pairs) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pairs), 16));
}
inline __m256 high_bf16(__m256 pairs) {
  return _mm256_and_ps(pairs, _mm256_castsi256_ps(_mm256_set1_epi32(-0x10000)));
}
inline Lanes low_bf16(Lanes pairs) { return {low_bf16(pairs.low), low_bf16(pairs.high)}; }
inline Lanes high_bf16(Lanes pairs) { return {high_bf16(pairs.low), high_bf16(pairs.high)}; }

FEWBITS_INLINE void transpose_8x8(__m256* rows) {
  __m256 pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    rows[c] = _mm256_permute2f128_ps(quads[c], quads[4 + c], 0x20);
    rows[4 + c] = _mm256_permute2f128_ps(quads[c], quads[4 + c], 0x31);
  }
}

FEWBITS_INLINE void transpose(Lanes* rows) {
  __m256 quarters[4][8];
  for (int i = 0; i < 8; ++i) {
    quarters[0][i] = rows[i].low;
    quarters[1][i] = rows[8 + i].low;
    quarters[2][i] = rows[i].high;
    quarters[3][i] = rows[8 + i].high;
  }
  for (int q = 0; q < 4; ++q) transpose_8x8(quarters[q]);
  for (int i = 0; i < 8; ++i) {
    rows[i] = {quarters[0][i], quarters[1][i]};
    rows[8 + i] = {quarters[2][i], quarters[3][i]};
  }
}

}  // namespace
}  // namespace fewbits
