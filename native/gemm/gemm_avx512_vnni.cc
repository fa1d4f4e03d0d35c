// AVX-512 VNNI: products of unsigned codes with signed integers, four at once (VPDPBUSD), and of
// integers of sixteen bits in pairs (VPDPWSSD).
#include "gemm/bytes_avx512_vnni.h"

namespace fewbits {
namespace {

struct Pairs : Pairs512 {
  static Sum dot(Sum sum, Operand weight, Operand x) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(weight), "v"(x));
    return sum;
  }
};

struct PairWords : Int16Words {
  template <int codes, int stride>
  static int64_t bulk(const float* x, int64_t K, uint32_t* values) {
    const __m256i order = pair_order<codes>();
    __m256i* words = reinterpret_cast<__m256i*>(values);
    int64_t k = 0;
    for (; k + 16 <= K; k += 16) {
      const __m256i pairs = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_loadu_ps(x + k)));
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
