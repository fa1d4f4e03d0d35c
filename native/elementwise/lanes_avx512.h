// Lanes (see lanes.h) as one zmm register: AVX-512 F, BW, VL, DQ.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace fewbits {
namespace {

using Lanes = __m512;

// Registers for a tile of rows x keys, and of rows x channels: 4 x 2 and 4 x 4 accumulators of 32.
constexpr int kKeyVectors = 2;
constexpr int kChannelVectors = 4;

inline Lanes zero() { return _mm512_setzero_ps(); }
inline Lanes broadcast(float value) { return _mm512_set1_ps(value); }
inline Lanes load(const float* source) { return _mm512_loadu_ps(source); }
inline void store(float* target, Lanes value) { _mm512_storeu_ps(target, value); }
inline Lanes add(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
inline Lanes subtract(Lanes a, Lanes b) { return _mm512_sub_ps(a, b); }
inline Lanes multiply(Lanes a, Lanes b) { return _mm512_mul_ps(a, b); }
inline Lanes divide(Lanes a, Lanes b) { return _mm512_div_ps(a, b); }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
inline Lanes maximum(Lanes a, Lanes b) { return _mm512_max_ps(a, b); }
inline Lanes minimum(Lanes a, Lanes b) { return _mm512_min_ps(a, b); }

inline Lanes minus_magnitude(Lanes value) { return _mm512_or_ps(value, broadcast(-0.0f)); }
inline Lanes where_negative(Lanes value, Lanes negative, Lanes other) {
  return _mm512_mask_mov_ps(other, _mm512_movepi32_mask(_mm512_castps_si512(value)), negative);
}

inline Lanes select_range(Lanes value, int begin, int end, Lanes other) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __mmask16 inside = _mm512_cmpge_epi32_mask(lane, _mm512_set1_epi32(begin)) &
                           _mm512_cmplt_epi32_mask(lane, _mm512_set1_epi32(end));
  return _mm512_mask_mov_ps(other, inside, value);
}

inline float sum_lanes(Lanes value) {
  const __m256 half =
      _mm256_add_ps(_mm512_castps512_ps256(value), _mm512_extractf32x8_ps(value, 1));
  __m128 quad = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  quad = _mm_add_ps(quad, _mm_movehl_ps(quad, quad));
  return _mm_cvtss_f32(_mm_add_ss(quad, _mm_movehdup_ps(quad)));
}

inline float maximum_lanes(Lanes value) {
  const __m256 half =
      _mm256_max_ps(_mm512_castps512_ps256(value), _mm512_extractf32x8_ps(value, 1));
  __m128 quad = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  quad = _mm_max_ps(quad, _mm_movehl_ps(quad, quad));
  return _mm_cvtss_f32(_mm_max_ss(quad, _mm_movehdup_ps(quad)));
}

inline Lanes swap_pairs(Lanes value) { return _mm512_permute_ps(value, 0xb1); }

inline Lanes exp_lanes(Lanes x) {
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, broadcast(kLog2E)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, broadcast(kLn2High), x);
  r = _mm512_fnmadd_ps(n, broadcast(kLn2Low), r);
  __m512 p = broadcast(kExpC6);
  p = _mm512_fmadd_ps(p, r, broadcast(kExpC5));
  p = _mm512_fmadd_ps(p, r, broadcast(kExpC4));
  p = _mm512_fmadd_ps(p, r, broadcast(kExpC3));
  p = _mm512_fmadd_ps(p, r, broadcast(kExpC2));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r);
  p = _mm512_add_ps(p, broadcast(1.0f));
  // "Not less than" is true of a NaN, which scalef passes on.
  const __mmask16 kept = _mm512_cmp_ps_mask(x, broadcast(kExpLowest), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(kept, p, n);
}

inline Lanes load_bf16(const uint16_t* codes) {
  const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(packed), 16));
}

inline Lanes load_f16(const uint16_t* codes) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
}

// e4m3's seven low bits, put at f16's bits 7 to 13, are the value times 2^-8; the NaN code would be
// 480.
inline Lanes load_fp8(const uint8_t* codes) {
  const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  const __m256i top = _mm256_slli_epi16(_mm256_cvtepu8_epi16(packed), 8);
  const __m256i half = _mm256_and_si256(_mm256_srai_epi16(top, 1), _mm256_set1_epi16(-0x4001));
  const __m512 value = _mm512_mul_ps(_mm512_cvtph_ps(half), broadcast(256.0f));
  const __mmask16 nan = _mm512_cmp_ps_mask(_mm512_abs_ps(value), broadcast(480.0f), _CMP_EQ_OQ);
  return _mm512_mask_mov_ps(value, nan, broadcast(__builtin_nanf("")));
}

