// Eight rows of a panel: what the AVX2 tiers share.
#pragma once

#include "gemm/panel.h"

namespace fewbits {
namespace {

struct Vectors256 {
  static constexpr bool kIntegers = false;
  static constexpr int kLanes = 8;
  static constexpr int kSumsBesideX = kAllSums;
  static constexpr int kOperandWords = 1;
  static constexpr int kPassRows = 6;
  static constexpr int kManyRows = 6;
  // At most twelve of sixteen registers are sums. With one row two of them would be waited for.
  template <int rows>
  static constexpr int tiles = rows <= 2 ? 4 : 2;
  static constexpr int kRowsBesideWords = 4;
  static constexpr int decode_once_rows_intel = kNever;
  static constexpr int kRowsWithTotals = 3;
  template <WeightKind kind>
  static constexpr int decoding_rows = kPassRows;
  template <WeightKind kind>
  static constexpr int decode_once_rows = codes_per_word(kind) == 8 ? 24 : 12;
  template <WeightKind kind>
  static constexpr bool doubled = false;
  using Words = __m256i;
  using Float = __m256;

  static Words load_words(const uint32_t* p) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
  }
  static Float load(const float* p) { return _mm256_load_ps(p); }
  static void store(float* p, Float value) { _mm256_store_ps(p, value); }
  static Float set1(float value) { return _mm256_set1_ps(value); }
  static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float fmadd(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float fnmadd(Float a, Float b, Float c) { return _mm256_fnmadd_ps(a, b, c); }

  // e4m3 as halves, whose exponents are biased by eight more.
  static void widen_e4m3(const uint8_t* codes, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += 16) {
      const __m256i code =
          _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
      const __m256i number = _mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(code, 8), 1),
                                              _mm256_set1_epi16(-0x4080));
      const __m256i nan = _mm256_cmpeq_epi16(_mm256_and_si256(code, _mm256_set1_epi16(0x7f)),
                                             _mm256_set1_epi16(0x7f));
      const __m256i half = _mm256_blendv_epi8(number, _mm256_set1_epi16(0x7e00), nan);
      const Float bias = set1(256);
      store(to + i, mul(_mm256_cvtph_ps(_mm256_castsi256_si128(half)), bias));
      store(to + i + 8, mul(_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)), bias));
    }
  }
};

// Sums in int32 of integer products; operands are codes as they are stored, offset-binary.
struct Integers256 : Vectors256 {
  static constexpr bool kIntegers = true;
  using Operand = __m256i;
  using Sum = __m256i;

  static Operand load_operand(const uint32_t* p) { return load_words(p); }
  static void store_operand(uint32_t* p, Operand operand) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(p), operand);
  }
  static Operand broadcast(const uint32_t* x) { return _mm256_set1_epi32(static_cast<int>(*x)); }
  static Float to_float(Sum sum) { return _mm256_cvtepi32_ps(sum); }
  template <WeightKind kind>
  static constexpr int offset = kind == WeightKind::int4   ? 8
                                : kind == WeightKind::int8 ? 128
                                                           : kFp4Offset;
};

// Four codes of eight bits an operand.
struct Bytes256 : Integers256 {
  template <WeightKind kind>
  static constexpr int steps = codes_per_word(kind) / 4;
  // Of fp4 five, and the end of a group of 16 every other word: as slow as memory, by measurement.
  template <WeightKind kind>
  static constexpr int decode_operations = kind == WeightKind::int8   ? 0
                                           : kind == WeightKind::int4 ? 3
                                                                      : 6;
  template <WeightKind kind>
  static constexpr bool doubled = kind == WeightKind::fp4;
  template <WeightKind kind, int step>
  static Operand decode(Words word) {
    if constexpr (kind == WeightKind::int8) return word;
    const __m256i codes =
        _mm256_and_si256(_mm256_srli_epi32(word, 4 * step), _mm256_set1_epi32(0x0f0f0f0f));
    if constexpr (kind == WeightKind::int4) return codes;
    const __m128i values = _mm_load_si128(reinterpret_cast<const __m128i*>(kDoubledFp4));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values), codes);
  }
};

// Two codes of sixteen bits an operand.
struct Pairs256 : Integers256 {
  template <WeightKind kind>
  static constexpr int steps = codes_per_word(kind) / 2;
  template <WeightKind kind>
  static constexpr int decode_operations = 2 * steps<kind>;
  template <WeightKind kind, int step>
  static Operand decode(Words word) {
    constexpr int kBits = 32 / codes_per_word(kind);
    constexpr int kMask = (1 << kBits) - 1;
    // The highest codes need no mask.
    if constexpr (step + 1 == steps<kind>) return _mm256_srli_epi16(word, 16 - kBits);
    return _mm256_and_si256(_mm256_srli_epi32(word, kBits * step),
                            _mm256_set1_epi32(kMask << 16 | kMask));
  }
};

}  // namespace
}  // namespace fewbits
