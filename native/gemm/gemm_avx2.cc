// AVX2, FMA, F16C: products in float32, and integer ones in pairs of 16 bits (VPMADDWD) or 8
// (VPMADDUBSW).
#include "gemm/rows.h"
#include "gemm/vectors_avx2.h"
#include "gemm/words.h"

namespace fewbits {
namespace {

// Lower and upper bytes of e4m3 codes as bfloat16: one is the lower nibble, moved, the other
// follows from the upper. Subnormal numbers, whose exponent is 0, are looked up.
struct E4m3Bytes {
  __m256i low, high;

  static __m256i look_up(__m128i table, __m256i nibbles) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), nibbles);
  }

  explicit E4m3Bytes(__m256i codes) {
    const __m256i nibble = _mm256_set1_epi8(0x0f);
    const __m256i magnitude = _mm256_and_si256(codes, _mm256_set1_epi8(0x7f));
    const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(magnitude, 4), nibble);
    const __m256i lower = _mm256_and_si256(codes, nibble);
    const __m256i subnormal = _mm256_cmpgt_epi8(_mm256_set1_epi8(8), magnitude);
    // A NaN's exponent is filled up.
    const __m256i nan = _mm256_cmpeq_epi8(magnitude, _mm256_set1_epi8(0x7f));
    const __m128i subnormal_low =
        _mm_setr_epi8(0, 0, -0x80, -0x40, 0, 0x20, 0x40, 0x60, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m128i subnormal_high =
        _mm_setr_epi8(0, 0x3b, 0x3b, 0x3b, 0x3c, 0x3c, 0x3c, 0x3c, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m256i normal_high = _mm256_add_epi8(upper, _mm256_set1_epi8(0x3c));
    const __m256i normal_low =
        _mm256_and_si256(_mm256_slli_epi16(codes, 4), _mm256_set1_epi8(-0x10));
    low = _mm256_blendv_epi8(normal_low, look_up(subnormal_low, lower), subnormal);
    high = _mm256_blendv_epi8(normal_high, look_up(subnormal_high, lower), subnormal);
    high = _mm256_or_si256(high, _mm256_andnot_si256(_mm256_set1_epi8(0x7f), codes));
    high = _mm256_or_si256(high, _mm256_and_si256(nan, _mm256_set1_epi8(0x7f)));
  }
};

struct Floats : Vectors256 {
  template <WeightKind kind>
  static constexpr int decode_once_rows = codes_per_word(kind) == 8  ? 24
                                          : kind == WeightKind::bf16 ? kNever
                                          : kind == WeightKind::fp8  ? 4
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
    if constexpr (kind == WeightKind::int4 || kind == WeightKind::int8) {
      // With its highest bit flipped an offset-binary code is the two's complement of what it
      // stands for.
      const __m256i flipped =
          _mm256_xor_si256(word, _mm256_set1_epi32(kBits == 4 ? -0x77777778 : -0x7f7f7f80));
      const __m256i top = _mm256_slli_epi32(flipped, 32 - kBits * (j + 1));
      return _mm256_cvtepi32_ps(_mm256_srai_epi32(top, 32 - kBits));
    } else if constexpr (kind == WeightKind::fp4) {
      // The permutation looks at three bits, the magnitude.
      const __m256 values = _mm256_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6);
      const __m256 magnitude = _mm256_permutevar8x32_ps(values, _mm256_srli_epi32(word, 4 * j));
      const __m256i sign = _mm256_and_si256(_mm256_slli_epi32(word, 32 - kBits * (j + 1)),
                                            _mm256_set1_epi32(-0x7fffffff - 1));
      return _mm256_or_ps(magnitude, _mm256_castsi256_ps(sign));
    } else if constexpr (kind == WeightKind::fp8) {
      // Bytes 0 and 2, or 1 and 3, as bfloat16.
      const E4m3Bytes bytes(word);
      const __m256i pairs =
          j % 2 == 0 ? _mm256_or_si256(_mm256_and_si256(bytes.low, _mm256_set1_epi16(0x00ff)),
                                       _mm256_slli_epi16(bytes.high, 8))
                     : _mm256_or_si256(_mm256_and_si256(bytes.high, _mm256_set1_epi16(-0x100)),
                                       _mm256_srli_epi16(bytes.low, 8));
      return decode<WeightKind::bf16, j / 2>(pairs);
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

// For codes of four bits: two products are at most 2 * 15 * 128, of doubled fp4 2 * 24 * 12, and
// fit 16 bits.
struct Bytes : Bytes256 {
  static Sum dot(Sum sum, Operand weight, Operand x) {
    return Pairs::dot(sum, _mm256_maddubs_epi16(weight, x), _mm256_set1_epi16(1));
  }
};

}  // namespace

const GemmKernel* gemm_kernel_avx2(WeightKind kind, DotKind dot) {
  return tier_kernel<Floats, Bytes, Pairs>(kind, dot);
}

const RowKernels* row_kernels_avx2() {
  static constexpr RowKernels kernels = {quantize, finish};
  return &kernels;
}

}  // namespace fewbits
