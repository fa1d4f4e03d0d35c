// AVX-VNNI: products of unsigned codes with signed integers, four at once (VPDPBUSD).
#include "gemm/vectors_avx2.h"
#include "gemm/wide.h"
#include "gemm/words.h"

namespace fewbits {
namespace {

struct Integers : Integers256 {
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
    const __m256i codes =
        _mm256_and_si256(_mm256_srli_epi32(word, 4 * step), _mm256_set1_epi32(0x0f0f0f0f));
    if constexpr (kind == WeightKind::int4) return codes;
    const __m128i values = _mm_load_si128(reinterpret_cast<const __m128i*>(kDoubledFp4));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values), codes);
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
