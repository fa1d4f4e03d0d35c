// Eight rows of a panel: what the AVX2 tiers share.
#pragma once

#include "gemm/panel.h"

namespace fewbits {
namespace {

struct Vectors256 {
  static constexpr int kLanes = 8;
  static constexpr int kTiles = 2;    // a strip is a cache line wide
  static constexpr int kMaxRows = 4;  // by two tiles: eight of sixteen registers
  static constexpr int kRowsBesideWords = 4;
  static constexpr int kRowsWithTotals = 3;
  static constexpr int kValueWords = 1;
  template <WeightKind kind>
  static constexpr int decoding_rows = codes_per_word(kind) == 8 ? 4 : kMaxRows;
  template <WeightKind kind>
  static constexpr int decode_once_rows = 12;
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
};

// Sums in int32 of integer products; operands are codes as they are stored, offset-binary.
struct Integers256 : Vectors256 {
  using Operand = __m256i;
  using Value = __m256i;
  using Sum = __m256i;

  static Operand load_operand(const uint32_t* p) { return load_words(p); }
  static void store_operand(uint32_t* p, Operand operand) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(p), operand);
  }
  static Operand broadcast(const uint32_t* x) { return _mm256_set1_epi32(static_cast<int>(*x)); }
  static Sum zero() { return _mm256_setzero_si256(); }
  static Float to_float(Sum sum) { return _mm256_cvtepi32_ps(sum); }
  static Sum join(Sum high, Sum low) { return _mm256_add_epi32(_mm256_slli_epi32(high, 8), low); }
  template <WeightKind kind>
  static constexpr float offset = kind == WeightKind::int4   ? 8
                                  : kind == WeightKind::int8 ? 128
                                                             : kFp4Offset;
  template <WeightKind kind>
  static constexpr bool doubled = kind == WeightKind::fp4;
};

}  // namespace
}  // namespace fewbits
