// AVX-512 VNNI: products of unsigned codes with signed eight-bit x, four at once (VPDPBUSD).
#include "gemm/vectors_avx512.h"
#include "gemm/words.h"

namespace fewbits {
namespace {

struct Integers : Integers512 {
  template <WeightKind kind>
  static constexpr int steps = codes_per_word(kind) / 4;
  template <WeightKind kind, int step>
  static Operand decode(Words word) {
    if constexpr (kind == WeightKind::int8) return word;
    return _mm512_and_si512(_mm512_srli_epi32(word, 4 * step), _mm512_set1_epi32(0x0f0f0f0f));
  }
  static Sum dot(Sum sum, Operand weight, Operand x) {
    // As the intrinsic GCC 12 copies sums between registers around the loop.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weight), "v"(x));
    return sum;
  }
};

struct Words : Int8Words {
  template <int codes, int stride>
  static int64_t bulk(const float* x, int64_t K, uint32_t* values) {
    const __m128i order = codes == 8
                              ? _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15)
                              : _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int64_t k = 0;
    for (; k + 16 <= K; k += 16) {
      const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_loadu_ps(x + k)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(values + k / 4), _mm_shuffle_epi8(bytes, order));
    }
    return k;
  }
};

}  // namespace

const GemmKernel* gemm_kernel_avx512_vnni(WeightKind kind, DotKind dot) {
  static constexpr GemmKernel kInt4 = make_kernel<Integers, Words, WeightKind::int4>();
  static constexpr GemmKernel kInt8 = make_kernel<Integers, Words, WeightKind::int8>();
  if (dot != DotKind::integers) return nullptr;
  return kind == WeightKind::int4 ? &kInt4 : kind == WeightKind::int8 ? &kInt8 : nullptr;
}

}  // namespace fewbits