inline Lanes load_int8(const uint8_t* codes) {
  const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(packed));
}

inline void store_bf16(uint16_t* codes, Lanes value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i high = _mm512_srli_epi32(bits, 16);
  const __m512i even = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i code = _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm512_cvtepi32_epi16(code));
}

inline void store_f16(uint16_t* codes, Lanes value) {
  const __m256i code = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), code);
}

inline void store_fp8(uint8_t* codes, Lanes value) {
  const __m512i sign =
      _mm512_and_si512(_mm512_srli_epi32(_mm512_castps_si512(value), 24), _mm512_set1_epi32(0x80));
  const __m512 magnitude = _mm512_min_ps(_mm512_abs_ps(value), broadcast(kFp8Largest));
  const __m512i bits = _mm512_castps_si512(magnitude);
  const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 20), _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(even, _mm512_set1_epi32(0x7ffff - (120 << 23)));
  __m512i code = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 20);
  const __m512 shifter = broadcast(0x1p14f);  // adding it rounds to a multiple of 2^-9
  const __m512i small = _mm512_sub_epi32(_mm512_castps_si512(_mm512_add_ps(magnitude, shifter)),
                                         _mm512_castps_si512(shifter));
  code = _mm512_mask_mov_epi32(code, _mm512_cmp_ps_mask(magnitude, broadcast(0x1p-6f), _CMP_LT_OQ),
                               small);
  code = _mm512_mask_mov_epi32(code, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q),
                               _mm512_set1_epi32(0x7f));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes),
                   _mm512_cvtepi32_epi8(_mm512_or_si512(code, sign)));
}

inline void store_int8(uint8_t* codes, Lanes value) {
  const __mmask16 kept = _mm512_cmp_ps_mask(_mm512_abs_ps(value), broadcast(127.5f), _CMP_LT_OQ);
  const __m512i rounded = _mm512_maskz_cvtps_epi32(kept, value);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8(rounded));
}

// `bytes` (at most 64) from `source`, zeros after them.
inline Lanes load_bytes(const void* source, int bytes) {
  const __mmask64 kept = bytes >= 64 ? ~__mmask64{0} : (__mmask64{1} << bytes) - 1;
  return _mm512_castsi512_ps(_mm512_maskz_loadu_epi8(kept, source));
}

inline Lanes low_bf16(Lanes pairs) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs), 16));
}
inline Lanes high_bf16(Lanes pairs) {
  return _mm512_castsi512_ps(
      _mm512_and_si512(_mm512_castps_si512(pairs), _mm512_set1_epi32(-0x10000)));
}

FEWBITS_INLINE void transpose(Lanes* rows) {
  __m512 pairs[16], quads[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  // quads[4 b + c]: column c of each 128-bit quarter, rows 4 b to 4 b + 3.
  for (int i = 0; i < 16; i += 4) {
    const __m512d low0 = _mm512_castps_pd(pairs[i]), low1 = _mm512_castps_pd(pairs[i + 2]);
    const __m512d high0 = _mm512_castps_pd(pairs[i + 1]), high1 = _mm512_castps_pd(pairs[i + 3]);
    quads[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(low0, low1));
    quads[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low0, low1));
    quads[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high0, high1));
    quads[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high0, high1));
  }
  for (int c = 0; c < 4; ++c) {
    const __m512 even01 = _mm512_shuffle_f32x4(quads[c], quads[4 + c], 0x88);
    const __m512 odd01 = _mm512_shuffle_f32x4(quads[c], quads[4 + c], 0xdd);
    const __m512 even23 = _mm512_shuffle_f32x4(quads[8 + c], quads[12 + c], 0x88);
    const __m512 odd23 = _mm512_shuffle_f32x4(quads[8 + c], quads[12 + c], 0xdd);
    rows[c] = _mm512_shuffle_f32x4(even01, even23, 0x88);
    rows[4 + c] = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
    rows[8 + c] = _mm512_shuffle_f32x4(even01, even23, 0xdd);
    rows[12 + c] = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
  }
}

}  // namespace
}  // namespace fewbits
