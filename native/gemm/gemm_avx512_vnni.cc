// AVX-512 VNNI: products of unsigned codes with signed integers, four at once (VPDPBUSD), and of
// integers of sixteen bits in pairs (VPDPWSSD).
#include "gemm/vectors_avx512.h"
#include "gemm/words.h"

namespace fewbits {
namespace {

// The dots as intrinsics make GCC 12 copy sums between registers around the loop.
struct Bytes : Bytes512 {
  static Sum dot(Sum sum, Operand weight, Operand x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weight), "v"(x));
    return sum;
  }
};

struct Pairs : Pairs512 {
  static Sum dot(Sum sum, Operand weight, Operand x) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(weight), "v"(x));
    return sum;
  }
};

__m512i integers(const float* x) { return _mm512_cvtps_epi32(_mm512_loadu_ps(x)); }

struct ByteWords : Int8Words {
  template <int codes, int stride>
  static int64_t bulk(const float* x, int64_t K, uint32_t* values) {
    const __m128i order = codes == 8
                              ? _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15)
                              : _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m128i* words = reinterpret_cast<__m128i*>(values);
    int64_t k = 0;
    for (; k + 16 <= K; k += 16) {
      const __m128i bytes = _mm512_cvtepi32_epi8(integers(x + k));
      _mm_storeu_si128(words++, _mm_shuffle_epi8(bytes, order));
    }
    return k;
  }
};

struct PairWords : Int16Words {
  template <int codes, int stride>
  static int64_t bulk(const float* x, int64_t K, uint32_t* values) {
    const __m256i order = pair_order<codes>();
    __m256i* words = reinterpret_cast<__m256i*>(values);
    int64_t k = 0;
    for (; k + 16 <= K; k += 16) {
      const __m256i pairs = _mm512_cvtepi32_epi16(integers(x + k));
      _mm256_storeu_si256(words++, _mm256_permutexvar_epi16(order, pairs));
    }
    return k;
  }
};

}  // namespace

const GemmKernel* gemm_kernel_avx512_vnni(WeightKind kind, DotKind dot) {
  return integer_kernel<Bytes, ByteWords, Pairs, PairWords>(kind, dot);
}

}  // namespace fewbits
