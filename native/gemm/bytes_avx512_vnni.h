// Integers of eight bits with VNNI: what the avx512_vnni and avx512_bf16 tiers share.
#pragma once

#include "gemm/vectors_avx512.h"
#include "gemm/words.h"

namespace fewbits {
namespace {

// The dot as an intrinsic makes GCC 12 copy sums between registers around the loop. Up to nine rows
// of x go with all of a panel's, some of their sums in memory: with half of each line of words at a
// time memory gives a tenth less, since the hardware doesn't follow halves.
struct Bytes : Bytes512 {
  static constexpr int kSumsBesideX = 24;
  template <int>
  static constexpr int tiles = kPanelRows / kLanes;
  static Sum dot(Sum sum, Operand weight, Operand x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weight), "v"(x));
    return sum;
  }
  static Sum dot_memory(Sum sum, Operand weight, const uint32_t* x) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(weight), "m"(*x));
    return sum;
  }
};

template <int times>
struct ByteWords : Int8Words<times> {
  static int32_t sum(const uint32_t* words, int64_t count) {
    const __m128i middle = _mm_set1_epi8(INT8_MIN);
    __m128i sums = _mm_setzero_si128();  // of bytes without a sign
    int64_t added = 0;
    for (int64_t i = 0; i < count; i += 4, added += 16 * 128) {
      const __mmask8 valid = count - i >= 4 ? 0xf : static_cast<__mmask8>((1 << (count - i)) - 1);
      const __m128i bytes = _mm_maskz_loadu_epi32(valid, words + i);
      sums = _mm_add_epi64(sums, _mm_sad_epu8(_mm_xor_si128(bytes, middle), _mm_setzero_si128()));
    }
    return static_cast<int32_t>(_mm_cvtsi128_si64(sums) + _mm_extract_epi64(sums, 1) - added);
  }
  template <int codes, int stride>
  static int64_t bulk(const float* x, int64_t K, uint32_t* values) {
    const __m128i order = codes == 8
                              ? _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15)
                              : _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m128i* words = reinterpret_cast<__m128i*>(values);
    int64_t k = 0;
    for (; k + 16 <= K; k += 16) {
      const __m512 all = _mm512_mul_ps(_mm512_loadu_ps(x + k), _mm512_set1_ps(times));
      const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(all));
      _mm_storeu_si128(words++, _mm_shuffle_epi8(bytes, order));
    }
    return k;
  }
};

}  // namespace
}  // namespace fewbits
