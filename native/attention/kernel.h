// Attention in float32, written once over the sixteen lanes of elementwise/lanes.h; each tier's
// file includes this and is compiled with its own flags. See attention.h for the order of
// accumulation.
#pragma once

#include <stdint.h>

#include "attention/attention.h"
#include "attention/cached.h"
#include "elementwise/lanes.h"

namespace fewbits {
namespace {

// Calls use(d, column) for `count` channels from d on, in order; `column` holds that channel of 16
// keys.
template <CacheKind kind, typename Use>
FEWBITS_INLINE void each_column_of_tile(const AttendChunk& chunk, int group, int d, int count,
                                        Use use) {
  Lanes tile[kLanes];
  if constexpr (kind == CacheKind::bf16) {
    // Pairs of channels are transposed as they are: half the shuffles.
    for (int i = 0; i < kLanes; ++i) {
      tile[i] = load_bytes(static_cast<const uint16_t*>(chunk.keys[group + i]) + d, 2 * count);
    }
    transpose(tile);
    for (int c = 0; c < kLanes; ++c) {
      if (2 * c < count) use(d + 2 * c, low_bf16(tile[c]));
      if (2 * c + 1 < count) use(d + 2 * c + 1, high_bf16(tile[c]));
    }
  } else {
    for (int i = 0; i < kLanes; ++i) {
      tile[i] = load_cached<kind>(chunk.keys[group + i], d, d + count);
    }
    transpose(tile);
    for (int c = 0; c < kLanes; ++c) {
      if (c < count) use(d + c, tile[c]);
    }
  }
}

template <CacheKind kind, typename Use>
FEWBITS_INLINE void each_column(const AttendChunk& chunk, int group, Use use) {
  constexpr int kTile = kind == CacheKind::bf16 ? 2 * kLanes : kLanes;
  int d = 0;
  for (; d + kTile <= chunk.D; d += kTile) each_column_of_tile<kind>(chunk, group, d, kTile, use);
  if (d < chunk.D) each_column_of_tile<kind>(chunk, group, d, chunk.D - d, use);
}

// For few rows: scores straight from the columns.
template <CacheKind kind, int Rows>
void score_columns(const AttendChunk& chunk) {
  for (int group = chunk.begin / kLanes * kLanes; group < chunk.end; group += kLanes) {
    prefetch_keys<kind>(chunk, group);
    Lanes sums[Rows];
    for (int r = 0; r < Rows; ++r) sums[r] = zero();
    each_column<kind>(chunk, group, [&](int d, Lanes column) __attribute__((always_inline)) {
      for (int r = 0; r < Rows; ++r) {
        sums[r] = multiply_add(broadcast(chunk.query[r * chunk.stride + d]), column, sums[r]);
      }
    });
    for (int r = 0; r < Rows; ++r) {
      store(chunk.score_scratch + r * kChunk + group, scaled_scores(chunk, group, sums[r]));
    }
  }
}

inline float* key_block(const AttendChunk& chunk, int position) {
  return chunk.key_scratch + position / kKeyBlock * kKeyBlock * chunk.stride + position % kKeyBlock;
}

// For many rows: the keys first, then tiles of rows.
template <CacheKind kind>
void transpose_keys(const AttendChunk& chunk) {
  for (int group = chunk.begin / kLanes * kLanes; group < chunk.end; group += kLanes) {
    prefetch_keys<kind>(chunk, group);
    float* columns = key_block(chunk, group);
    each_column<kind>(chunk, group, [&](int d, Lanes column) __attribute__((always_inline)) {
      store(columns + d * kKeyBlock, column);
    });
  }
}

template <int Rows>
void score_rows(const AttendChunk& chunk, int row, int last) {
  constexpr int kStep = kKeyVectors * kLanes;
  const float* query = chunk.query + row * chunk.stride;
  for (int j = chunk.begin / kStep * kStep; j < last; j += kStep) {
    Lanes sums[Rows][kKeyVectors];
    for (int r = 0; r < Rows; ++r) {
      for (int v = 0; v < kKeyVectors; ++v) sums[r][v] = zero();
    }
    const float* keys = key_block(chunk, j);
    for (int d = 0; d < chunk.D; ++d, keys += kKeyBlock) {
      Lanes key[kKeyVectors];
      for (int v = 0; v < kKeyVectors; ++v) key[v] = load(keys + v * kLanes);
      for (int r = 0; r < Rows; ++r) {
        const Lanes q = broadcast(query[r * chunk.stride + d]);
        for (int v = 0; v < kKeyVectors; ++v) sums[r][v] = multiply_add(q, key[v], sums[r][v]);
      }
    }
    for (int r = 0; r < Rows; ++r) {
      float* scores = chunk.score_scratch + (row + r) * kChunk + j;
      for (int v = 0; v < kKeyVectors; ++v) {
        store(scores + v * kLanes, scaled_scores(chunk, j + v * kLanes, sums[r][v]));
      }
    }
  }
}

// Scores become exponentials, times their values' scales.
inline void softmax_row(const AttendChunk& chunk, int row, float& row_maximum, float& row_sum) {
  const int first = chunk.first[row], last = chunk.last[row];
  row_maximum = -__builtin_inff();
  row_sum = 0.0f;
  if (first >= last) return;
  float* scores = chunk.score_scratch + row * kChunk;
  const int group_begin = first / kLanes * kLanes;
  const Lanes hidden = broadcast(-__builtin_inff());
  Lanes largest = hidden;
  for (int j = group_begin; j < last; j += kLanes) {
    const Lanes score = select_range(load(scores + j), first - j, last - j, hidden);
    store(scores + j, score);
    largest = maximum(largest, score);
  }
  row_maximum = maximum_lanes(largest);
  Lanes sums = zero();
  for (int j = group_begin; j < last; j += kLanes) {
    Lanes weight = exp_lanes(subtract(load(scores + j), broadcast(row_maximum)));
    sums = add(sums, weight);
    if (chunk.value_scales) weight = multiply(weight, load(chunk.value_scales + j));
    store(scores + j, weight);
  }
  row_sum = sum_lanes(sums);
}

// The values that are weighed: the cache's own, or for many rows a copy of them in f32.
struct ValueRows {
  const void* const* rows;  // [kChunk], and kLookAhead more of the cache's own
  int D;
  int prefetched_bytes;  // of the rows kLookAhead positions later; 0 for the copy
};

// Several vectors are whole ones; a single one may be the end of a row.
template <CacheKind kind, int Rows, int Vectors>
void weigh_channels(const AttendChunk& chunk, const ValueRows& values, int row, int first, int last,
                    int d) {
  float* accumulator = chunk.accumulator_scratch + row * chunk.value_stride + d;
  const float* weights = chunk.score_scratch + row * kChunk;
  Lanes sums[Rows][Vectors];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) {
      sums[r][v] = load(accumulator + r * chunk.value_stride + v * kLanes);
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
      const Lanes weight = broadcast(weights[r * kChunk + j]);
      for (int v = 0; v < Vectors; ++v) sums[r][v] = multiply_add(weight, value[v], sums[r][v]);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) {
      store(accumulator + r * chunk.value_stride + v * kLanes, sums[r][v]);
    }
  }
}

