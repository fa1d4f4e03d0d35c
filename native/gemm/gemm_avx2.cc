// AVX2, FMA, F16C: products in float32, and integer ones in pairs of 16 bits (VPMADDWD).
#include "gemm/rows.h"
#include "gemm/vectors_avx2.h"
#include "gemm/words.h"

namespace fewbits {
namespace {

struct Floats : Vectors256 {
  template <WeightKind kind>
  static constexpr int decode_once_rows = codes_per_word(kind) == 8  ? 24
                                          : kind == WeightKind::bf16 ? kNever
                                          : kind == WeightKind::fp8  ? 5
                                                                     : 12;
  using Operand = __m256;
  using Sum = __m256;
  template <WeightKind kind>
  static constexpr int steps = codes_per_word(kind);
  template <WeightKind kind>
  static constexpr int decode_operations = kind == WeightKind::f32 ? 0 : 2 * codes_per_word(kind);
  template <WeightKind kind>
  static constexpr float offset = 0;

  static Operand load_operand(const uint32_t* p) {
    return _mm256_load_ps(reinterpret_cast<const float*>(p));
  }
  static void store_operand(uint32_t* p, Operand operand) {
    _mm256_store_ps(reinterpret_cast<float*>(p), operand);
  }
  static Operand broadcast(const uint32_t* x) {
    return _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(*x)));
  }
  static Sum zero() { return _mm256_setzero_ps(); }
  static Sum dot(Sum sum, Operand weight, Operand x) { return _mm256_fmadd_ps(weight, x, sum); }
  static Float to_float(Sum sum) { return sum; }

  template <WeightKind kind, int j>
  static Operand decode(Words word) {
    constexpr int kBits = 32 / codes_per_word(kind);
    // Code j at the top of each lane.
    const __m256i top = _mm256_slli_epi32(word, kBits <= 8 ? 32 - kBits * (j + 1) : 0);
    const __m256i sign = _mm256_and_si256(top, _mm256_set1_epi32(-0x7fffffff - 1));
    if constexpr (kind == WeightKind::int4 || kind == WeightKind::int8) {
      // With its highest bit flipped an offset-binary code is the two's complement of what it
      // stands for.
      const __m256i flipped = _mm256_xor_si256(top, _mm256_set1_epi32(-0x7fffffff - 1));
      return _mm256_cvtepi32_ps(_mm256_srai_epi32(flipped, 32 - kBits));
    } else if constexpr (kind == WeightKind::fp4) {
      // The permutation looks at three bits, the magnitude.
      const __m256 values = _mm256_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6);
      const __m256 magnitude = _mm256_permutevar8x32_ps(values, _mm256_srli_epi32(word, 4 * j));
      return _mm256_or_ps(magnitude, _mm256_castsi256_ps(sign));
    } else if constexpr (kind == WeightKind::fp8) {
      // As rebiased() in numbers.h.
      const __m256i all = _mm256_set1_epi32(0x07f00000);
      const __m256i magnitude = _mm256_and_si256(_mm256_srli_epi32(top, 4), all);
      const __m256 normal =
          _mm256_castsi256_ps(_mm256_add_epi32(magnitude, _mm256_set1_epi32(120 << 23)));
      const __m256i subnormal = _mm256_cmpgt_epi32(_mm256_set1_epi32(1 << 23), magnitude);
      const __m256 value = _mm256_blendv_ps(
          normal, _mm256_fmsub_ps(normal, _mm256_set1_ps(2), _mm256_set1_ps(0x1p-6f)),
          _mm256_castsi256_ps(subnormal));
      const __m256i nan = _mm256_cmpeq_epi32(magnitude, all);
      return _mm256_or_ps(_mm256_or_ps(value, _mm256_castsi256_ps(nan)), _mm256_castsi256_ps(sign));
    } else if constexpr (kind == WeightKind::bf16) {
      return _mm256_castsi256_ps(j == 0 ? _mm256_slli_epi32(word, 16)
                                        : _mm256_and_si256(word, _mm256_set1_epi32(-0x10000)));
    } else if constexpr (kind == WeightKind::f16) {
      const __m256i half =
          j == 0 ? _mm256_and_si256(word, _mm256_set1_epi32(0xffff)) : _mm256_srli_epi32(word, 16);
      const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(half, half), 0xd8);
      return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
    } else {
      return _mm256_castsi256_ps(word);
    }
  }
};

struct Pairs : Pairs256 {
  static Sum dot(Sum sum, Operand weight, Operand x) {
    const __m256i products = _mm256_madd_epi16(weight, x);
    asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(products));
    return sum;
  }
};

}  // namespace

const GemmKernel* gemm_kernel_avx2(WeightKind kind, DotKind dot) {
  return tier_kernel<Floats, Pairs>(kind, dot);
}

const RowKernels* row_kernels_avx2() {
  static constexpr RowKernels kernels = {quantize, finish};
  return &kernels;
}

}  // namespace fewbits
