// AVX-VNNI: products of unsigned codes with signed eight-bit x, four at once (VPDPBUSD).
#include "gemm/vectors_avx2.h"
#include "gemm/words.h"

namespace fewbits {
namespace {

struct Integers : Integers256 {
  template <WeightKind kind>
  static constexpr int steps = codes_per_word(kind) / 4;
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
  static constexpr GemmKernel kInt4 = make_kernel<Integers, Int8Words, WeightKind::int4>();
  static constexpr GemmKernel kInt8 = make_kernel<Integers, Int8Words, WeightKind::int8>();
  if (dot != DotKind::integers) return nullptr;
  return kind == WeightKind::int4 ? &kInt4 : kind == WeightKind::int8 ? &kInt8 : nullptr;
}

}  // namespace fewbits
