// AVX-512 F, BW, VL, DQ: products in float32, and integer ones in pairs of 16 bits (VPMADDWD) or 8
// (VPMADDUBSW).
#include "gemm/rows.h"
#include "gemm/vectors_avx512.h"
#include "gemm/words.h"

namespace fewbits {
namespace {

struct Floats : Vectors512 {
  template <WeightKind kind>
  static constexpr int decode_once_rows = codes_per_word(kind) == 8  ? kNever
                                          : kind == WeightKind::bf16 ? 48
                                          : kind == WeightKind::int8 ? 20
                                          : kind == WeightKind::f16  ? 12
                                                                     : 7;
  using Operand = __m512;
  using Sum = __m512;
  template <WeightKind kind>
  static constexpr int steps = codes_per_word(kind);
  template <WeightKind kind>
  static constexpr int decode_operations = kind == WeightKind::f32 ? 0 : 2 * codes_per_word(kind);
  template <WeightKind kind>
  static constexpr float offset = 0;

  static Operand load_operand(const uint32_t* p) { return _mm512_load_ps(p); }
  static void store_operand(uint32_t* p, Operand operand) { _mm512_store_ps(p, operand); }
  static Operand broadcast(const uint32_t* x) {
    return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(*x)));
  }
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum dot(Sum sum, Operand weight, Operand x) { return _mm512_fmadd_ps(weight, x, sum); }
  static Float to_float(Sum sum) { return sum; }

  // A register of 32-bit lanes, byte `j` moved to where `bit` is its lowest.
  template <int j, int bit>
  static __m512i byte_at(__m512i word) {
    constexpr int kShift = bit - 8 * j;
    return kShift >= 0 ? _mm512_slli_epi32(word, kShift) : _mm512_srli_epi32(word, -kShift);
  }

  template <WeightKind kind, int j>
  static Operand decode(Words word) {
    if constexpr (kind == WeightKind::int4 || kind == WeightKind::fp4) {
      // The permutation looks only at the lowest four bits of each index.
      const __m512 values =
          kind == WeightKind::int4
              ? _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7)
              : _mm512_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4,
                               -6);
      return _mm512_permutexvar_ps(_mm512_srli_epi32(word, 4 * j), values);
    } else if constexpr (kind == WeightKind::int8) {
      // A byte in the mantissa of 2^23 becomes a float by an exact subtraction.
      const __m512 biased = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(
          _mm512_srli_epi32(word, 16 * (j / 2)), _mm512_set1_epi32(j % 2 ? 0xff00 : 0x00ff),
          _mm512_set1_epi32(0x4b000000), kAndOr));
      if constexpr (j % 2 == 0) return _mm512_sub_ps(biased, _mm512_set1_ps(0x1p23f + 128));
      return _mm512_fmsub_ps(biased, _mm512_set1_ps(0x1p-8f), _mm512_set1_ps(0x1p15f + 128));
    } else if constexpr (kind == WeightKind::fp8) {
      // As rebiased() in numbers.h.
      const __m512i magnitude =
          _mm512_and_si512(byte_at<j, 20>(word), _mm512_set1_epi32(0x07f00000));
      const __m512 normal =
          _mm512_castsi512_ps(_mm512_add_epi32(magnitude, _mm512_set1_epi32(120 << 23)));
      const __mmask16 subnormal = _mm512_testn_epi32_mask(magnitude, _mm512_set1_epi32(0x07800000));
      const __m512 value =
          _mm512_mask_fmsub_ps(normal, subnormal, _mm512_set1_ps(2), _mm512_set1_ps(0x1p-6f));
      const __mmask16 nan = _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x07f00000));
      const __m512i bits =
          _mm512_ternarylogic_epi32(byte_at<j, 24>(word), _mm512_set1_epi32(-0x7fffffff - 1),
                                    _mm512_castps_si512(value), kAndOr);
      return _mm512_castsi512_ps(_mm512_mask_mov_epi32(bits, nan, _mm512_set1_epi32(0x7fc00000)));
    } else if constexpr (kind == WeightKind::bf16) {
      return _mm512_castsi512_ps(j == 0 ? _mm512_slli_epi32(word, 16)
                                        : _mm512_and_si512(word, _mm512_set1_epi32(-0x10000)));
    } else if constexpr (kind == WeightKind::f16) {
      return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(word, 16 * j)));
    } else {
      return _mm512_castsi512_ps(word);
    }
  }
};

struct Pairs : Pairs512 {
  static Sum dot(Sum sum, Operand weight, Operand x) {
    const __m512i products = _mm512_madd_epi16(weight, x);
    asm("vpaddd %1, %0, %0" : "+v"(sum) : "v"(products));
    return sum;
  }
};

// As the avx2 tier's.
struct Bytes : Bytes512 {
  static Sum dot(Sum sum, Operand weight, Operand x) {
    return Pairs::dot(sum, _mm512_maddubs_epi16(weight, x), _mm512_set1_epi16(1));
  }
};

}  // namespace

const GemmKernel* gemm_kernel_avx512(WeightKind kind, DotKind dot) {
  return tier_kernel<Floats, Bytes, Pairs>(kind, dot);
}

const RowKernels* row_kernels_avx512() {
  static const RowKernels kernels = {quantize, finish};
  return &kernels;
}

}  // namespace fewbits
