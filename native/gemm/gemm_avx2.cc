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
  // Half precision's exponents begin eight lower than those of e4m3.
  template <WeightKind kind>
  static constexpr float factor = kind == WeightKind::fp8 ? 256 : 1;

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

  // Codes of 8 and 16 bits that are converted as halves are brought together: the low lane then has
  // those of step 0 and, where there are four, of 2 behind them, and the high lane those of 1
  // and 3.
  template <WeightKind kind>
  static Words arrange(Words words) {
    if constexpr (kind == WeightKind::fp8) {
      const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      words = _mm256_shuffle_epi8(words, _mm256_broadcastsi128_si256(order));
      return _mm256_permutevar8x32_epi32(words, _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7));
    } else if constexpr (kind == WeightKind::f16) {
      const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
      words = _mm256_shuffle_epi8(words, _mm256_broadcastsi128_si256(order));
      return _mm256_permute4x64_epi64(words, 0xd8);
    } else {
      return words;
    }
  }

  template <int lane>
  static Operand from_halves(__m256i halves) {
    if constexpr (lane == 0) return _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
    return _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
  }

  template <int half>
  static __m256i unpack(__m256i low, __m256i high) {
    return half == 0 ? _mm256_unpacklo_epi8(low, high) : _mm256_unpackhi_epi8(low, high);
  }

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
      const __m256i nan_code = _mm256_set1_epi8(0x7f);
      const __m256i nan = _mm256_cmpeq_epi8(_mm256_and_si256(word, nan_code), nan_code);
      // The sign comes to stand twice, of which one is removed.
      const __m256i moved = _mm256_srai_epi16(unpack<j / 2>(_mm256_setzero_si256(), word), 1);
      const __m256i halves = _mm256_and_si256(moved, _mm256_set1_epi16(-0x4080));
      return from_halves<j % 2>(_mm256_or_si256(halves, unpack<j / 2>(nan, nan)));
    } else if constexpr (kind == WeightKind::bf16) {
      return _mm256_castsi256_ps(j == 0 ? _mm256_slli_epi32(word, 16)
                                        : _mm256_and_si256(word, _mm256_set1_epi32(-0x10000)));
    } else if constexpr (kind == WeightKind::f16) {
      return from_halves<j>(word);
    } else {
      return _mm256_castsi256_ps(word);
    }
  }
};

// Two products of at most 255 * 128 fit 16 bits where codes have four: of an int4 code at most 15,
// of a doubled fp4 one 24.
struct Bytes : Bytes256 {
  static Sum dot(Sum sum, Operand weight, Operand x) {
    const __m256i pairs = _mm256_maddubs_epi16(weight, x);
    const __m256i products = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(products));
    return sum;
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
  return tier_kernel<Floats, Bytes, Pairs>(kind, dot);
}

const RowKernels* row_kernels_avx2() {
  static constexpr RowKernels kernels = {quantize, finish};
  return &kernels;
}

}  // namespace fewbits
