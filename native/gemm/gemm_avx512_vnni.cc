// AVX-512 VNNI: products of unsigned codes with signed integers, four at once (VPDPBUSD).
#include "gemm/vectors_avx512.h"
#include "gemm/wide.h"
#include "gemm/words.h"

namespace fewbits {
namespace {

struct Integers : Integers512 {
  template <WeightKind kind>
  static constexpr int steps = codes_per_word(kind) / 4;
  // Of fp4 five, and the end of a group of 16 every other word: as slow as memory, by measurement.
  template <WeightKind kind>
  static constexpr int decode_operations = kind == WeightKind::int8   ? 0
                                           : kind == WeightKind::int4 ? 3
                                                                      : 6;
  template <WeightKind kind, int step>
  static Operand decode(Words word) {
    if constexpr (kind == WeightKind::int8) return word;
    const __m512i codes =
        _mm512_and_si512(_mm512_srli_epi32(word, 4 * step), _mm512_set1_epi32(0x0f0f0f0f));
    if constexpr (kind == WeightKind::int4) return codes;
    const __m128i values = _mm_load_si128(reinterpret_cast<const __m128i*>(kDoubledFp4));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(values), codes);
  }
  static Sum dot(Sum sum, Operand weight, Operand x) {
    // As the intrinsic GCC 12 copies sums between registers around the loop.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weight), "v"(x));
    return sum;
  }
};

__m512i integers(const float* x) { return _mm512_cvtps_epi32(_mm512_loadu_ps(x)); }

// The lowest bytes of sixteen columns, in the order of the words of x.
template <int codes>
__m128i bytes_of(__m512i columns) {
  const __m128i order = codes == 8
                            ? _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15)
                            : _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm_shuffle_epi8(_mm512_cvtepi32_epi8(columns), order);
}

struct NarrowWords512 : Int8Words {
  template <int codes, int stride>
  static int64_t bulk(const float* x, int64_t K, uint32_t* values) {
    __m128i* words = reinterpret_cast<__m128i*>(values);
    int64_t k = 0;
    for (; k + 16 <= K; k += 16) _mm_storeu_si128(words++, bytes_of<codes>(integers(x + k)));
    return k;
  }
};

struct WideWords512 : WideWords {
  template <int codes, int stride>
  static int64_t bulk(const float* x, int64_t K, uint32_t* values) {
    __m128i* words = reinterpret_cast<__m128i*>(values);
    int64_t k = 0;
    for (; k + 16 <= K; k += 16) {
      const __m512i value = integers(x + k);
      const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(value, _mm512_set1_epi32(128)), 8);
      // The lowest byte of value - 256 * upper is that of the value.
      const __m128i high = bytes_of<codes>(upper), low = bytes_of<codes>(value);
      _mm_storeu_si128(words++, _mm_unpacklo_epi32(high, low));
      _mm_storeu_si128(words++, _mm_unpackhi_epi32(high, low));
    }
    return k;
  }
};

}  // namespace

const GemmKernel* gemm_kernel_avx512_vnni(WeightKind kind, DotKind dot) {
  return integer_kernel<Integers, NarrowWords512, WideWords512>(kind, dot);
}

}  // namespace fewbits
