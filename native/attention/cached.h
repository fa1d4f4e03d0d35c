// Rows of the cache as sixteen lanes; for tier files.
#pragma once

#include <stdint.h>

#include "attention/attention.h"
#include "elementwise/lanes.h"

namespace fewbits {
namespace {

// Positions of a block of keys in scratch memory: [D][64], or [pairs of channels][64].
constexpr int kKeyBlock = 64;

template <CacheKind kind>
struct CacheElement {
  using Type = uint16_t;
};
template <>
struct CacheElement<CacheKind::f32> {
  using Type = float;
};
template <>
struct CacheElement<CacheKind::fp8> {
  using Type = uint8_t;
};
template <>
struct CacheElement<CacheKind::int8> {
  using Type = uint8_t;
};

template <CacheKind kind>
inline Lanes load_elements(const typename CacheElement<kind>::Type* source) {
  if constexpr (kind == CacheKind::f32) return load(source);
  if constexpr (kind == CacheKind::bf16) return load_bf16(source);
  if constexpr (kind == CacheKind::f16) return load_f16(source);
  if constexpr (kind == CacheKind::fp8) return load_fp8(source);
  if constexpr (kind == CacheKind::int8) return load_int8(source);
}

template <CacheKind kind>
inline void store_elements(typename CacheElement<kind>::Type* target, Lanes value) {
  if constexpr (kind == CacheKind::f32) store(target, value);
  if constexpr (kind == CacheKind::bf16) store_bf16(target, value);
  if constexpr (kind == CacheKind::f16) store_f16(target, value);
  if constexpr (kind == CacheKind::fp8) store_fp8(target, value);
  if constexpr (kind == CacheKind::int8) store_int8(target, value);
}

// Elements [d, d + 16) of a cache row; zeros from D on, without reading there.
template <CacheKind kind>
inline Lanes load_cached(const void* row, int d, int D) {
  using Element = typename CacheElement<kind>::Type;
  const Element* source = static_cast<const Element*>(row) + d;
  if (d + kLanes <= D) return load_elements<kind>(source);
  Element part[kLanes] = {};
  for (int i = 0; i < D - d; ++i) part[i] = source[i];
  return load_elements<kind>(part);
}

// Hardware prefetchers stop at the end of a page of the cache, and a core's out-of-order window is
// shorter than memory's latency, so rows are asked for kLookAhead positions early. Into the
// second-level cache (locality 2): pages lie at multiples of a power of two, and in the first level
// the rows of a head evict each other. Measured on Zen 4 for 8 x 2048 positions of D 64, bf16: 315
// us (of which 300 without waiting for memory), 500 us into the first level, 730 us without.
inline void prefetch_row(const void* row, int bytes) {
  for (int offset = 0; offset < bytes; offset += 64) {
    __builtin_prefetch(static_cast<const char*>(row) + offset, 0, 2);
  }
}

template <CacheKind kind>
inline int row_bytes(int D) {
  return D * static_cast<int>(sizeof(typename CacheElement<kind>::Type));
}

// Of 16 positions from `group` on.
template <CacheKind kind>
inline void prefetch_keys(const AttendChunk& chunk, int group) {
  for (int i = 0; i < kLanes; ++i) {
    prefetch_row(chunk.keys[group + kLookAhead + i], row_bytes<kind>(chunk.D));
  }
}

// Multiplies [rows][stride] scores of positions from `j` on by their keys' scales.
inline Lanes scaled_scores(const AttendChunk& chunk, int j, Lanes scores) {
  return chunk.key_scales ? multiply(scores, load(chunk.key_scales + j)) : scores;
}

template <int Rows>
struct RowCount {
  static constexpr int value = Rows;
};

constexpr int kRowTile = 4;

// Calls tile(RowCount<n>, row) for tiles of kRowTile rows, and once for the remaining ones.
template <typename Tile>
inline void for_tiles(int rows, Tile tile) {
  int row = 0;
  for (; row + kRowTile <= rows; row += kRowTile) tile(RowCount<kRowTile>{}, row);
  if (rows - row == 3) tile(RowCount<3>{}, row);
  if (rows - row == 2) tile(RowCount<2>{}, row);
  if (rows - row == 1) tile(RowCount<1>{}, row);
}

inline void merge_parts(const Running& total, const Running& later, int rows, int value_stride) {
  for (int row = 0; row < rows; row += kLanes) {
    const int count = rows - row < kLanes ? rows - row : kLanes;
    const Lanes before = load_part(total.maximum + row, count);
    const Lanes after = load_part(later.maximum + row, count);
    const Lanes now = maximum(before, after);
    float maxima[kLanes], old_factors[kLanes], new_factors[kLanes];
    store(maxima, now);
    store(old_factors, exp_lanes(subtract(before, now)));
    store(new_factors, exp_lanes(subtract(after, now)));
    for (int i = 0; i < count; ++i) {
      const int r = row + i;
      if (later.sum[r] == 0.0f) continue;  // not even the sign of a zero depends on its neighbours
      total.maximum[r] = maxima[i];
      total.sum[r] = total.sum[r] * old_factors[i] + later.sum[r] * new_factors[i];
      const Lanes old_factor = broadcast(old_factors[i]), new_factor = broadcast(new_factors[i]);
      float* mine = total.accumulator + static_cast<int64_t>(r) * value_stride;
      const float* other = later.accumulator + static_cast<int64_t>(r) * value_stride;
      for (int d = 0; d < value_stride; d += kLanes) {
        const Lanes added = multiply(load(other + d), new_factor);
        store(mine + d, multiply_add(load(mine + d), old_factor, added));
      }
    }
  }
}

}  // namespace
}  // namespace fewbits
