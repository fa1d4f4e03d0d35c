// Sixteen rows of a panel: what the AVX-512 tiers share.
#pragma once

#include "gemm/panel.h"

namespace fewbits {
namespace {

constexpr int kAndOr = 0xea;  // truth table of (a & b) | c

struct Vectors512 {
  static constexpr bool kIntegers = false;
  static constexpr int kLanes = 16;
  static constexpr int kSumsBesideX = kAllSums;
  static constexpr int kOperandWords = 1;
  static constexpr int kPassRows = 9;  // eight draft tokens and the one before them
  static constexpr int kManyRows = 6;
  template <int rows>
  static constexpr int tiles = rows > 6 ? 2 : kPanelRows / kLanes;  // at most 24 sums
  static constexpr int kRowsBesideWords = 4;
  static constexpr int kRowsWithTotals = 3;
  static constexpr int decode_once_rows_intel = kNever;
  template <WeightKind kind>
  static constexpr int decoding_rows = codes_per_word(kind) == 8 ? 5 : kPassRows;
  template <WeightKind kind>
  static constexpr int decode_once_rows = codes_per_word(kind) == 8 ? kNever : 10;
  template <WeightKind kind>
  static constexpr bool doubled = false;
  using Words = __m512i;
  using Float = __m512;

  static Words load_words(const uint32_t* p) { return _mm512_load_si512(p); }
  static Float load(const float* p) { return _mm512_load_ps(p); }
  static void store(float* p, Float value) { _mm512_store_ps(p, value); }
  static Float set1(float value) { return _mm512_set1_ps(value); }
  static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float fmadd(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float fnmadd(Float a, Float b, Float c) { return _mm512_fnmadd_ps(a, b, c); }

  // e4m3 as halves, whose exponents are biased by eight more.
  static void widen_e4m3(const uint8_t* codes, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += 32) {
      const __m512i code =
          _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i)));
      const __m512i number = _mm512_and_si512(_mm512_srai_epi16(_mm512_slli_epi16(code, 8), 1),
                                              _mm512_set1_epi16(-0x4080));
      const __mmask32 nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(code, _mm512_set1_epi16(0x7f)),
                                                    _mm512_set1_epi16(0x7f));
      const __m512i half = _mm512_mask_mov_epi16(number, nan, _mm512_set1_epi16(0x7e00));
      const Float bias = set1(256);
      store(to + i, mul(_mm512_cvtph_ps(_mm512_castsi512_si256(half)), bias));
      store(to + i + 16, mul(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)), bias));
    }
  }
};

// Sums in int32 of integer products; operands are codes as they are stored, offset-binary.
struct Integers512 : Vectors512 {
  static constexpr bool kIntegers = true;
  static constexpr int decode_once_rows_intel = 20;
  template <WeightKind kind>
  static constexpr int decode_once_rows = kNever;
  using Operand = __m512i;
  using Sum = __m512i;

  static Operand load_operand(const uint32_t* p) { return _mm512_load_si512(p); }
  static void store_operand(uint32_t* p, Operand operand) { _mm512_store_si512(p, operand); }
  static Operand broadcast(const uint32_t* x) { return _mm512_set1_epi32(static_cast<int>(*x)); }
  static Float to_float(Sum sum) { return _mm512_cvtepi32_ps(sum); }
  template <WeightKind kind>
  static constexpr int offset = kind == WeightKind::int4   ? 8
                                : kind == WeightKind::int8 ? 128
                                                           : kFp4Offset;
};

// Four codes of eight bits an operand.
struct Bytes512 : Integers512 {
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
    const __m512i codes =
        _mm512_and_si512(_mm512_srli_epi32(word, 4 * step), _mm512_set1_epi32(0x0f0f0f0f));
    if constexpr (kind == WeightKind::int4) return codes;
    const __m128i values = _mm_load_si128(reinterpret_cast<const __m128i*>(kDoubledFp4));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(values), codes);
  }
};

// Two codes of sixteen bits an operand.
struct Pairs512 : Integers512 {
  template <WeightKind kind>
  static constexpr int steps = codes_per_word(kind) / 2;
  template <WeightKind kind>
  static constexpr int decode_operations = 2 * steps<kind>;
  template <WeightKind kind, int step>
  static Operand decode(Words word) {
    constexpr int kBits = 32 / codes_per_word(kind);
    constexpr int kMask = (1 << kBits) - 1;
    // The highest codes need no mask.
    if constexpr (step + 1 == steps<kind>) return _mm512_srli_epi16(word, 16 - kBits);
    return _mm512_and_si512(_mm512_srli_epi32(word, kBits * step),
                            _mm512_set1_epi32(kMask << 16 | kMask));
  }
};

// Where the pairs of an operand lie among sixteen columns of x; `codes`: of a word of the weight.
template <int codes>
__m256i pair_order() {
  return codes == 8   ? _mm256_setr_epi16(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15)
         : codes == 4 ? _mm256_setr_epi16(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15)
                      : _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

}  // namespace
}  // namespace fewbits
