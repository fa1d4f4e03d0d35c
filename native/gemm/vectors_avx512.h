// Sixteen rows of a panel: what the AVX-512 tiers share.
#pragma once

#include "gemm/panel.h"

namespace fewbits {
namespace {

constexpr int kAndOr = 0xea;  // truth table of (a & b) | c

struct Vectors512 {
  static constexpr int kLanes = 16;
  static constexpr int kTiles = kPanelRows / kLanes;
  static constexpr int kMaxRows = 6;  // by four tiles: 24 sums
  static constexpr int kRowsBesideWords = 4;
  static constexpr int kRowsWithTotals = 3;
  static constexpr int kValueWords = 1;
  template <WeightKind kind>
  static constexpr int decoding_rows = codes_per_word(kind) == 8 ? 4 : kMaxRows;
  template <WeightKind kind>
  static constexpr int decode_once_rows = codes_per_word(kind) == 8 ? 24 : 8;
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
};

// Sums in int32 of integer products; operands are codes as they are stored, offset-binary.
struct Integers512 : Vectors512 {
  using Operand = __m512i;
  using Value = __m512i;
  using Sum = __m512i;

  static Operand load_operand(const uint32_t* p) { return _mm512_load_si512(p); }
  static void store_operand(uint32_t* p, Operand operand) { _mm512_store_si512(p, operand); }
  static Operand broadcast(const uint32_t* x) { return _mm512_set1_epi32(static_cast<int>(*x)); }
  static Sum zero() { return _mm512_setzero_si512(); }
  static Float to_float(Sum sum) { return _mm512_cvtepi32_ps(sum); }
  static Sum join(Sum high, Sum low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low); }
  template <WeightKind kind>
  static constexpr float offset = kind == WeightKind::int4   ? 8
                                  : kind == WeightKind::int8 ? 128
                                                             : kFp4Offset;
  template <WeightKind kind>
  static constexpr bool doubled = kind == WeightKind::fp4;
};

}  // namespace
}  // namespace fewbits