template <CacheKind kind, int Rows>
void weigh_range(const AttendChunk& chunk, const ValueRows& values, int row, int first, int last) {
  if (first >= last) return;
  int d = 0;
  if constexpr (kChannelVectors > 1) {
    for (; d + kChannelVectors * kLanes <= values.D; d += kChannelVectors * kLanes) {
      weigh_channels<kind, Rows, kChannelVectors>(chunk, values, row, first, last, d);
    }
  }
  for (; d < values.D; d += kLanes) {
    weigh_channels<kind, Rows, 1>(chunk, values, row, first, last, d);
  }
}

// Rows that see different positions share only those that all of them see: a weight of zero would
// not silence a NaN.
template <CacheKind kind, int Rows>
void weigh_rows(const AttendChunk& chunk, const ValueRows& values, int row) {
  int first = 0, last = kChunk;
  for (int r = row; r < row + Rows; ++r) {
    if (chunk.first[r] > first) first = chunk.first[r];
    if (chunk.last[r] < last) last = chunk.last[r];
  }
  if (first >= last) {
    for (int r = row; r < row + Rows; ++r) {
      weigh_range<kind, 1>(chunk, values, r, chunk.first[r], chunk.last[r]);
    }
    return;
  }
  for (int r = row; r < row + Rows; ++r) {
    weigh_range<kind, 1>(chunk, values, r, chunk.first[r], first);
  }
  weigh_range<kind, Rows>(chunk, values, row, first, last);
  for (int r = row; r < row + Rows; ++r) {
    weigh_range<kind, 1>(chunk, values, r, last, chunk.last[r]);
  }
}

