// AVX-VNNI: products of unsigned codes with signed integers, four at once (VPDPBUSD).
#include "gemm/vectors_avx2.h"
#include "gemm/wide.h"
#include "gemm/words.h"

namespace fewbits {
namespace {

struct Integers : Integers256 {
  template <WeightKind kind>
  static constexpr int steps = codes_per_word(kind) / 4;
  template <WeightKind kind>
  static constexpr int decode_operations = kind == WeightKind::int4 ? 3 : 0;
  template <WeightKind kind, int step>
  static Operand decode(Words word) {
    if constexpr (kind == WeightKind::int8) return word;
    return _mm256_and_si256(_mm256_srli_epi32(word, 4 * step), _mm256_set1_epi32(0x0f0f0f0f));
  }
  static Sum dot(Sum sum, Operand weight, Operand x) {
    return _mm256_dpbusd_avx_epi32(sum, weight, x);
  }
};

}  // namespace

const GemmKernel* gemm_kernel_avx2_vnni(WeightKind kind, DotKind dot) {
  return integer_kernel<Integers, Int8Words, WideWords>(kind, dot);
}

}  // namespace fewbits
