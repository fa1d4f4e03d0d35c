// Pairs of bf16 out of a cache's codes; for tier files with AVX-512 VBMI.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "attention/attention.h"
#include "elementwise/lanes.h"

namespace fewbits {
namespace {

// The bytes of the bf16 numbers of 128 magnitudes.
struct ByteTables {
  alignas(64) uint8_t low[128];
  alignas(64) uint8_t high[128];
};

// value * 2^exponent, 0 < value < 256.
constexpr uint16_t bf16_of(int value, int exponent) {
  int top = 0;
  while (value >> (top + 1)) ++top;
  return static_cast<uint16_t>((127 + exponent + top) << 7 | ((value << (7 - top)) & 0x7f));
}

constexpr uint16_t bf16_of_magnitude(CacheKind kind, int code) {
  if (code == 0) return 0;
  if (kind == CacheKind::int8) return bf16_of(code, 0);
  if (code == 0x7f) return 0x7fc0;
  const int exponent = code >> 3, mantissa = code & 7;
  return exponent == 0 ? bf16_of(mantissa, -9) : bf16_of(8 + mantissa, exponent - 10);
}

constexpr ByteTables tables_of(CacheKind kind) {
  ByteTables tables{};
  for (int code = 0; code < 128; ++code) {
    tables.low[code] = static_cast<uint8_t>(bf16_of_magnitude(kind, code) & 0xff);
    tables.high[code] = static_cast<uint8_t>(bf16_of_magnitude(kind, code) >> 8);
  }
  return tables;
}

template <CacheKind kind>
constexpr ByteTables kByteTables = tables_of(kind);

FEWBITS_INLINE __m512i look_up(const uint8_t* table, __m512i magnitudes) {
  return _mm512_permutex2var_epi8(_mm512_load_si512(table), magnitudes,
                                  _mm512_load_si512(table + 64));
}

// Of every four codes (c0, c1, c2, c3): the pairs (c0, c2) and (c1, c3).
struct BytePairs {
  __m512i even, odd;
};

template <CacheKind kind>
FEWBITS_INLINE BytePairs decode_bytes(__m512i codes) {
  constexpr int kSelect = 0xca;  // a ? b : c, bit by bit
  const __m512i magnitudes = kind == CacheKind::int8 ? _mm512_abs_epi8(codes) : codes;
  const __m512i low = look_up(kByteTables<kind>.low, magnitudes);
  const __m512i unsigned_high = look_up(kByteTables<kind>.high, magnitudes);
  const __m512i high =
      _mm512_ternarylogic_epi32(_mm512_set1_epi8(-128), codes, unsigned_high, kSelect);
  const __m512i low_half = _mm512_set1_epi16(0xff);
  return {_mm512_ternarylogic_epi32(low_half, low, _mm512_slli_epi16(high, 8), kSelect),
          _mm512_ternarylogic_epi32(low_half, _mm512_srli_epi16(low, 8), high, kSelect)};
}

struct PairOrder {
  alignas(64) uint16_t codes[2][32];  // (a[i], b[i]) for 16 of two registers' 32 codes
  alignas(64) uint8_t bytes[2][64];   // (a[i], a[16 + i], b[i], b[16 + i]) for 32 of 64
};

constexpr PairOrder pair_order() {
  PairOrder order{};
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 16; ++i) {
      for (int row = 0; row < 2; ++row) {
        order.codes[half][2 * i + row] = static_cast<uint16_t>(32 * row + 16 * half + i);
        const int byte = 64 * row + 32 * half + i;
        order.bytes[half][4 * i + 2 * row] = static_cast<uint8_t>(byte);
        order.bytes[half][4 * i + 2 * row + 1] = static_cast<uint8_t>(byte + 16);
      }
    }
  }
  return order;
}

constexpr PairOrder kPairOrder = pair_order();

// Of two rows of the cache, 64 bytes each: the pairs (a, b) of every channel.
template <CacheKind kind>
FEWBITS_INLINE void pair_rows(__m512i a, __m512i b, __m512i* pairs) {
  for (int half = 0; half < 2; ++half) {
    if constexpr (kind == CacheKind::bf16) {
      pairs[half] = _mm512_permutex2var_epi16(a, _mm512_load_si512(kPairOrder.codes[half]), b);
    } else {
      const __m512i mixed =
          _mm512_permutex2var_epi8(a, _mm512_load_si512(kPairOrder.bytes[half]), b);
      const BytePairs decoded = decode_bytes<kind>(mixed);
      pairs[2 * half] = decoded.even;
      pairs[2 * half + 1] = decoded.odd;
    }
  }
}

}  // namespace
}  // namespace fewbits