// A tile of rows whose scores are there, into its total.
template <CacheKind kind, int Rows>
void attend_rows(const AttendChunk& chunk, const ValueRows& values, int row) {
  const int64_t start = static_cast<int64_t>(row) * chunk.value_stride;
  float maxima[Rows], sums[Rows];
  for (int r = 0; r < Rows; ++r) softmax_row(chunk, row + r, maxima[r], sums[r]);
  float* accumulator = chunk.accumulator_scratch + start;
  for (int i = 0; i < Rows * chunk.value_stride; i += kLanes) store(accumulator + i, zero());
  weigh_rows<kind, Rows>(chunk, values, row);
  const Running& total = chunk.total;
  merge_parts({total.maximum + row, total.sum + row, total.accumulator + start},
              {maxima, sums, accumulator}, Rows, chunk.value_stride);
}

template <CacheKind kind, int Rows>
void attend_few(const AttendChunk& chunk) {
  score_columns<kind, Rows>(chunk);
  attend_rows<kind, Rows>(chunk, {chunk.values, chunk.value_D, row_bytes<kind>(chunk.value_D)}, 0);
}

template <CacheKind kind>
void attend_many(const AttendChunk& chunk) {
  transpose_keys<kind>(chunk);
  const void* rows[kChunk];
  for (int j = chunk.begin; j < chunk.end; ++j) {
    prefetch_row(chunk.values[j + kLookAhead], row_bytes<kind>(chunk.value_D));
    float* wide = chunk.value_scratch + j * chunk.value_stride;
    for (int d = 0; d < chunk.value_D; d += kLanes) {
      store(wide + d, load_cached<kind>(chunk.values[j], d, chunk.value_D));
    }
    rows[j] = wide;
  }
  const ValueRows values = {rows, chunk.value_stride, 0};
  for_tiles(chunk.rows, [&](auto count, int row) {
    int last = chunk.begin;
    for (int r = row; r < row + count.value; ++r) {
      if (chunk.last[r] > last) last = chunk.last[r];
    }
    score_rows<count.value>(chunk, row, last);
    attend_rows<CacheKind::f32, count.value>(chunk, values, row);
  });
}

template <CacheKind kind>
void attend_chunk(const AttendChunk& chunk) {
  switch (chunk.rows) {
    case 1:
      return attend_few<kind, 1>(chunk);
    case 2:
      return attend_few<kind, 2>(chunk);
    case 3:
      return attend_few<kind, 3>(chunk);
    case 4:
      return attend_few<kind, 4>(chunk);
    default:
      return attend_many<kind>(chunk);
  }
}

inline void attend_chunk(const AttendChunk& chunk) {
  switch (chunk.kind) {
    case CacheKind::f32:
      return attend_chunk<CacheKind::f32>(chunk);
    case CacheKind::bf16:
      return attend_chunk<CacheKind::bf16>(chunk);
    case CacheKind::f16:
      return attend_chunk<CacheKind::f16>(chunk);
    case CacheKind::fp8:
      return attend_chunk<CacheKind::fp8>(chunk);
    case CacheKind::int8:
      return attend_chunk<CacheKind::int8>(chunk);
  }
}

}  // namespace
}  // namespace fewbits
