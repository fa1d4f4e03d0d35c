// AVX-VNNI: products of unsigned codes with signed integers, four at once (VPDPBUSD), and of
// integers of sixteen bits in pairs (VPDPWSSD).
#include "gemm/vectors_avx2.h"
#include "gemm/words.h"

namespace fewbits {
namespace {

struct Bytes : Bytes256 {
  static Sum dot(Sum sum, Operand weight, Operand x) {
    return _mm256_dpbusd_avx_epi32(sum, weight, x);
  }
};

struct Pairs : Pairs256 {
  static Sum dot(Sum sum, Operand weight, Operand x) {
    return _mm256_dpwssd_avx_epi32(sum, weight, x);
  }
};

}  // namespace

const GemmKernel* gemm_kernel_avx2_vnni(WeightKind kind, DotKind dot) {
  return integer_kernel<Bytes, Int8Words, Pairs, Int16Words>(kind, dot);
}

}  // namespace fewbits
