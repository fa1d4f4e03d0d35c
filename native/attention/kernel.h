// The attention kernels, written once over the sixteen lanes of elementwise/lanes.h; each tier's
// file includes this and is compiled with its own flags. See attention.h for the order of
// accumulation.
#pragma once

#include <stdint.h>

#include "attention/attention.h"
#include "elementwise/lanes.h"

namespace fewbits {
namespace {

constexpr int kRowTile = 4;

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

template <CacheKind kind>
inline Lanes load_elements(const typename CacheElement<kind>::Type* source) {
  if constexpr (kind == CacheKind::f32) return load(source);
  if constexpr (kind == CacheKind::bf16) return load_bf16(source);
  if constexpr (kind == CacheKind::f16) return load_f16(source);
  if constexpr (kind == CacheKind::fp8) return load_fp8(source);
}

template <CacheKind kind>
inline void store_elements(typename CacheElement<kind>::Type* target, Lanes value) {
  if constexpr (kind == CacheKind::f32) store(target, value);
  if constexpr (kind == CacheKind::bf16) store_bf16(target, value);
  if constexpr (kind == CacheKind::f16) store_f16(target, value);
  if constexpr (kind == CacheKind::fp8) store_fp8(target, value);
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

template <CacheKind kind>
inline void prefetch_keys(const AttendBlock& block, int group) {
  for (int i = 0; i < kLanes; ++i) {
    prefetch_row(block.keys[group + kLookAhead + i], row_bytes<kind>(block.D));
  }
}

// Calls use(d, column) for `count` channels from d on, in order; `column` holds that channel of 16
// keys.
template <CacheKind kind, typename Use>
FEWBITS_INLINE void each_column_of_tile(const AttendBlock& block, int group, int d, int count,
                                        Use use) {
  Lanes tile[kLanes];
  if constexpr (kind == CacheKind::bf16) {
    // Pairs of channels are transposed as they are: half the shuffles.
    for (int i = 0; i < kLanes; ++i) {
      tile[i] = load_bytes(static_cast<const uint16_t*>(block.keys[group + i]) + d, 2 * count);
    }
    transpose(tile);
    for (int c = 0; c < kLanes; ++c) {
      if (2 * c < count) use(d + 2 * c, low_bf16(tile[c]));
      if (2 * c + 1 < count) use(d + 2 * c + 1, high_bf16(tile[c]));
    }
  } else {
    for (int i = 0; i < kLanes; ++i) {
      tile[i] = load_cached<kind>(block.keys[group + i], d, d + count);
    }
    transpose(tile);
    for (int c = 0; c < kLanes; ++c) {
      if (c < count) use(d + c, tile[c]);
    }
  }
}

template <CacheKind kind, typename Use>
FEWBITS_INLINE void each_column(const AttendBlock& block, int group, Use use) {
  constexpr int kTile = kind == CacheKind::bf16 ? 2 * kLanes : kLanes;
  int d = 0;
  for (; d + kTile <= block.D; d += kTile) each_column_of_tile<kind>(block, group, d, kTile, use);
  if (d < block.D) each_column_of_tile<kind>(block, group, d, block.D - d, use);
}

// For few rows: scores straight from the columns.
template <CacheKind kind, int Rows>
void score_columns(const AttendBlock& block) {
  for (int group = block.begin / kLanes * kLanes; group < block.end; group += kLanes) {
    prefetch_keys<kind>(block, group);
    Lanes sums[Rows];
    for (int r = 0; r < Rows; ++r) sums[r] = zero();
    each_column<kind>(block, group, [&](int d, Lanes column) __attribute__((always_inline)) {
      for (int r = 0; r < Rows; ++r) {
        sums[r] = multiply_add(broadcast(block.query[r * block.stride + d]), column, sums[r]);
      }
    });
    for (int r = 0; r < Rows; ++r) store(block.score_scratch + r * kKeyBlock + group, sums[r]);
  }
}

// For many rows: key_scratch[d][position] first, then tiles of rows.
template <CacheKind kind>
void transpose_keys(const AttendBlock& block) {
  for (int group = block.begin / kLanes * kLanes; group < block.end; group += kLanes) {
    prefetch_keys<kind>(block, group);
    each_column<kind>(block, group, [&](int d, Lanes column) __attribute__((always_inline)) {
      store(block.key_scratch + d * kKeyBlock + group, column);
    });
  }
}

template <int Rows>
void score_rows(const AttendBlock& block, int row) {
  constexpr int kStep = kKeyVectors * kLanes;
  const float* query = block.query + row * block.stride;
  for (int j = block.begin / kStep * kStep; j < block.end; j += kStep) {
    Lanes sums[Rows][kKeyVectors];
    for (int r = 0; r < Rows; ++r) {
      for (int v = 0; v < kKeyVectors; ++v) sums[r][v] = zero();
    }
    const float* keys = block.key_scratch + j;
    for (int d = 0; d < block.D; ++d, keys += kKeyBlock) {
      Lanes key[kKeyVectors];
      for (int v = 0; v < kKeyVectors; ++v) key[v] = load(keys + v * kLanes);
      for (int r = 0; r < Rows; ++r) {
        const Lanes q = broadcast(query[r * block.stride + d]);
        for (int v = 0; v < kKeyVectors; ++v) sums[r][v] = multiply_add(q, key[v], sums[r][v]);
      }
    }
    for (int r = 0; r < Rows; ++r) {
      float* scores = block.score_scratch + (row + r) * kKeyBlock + j;
      for (int v = 0; v < kKeyVectors; ++v) store(scores + v * kLanes, sums[r][v]);
    }
  }
}

// Scores become exponentials; the row's sum and values are rescaled to the new maximum.
void softmax_row(const AttendBlock& block, int row) {
  const int first = block.first[row], last = block.last[row];
  if (first >= last) return;
  float* scores = block.score_scratch + row * kKeyBlock;
  const int group_begin = first / kLanes * kLanes;
  const Lanes hidden = broadcast(-__builtin_inff());
  Lanes largest = hidden;
  for (int j = group_begin; j < last; j += kLanes) {
    const Lanes score = select_range(load(scores + j), first - j, last - j, hidden);
    store(scores + j, score);
    largest = maximum(largest, score);
  }
  const float before = block.maximum[row];
  const float block_largest = maximum_lanes(largest);
  const float now = before > block_largest ? before : block_largest;
  Lanes sums = zero();
  for (int j = group_begin; j < last; j += kLanes) {
    const Lanes weight = exp_lanes(subtract(load(scores + j), broadcast(now)));
    store(scores + j, weight);
    sums = add(sums, weight);
  }
  block.maximum[row] = now;
  if (now == before) {
    block.sum[row] += sum_lanes(sums);
    return;
  }
  float factors[kLanes];
  store(factors, exp_lanes(broadcast(before - now)));
  block.sum[row] = block.sum[row] * factors[0] + sum_lanes(sums);
  float* accumulator = block.accumulator + row * block.stride;
  for (int d = 0; d < block.D; d += kLanes) {
    store(accumulator + d, multiply(load(accumulator + d), broadcast(factors[0])));
  }
}

// The values that are weighed: the cache's own, or for many rows a copy of them in f32.
struct ValueRows {
  const void* const* rows;  // [kKeyBlock]
  int D;
  int prefetched_bytes;  // of the rows kLookAhead positions later; 0 for the copy
};

// Several vectors are whole ones; a single one may be the end of a row.
template <CacheKind kind, int Rows, int Vectors>
void weigh_channels(const AttendBlock& block, const ValueRows& values, int row, int first, int last,
                    int d) {
  float* accumulator = block.accumulator + row * block.stride + d;
  const float* weights = block.score_scratch + row * kKeyBlock;
  Lanes sums[Rows][Vectors];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) {
      sums[r][v] = load(accumulator + r * block.stride + v * kLanes);
    }
  }
  const int prefetched_bytes = d == 0 ? values.prefetched_bytes : 0;
  for (int j = first; j < last; ++j) {
    if (prefetched_bytes) prefetch_row(values.rows[j + kLookAhead], prefetched_bytes);
    Lanes value[Vectors];
    if constexpr (Vectors == 1) {
      value[0] = load_cached<kind>(values.rows[j], d, values.D);
    } else {
      const auto* source =
          static_cast<const typename CacheElement<kind>::Type*>(values.rows[j]) + d;
      for (int v = 0; v < Vectors; ++v) value[v] = load_elements<kind>(source + v * kLanes);
    }
    for (int r = 0; r < Rows; ++r) {
      const Lanes weight = broadcast(weights[r * kKeyBlock + j]);
      for (int v = 0; v < Vectors; ++v) sums[r][v] = multiply_add(weight, value[v], sums[r][v]);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) {
      store(accumulator + r * block.stride + v * kLanes, sums[r][v]);
    }
  }
}

template <CacheKind kind, int Rows>
void weigh_range(const AttendBlock& block, const ValueRows& values, int row, int first, int last) {
  if (first >= last) return;
  int d = 0;
  if constexpr (kChannelVectors > 1) {
    for (; d + kChannelVectors * kLanes <= values.D; d += kChannelVectors * kLanes) {
      weigh_channels<kind, Rows, kChannelVectors>(block, values, row, first, last, d);
    }
  }
  for (; d < values.D; d += kLanes) {
    weigh_channels<kind, Rows, 1>(block, values, row, first, last, d);
  }
}

// Rows that see different positions share only those that all of them see: a weight of zero would
// not silence a NaN.
template <CacheKind kind, int Rows>
void weigh_rows(const AttendBlock& block, const ValueRows& values, int row) {
  int first = 0, last = kKeyBlock;
  for (int r = row; r < row + Rows; ++r) {
    if (block.first[r] > first) first = block.first[r];
    if (block.last[r] < last) last = block.last[r];
  }
  if (first >= last) {
    for (int r = row; r < row + Rows; ++r) {
      weigh_range<kind, 1>(block, values, r, block.first[r], block.last[r]);
    }
    return;
  }
  for (int r = row; r < row + Rows; ++r) {
    weigh_range<kind, 1>(block, values, r, block.first[r], first);
  }
  weigh_range<kind, Rows>(block, values, row, first, last);
  for (int r = row; r < row + Rows; ++r) {
    weigh_range<kind, 1>(block, values, r, last, block.last[r]);
  }
}

template <CacheKind kind, int Rows>
void attend_few(const AttendBlock& block) {
  score_columns<kind, Rows>(block);
  for (int row = 0; row < Rows; ++row) softmax_row(block, row);
  weigh_rows<kind, Rows>(block, {block.values, block.D, row_bytes<kind>(block.D)}, 0);
}

template <int Rows>
struct RowCount {
  static constexpr int value = Rows;
};

// Calls tile(RowCount<n>, row) for tiles of kRowTile rows, and once for the remaining ones.
template <typename Tile>
inline void for_tiles(int rows, Tile tile) {
  int row = 0;
  for (; row + kRowTile <= rows; row += kRowTile) tile(RowCount<kRowTile>{}, row);
  if (rows - row == 3) tile(RowCount<3>{}, row);
  if (rows - row == 2) tile(RowCount<2>{}, row);
  if (rows - row == 1) tile(RowCount<1>{}, row);
}

template <CacheKind kind>
void attend_many(const AttendBlock& block) {
  transpose_keys<kind>(block);
  for_tiles(block.rows, [&](auto count, int row) { score_rows<count.value>(block, row); });
  for (int row = 0; row < block.rows; ++row) softmax_row(block, row);
  const void* rows[kKeyBlock];
  for (int j = block.begin; j < block.end; ++j) {
    prefetch_row(block.values[j + kLookAhead], row_bytes<kind>(block.D));
    float* wide = block.value_scratch + j * block.stride;
    for (int d = 0; d < block.D; d += kLanes) {
      store(wide + d, load_cached<kind>(block.values[j], d, block.D));
    }
    rows[j] = wide;
  }
  const ValueRows values = {rows, block.stride, 0};
  for_tiles(block.rows, [&](auto count, int row) {
    weigh_rows<CacheKind::f32, count.value>(block, values, row);
  });
}

template <CacheKind kind>
void attend_block(const AttendBlock& block) {
  switch (block.rows) {
    case 1:
      return attend_few<kind, 1>(block);
    case 2:
      return attend_few<kind, 2>(block);
    case 3:
      return attend_few<kind, 3>(block);
    case 4:
      return attend_few<kind, 4>(block);
    default:
      return attend_many<kind>(block);
  }
}

inline void attend_block(const AttendBlock& block) {
  switch (block.kind) {
    case CacheKind::f32:
      return attend_block<CacheKind::f32>(block);
    case CacheKind::bf16:
      return attend_block<CacheKind::bf16>(block);
    case CacheKind::f16:
      return attend_block<CacheKind::f16>(block);
    case CacheKind::fp8:
      return attend_block<CacheKind::fp8>(block);
  }
}

// x / sqrt(mean(x^2) + eps) * (weight + offset), in place.
inline void norm_head(float* x, const float* weight, int D, float eps, float offset) {
  Lanes squares = zero();
  for (int d = 0; d < D; d += kLanes) {
    const Lanes value = load_part(x + d, D - d);
    squares = multiply_add(value, value, squares);
  }
  const float mean = sum_lanes(squares) / static_cast<float>(D);
  const Lanes factor = broadcast(1.0f / __builtin_sqrtf(mean + eps));
  for (int d = 0; d < D; d += kLanes) {
    const Lanes weights = add(load_part(weight + d, D - d), broadcast(offset));
    store_part(x + d, multiply(multiply(load_part(x + d, D - d), factor), weights), D - d);
  }
}

// In place. `cos` and `sin` hold one entry per pair, or per channel with the sine's sign where
// interleaved.
inline void rotate_head(float* x, const float* cos, const float* sin, int rotary_dim,
                        bool interleaved) {
  if (interleaved) {
    for (int d = 0; d < rotary_dim; d += kLanes) {
      const int count = rotary_dim - d;
      const Lanes value = load_part(x + d, count);
      const Lanes turned = multiply(swap_pairs(value), load_part(sin + d, count));
      store_part(x + d, multiply_add(value, load_part(cos + d, count), turned), count);
    }
    return;
  }
  const int half = rotary_dim / 2;
  for (int d = 0; d < half; d += kLanes) {
    const int count = half - d;
    const Lanes low = load_part(x + d, count), high = load_part(x + half + d, count);
    const Lanes c = load_part(cos + d, count), s = load_part(sin + d, count);
    store_part(x + d, subtract(multiply(low, c), multiply(high, s)), count);
    store_part(x + half + d, multiply_add(high, c, multiply(low, s)), count);
  }
}

template <CacheKind kind>
void store_cached(const float* x, float scale, void* row, int D) {
  using Element = typename CacheElement<kind>::Type;
  Element* target = static_cast<Element*>(row);
  for (int d = 0; d < D; d += kLanes) {
    Lanes value = load_part(x + d, D - d);
    if constexpr (kind == CacheKind::fp8) value = divide(value, broadcast(scale));
    if (d + kLanes <= D) {
      store_elements<kind>(target + d, value);
      continue;
    }
    Element part[kLanes];
    store_elements<kind>(part, value);
    for (int i = 0; i < D - d; ++i) target[d + i] = part[i];
  }
}

template <CacheKind kind>
void append_tokens(const AppendTokens& task, int64_t begin, int64_t end) {
  using Element = typename CacheElement<kind>::Type;
  const int D = task.D, half = task.rotary_dim / 2;
  float pair_cos[kMaxHeadDim], pair_sin[kMaxHeadDim], head[kMaxHeadDim];
  for (int64_t t = begin; t < end; ++t) {
    const float* cos = task.cos + t * half;
    const float* sin = task.sin + t * half;
    if (task.interleaved) {
      for (int i = 0; i < half; ++i) {
        pair_cos[2 * i] = pair_cos[2 * i + 1] = cos[i];
        pair_sin[2 * i] = -sin[i];
        pair_sin[2 * i + 1] = sin[i];
      }
      cos = pair_cos;
      sin = pair_sin;
    }
    for (int h = 0; h < task.heads; ++h) {
      float* query = task.query + (t * task.heads + h) * D;
      if (task.query_norm) norm_head(query, task.query_norm, D, task.norm_eps, task.norm_offset);
      rotate_head(query, cos, sin, task.rotary_dim, task.interleaved);
    }
    const int64_t page = task.slots[t] / task.page_size, offset = task.slots[t] % task.page_size;
    for (int h = 0; h < task.kv_heads; ++h) {
      const int64_t source = (t * task.kv_heads + h) * D;
      const int64_t target = ((page * task.kv_heads + h) * task.page_size + offset) * D;
      for (int d = 0; d < D; d += kLanes) {
        store_part(head + d, load_part(task.key + source + d, D - d), D - d);
      }
      if (task.key_norm) norm_head(head, task.key_norm, D, task.norm_eps, task.norm_offset);
      rotate_head(head, cos, sin, task.rotary_dim, task.interleaved);
      store_cached<kind>(head, task.key_scale ? task.key_scale[h] : 1.0f,
                         static_cast<Element*>(task.key_cache) + target, D);
      store_cached<kind>(task.value + source, task.value_scale ? task.value_scale[h] : 1.0f,
                         static_cast<Element*>(task.value_cache) + target, D);
    }
  }
}

inline void append_tokens(const AppendTokens& task, int64_t begin, int64_t end) {
  switch (task.kind) {
    case CacheKind::f32:
      return append_tokens<CacheKind::f32>(task, begin, end);
    case CacheKind::bf16:
      return append_tokens<CacheKind::bf16>(task, begin, end);
    case CacheKind::f16:
      return append_tokens<CacheKind::f16>(task, begin, end);
    case CacheKind::fp8:
      return append_tokens<CacheKind::fp8>(task, begin, end);
  }
}

}  // namespace
}  // namespace fewbits
