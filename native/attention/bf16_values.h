// Weights and values on the bf16 dot product: the softmax, and p v in pairs of positions. For tier
// files with AVX-512 BF16 and VBMI; see attention_avx512_bf16.cc.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "attention/attention.h"
#include "attention/bf16_codes.h"
#include "attention/bf16_scores.h"
#include "attention/cached.h"
#include "elementwise/lanes.h"

namespace fewbits {
namespace {

constexpr int kWeighVectors = 4;

// 2^x, for x at most about 0; the relative error is below 2^-18, that of rounding to bf16 2^-8.
FEWBITS_INLINE Lanes exp2_lanes(Lanes x) {
  constexpr int kFloor = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  const Lanes r = _mm512_reduce_ps(x, kFloor);  // x - floor(x)
  Lanes p = broadcast(0x1.b7f734p-7f);
  p = multiply_add(p, r, broadcast(0x1.abf868p-5f));
  p = multiply_add(p, r, broadcast(0x1.ee2452p-3f));
  p = multiply_add(p, r, broadcast(0x1.62d6c6p-1f));
  p = multiply_add(p, r, broadcast(1.0f));
  return _mm512_scalef_ps(p, x);  // times 2^floor(x)
}

FEWBITS_INLINE Lanes visible_score(const float* scores, int j, int first, int last) {
  return select_range(load(scores + j), first - j, last - j, broadcast(-__builtin_inff()));
}

constexpr int kWeightStep = 2 * kLanes;  // positions whose weights are rounded together

// Scores times their keys' scales, and -infinity where the row sees nothing. Returns the largest.
inline float finish_scores(const AttendChunk& chunk, int row) {
  const int first = chunk.first[row], last = chunk.last[row];
  const Lanes hidden = broadcast(-__builtin_inff());
  if (first >= last) return -__builtin_inff();
  float* scores = scores_of(chunk, row);
  const int begin = first / kWeightStep * kWeightStep;
  if (chunk.key_scales) {
    for (int j = begin; j < last; j += kLanes) {
      store(scores + j, multiply(load(scores + j), load(chunk.key_scales + j)));
    }
  }
  // Groups at the ends hold positions that the row doesn't see.
  const auto hide = [&](int from, int to) {
    for (int j = from; j < to; j += kLanes) {
      store(scores + j, select_range(load(scores + j), first - j, last - j, hidden));
    }
  };
  hide(begin, (first + kLanes - 1) / kLanes * kLanes);
  hide(last / kLanes * kLanes, (last + kWeightStep - 1) / kWeightStep * kWeightStep);
  Lanes largest = hidden, larger = hidden;
  for (int j = begin; j < last; j += kWeightStep) {
    largest = maximum(largest, load(scores + j));
    larger = maximum(larger, load(scores + j + kLanes));
  }
  return maximum_lanes(maximum(largest, larger));
}

// Scores become weights: exponentials, times their values' scales, in bf16. Returns the sum of the
// exponentials.
inline float weights_of_scores(const AttendChunk& chunk, int row, float row_maximum) {
  const int first = chunk.first[row], last = chunk.last[row];
  if (first >= last) return 0.0f;
  const float* scores = scores_of(chunk, row);
  uint32_t* weights = weights_of(chunk, row);
  const Lanes log2_e = broadcast(kLog2E), offset = broadcast(-row_maximum * kLog2E);
  const Pairs ones = _mm512_set1_epi32(0x3f803f80);
  Lanes sums = zero();
  for (int j = first / kWeightStep * kWeightStep; j < last; j += kWeightStep) {
    Lanes low = exp2_lanes(multiply_add(load(scores + j), log2_e, offset));
    Lanes high = exp2_lanes(multiply_add(load(scores + j + kLanes), log2_e, offset));
    Pairs rounded = (Pairs)_mm512_cvtne2ps_pbh(high, low);
    sums = dot(rounded, ones, sums);
    if (chunk.value_scales) {
      low = multiply(low, load(chunk.value_scales + j));
      high = multiply(high, load(chunk.value_scales + j + kLanes));
      rounded = (Pairs)_mm512_cvtne2ps_pbh(high, low);
    }
    _mm512_store_si512(weights + j / 2, rounded);
  }
  return sum_lanes(sums);
}

// Pairs of values out of value_scratch.
struct PairedValues {
  const AttendChunk& chunk;

  template <int Vectors>
  FEWBITS_INLINE void load(int pair, int d, Pairs* values) const {
    const uint32_t* source = value_pairs(chunk, pair) + d;
    for (int v = 0; v < Vectors; ++v) values[v] = _mm512_load_si512(source + v * kLanes);
  }
};

// Pairs of values out of the cache. `end`: beside the last of an odd number of positions its own.
// Every 64 bytes that are asked for begin within the row.
template <CacheKind kind>
struct CachedValues {
  const void* const* rows;
  int D, end;

  template <int Vectors>
  FEWBITS_INLINE void load(int pair, int d, Pairs* values) const {
    constexpr int kBytes = element_size(kind);
    constexpr int kTile = 64 / kBytes;
    const int j = 2 * pair;
    const char* even = static_cast<const char*>(rows[j]);
    const char* odd = static_cast<const char*>(rows[j + 1 < end ? j + 1 : j]);
    if (d == 0) {
      prefetch_row(rows[j + kLookAhead], D * kBytes);
      prefetch_row(rows[j + 1 + kLookAhead], D * kBytes);
    }
    for (int v = 0; v < Vectors; v += kTile / kLanes) {
      const int first = d + v * kLanes, bytes = (D - first) * kBytes;
      const Pairs a = _mm512_castps_si512(load_bytes(even + first * kBytes, bytes));
      const Pairs b = _mm512_castps_si512(load_bytes(odd + first * kBytes, bytes));
      Pairs pairs[kTile / kLanes];
      pair_rows<kind>(a, b, pairs);
      for (int i = 0; i < kTile / kLanes && v + i < Vectors; ++i) values[v + i] = pairs[i];
    }
  }
};

template <CacheKind kind>
inline void pair_values(const AttendChunk& chunk) {
  const CachedValues<kind> cached{chunk.values, chunk.value_D, chunk.end};
  constexpr int kVectors = 64 / element_size(kind) / kLanes;
  const int stride = chunk.value_stride;
  for (int pair = chunk.begin / 2; 2 * pair < chunk.end; ++pair) {
    uint32_t* target = value_pairs(chunk, pair);
    for (int d = 0; d < stride; d += kVectors * kLanes) {
      Pairs values[kVectors];
      cached.template load<kVectors>(pair, d, values);
      for (int v = 0; v < kVectors; ++v) {
        if (d + v * kLanes < stride) _mm512_store_si512(target + d + v * kLanes, values[v]);
      }
    }
  }
}

// `kept`: the halves of a single row's pairs that count; the others are not touched by a
// multiplication.
template <int Rows, int Vectors, typename Values>
FEWBITS_INLINE void weigh_tile(const AttendChunk& chunk, const Values& source, int row,
                               int pair_begin, int pair_end, int d, uint32_t kept) {
  float* accumulator = chunk.accumulator_scratch + row * chunk.value_stride + d;
  const uint32_t* weights = weights_of(chunk, row);
  Lanes sums[Rows][Vectors];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) {
      sums[r][v] = load(accumulator + r * chunk.value_stride + v * kLanes);
    }
  }
  for (int pair = pair_begin; pair < pair_end; ++pair) {
    Pairs value[Vectors];
    source.template load<Vectors>(pair, d, value);
    if constexpr (Rows == 1) {
      for (int v = 0; v < Vectors; ++v) value[v] = _mm512_and_si512(value[v], broadcast_pair(kept));
    }
    for (int r = 0; r < Rows; ++r) {
      const uint32_t both = weights[r * kChunk + pair];
      const Pairs weight = broadcast_pair(Rows == 1 ? both & kept : both);
      for (int v = 0; v < Vectors; ++v) sums[r][v] = dot(value[v], weight, sums[r][v]);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) {
      store(accumulator + r * chunk.value_stride + v * kLanes, sums[r][v]);
    }
  }
}

template <int Rows, typename Values>
inline void weigh_pairs(const AttendChunk& chunk, const Values& source, int row, int pair_begin,
                        int pair_end, uint32_t kept = ~uint32_t{0}) {
  if (pair_begin >= pair_end) return;
  // At most 16 sums: with the values that they share, more are not kept in registers.
  constexpr int kVectors = Rows > kRowTile ? kWeighVectors / 2 : kWeighVectors;
  int d = 0;
  for (; d + kVectors * kLanes <= chunk.value_stride; d += kVectors * kLanes) {
    weigh_tile<Rows, kVectors>(chunk, source, row, pair_begin, pair_end, d, kept);
  }
  const int left = (chunk.value_stride - d) / kLanes;
  if (left == 1) weigh_tile<Rows, 1>(chunk, source, row, pair_begin, pair_end, d, kept);
  if constexpr (kVectors == kWeighVectors) {
    if (left == 2) weigh_tile<Rows, 2>(chunk, source, row, pair_begin, pair_end, d, kept);
    if (left == 3) weigh_tile<Rows, 3>(chunk, source, row, pair_begin, pair_end, d, kept);
  }
}

// A row's own positions [begin, end); a pair may be half of them.
template <typename Values>
inline void weigh_alone(const AttendChunk& chunk, const Values& source, int row, int begin,
                        int end) {
  if (begin < end && begin % 2) {
    weigh_pairs<1>(chunk, source, row, begin / 2, begin / 2 + 1, 0xffff0000);
    ++begin;
  }
  weigh_pairs<1>(chunk, source, row, begin / 2, end / 2);
  if (begin < end && end % 2) {
    weigh_pairs<1>(chunk, source, row, end / 2, end / 2 + 1, 0x0000ffff);
  }
}

// Rows share the pairs that all of them see.
template <int Rows, typename Values>
inline void weigh_shared(const AttendChunk& chunk, const Values& source, int row) {
  int first = 0, last = kChunk;
  for (int r = row; r < row + Rows; ++r) {
    if (chunk.first[r] > first) first = chunk.first[r];
    if (chunk.last[r] < last) last = chunk.last[r];
  }
  const int pair_begin = (first + 1) / 2, pair_end = last / 2;
  if (pair_begin >= pair_end) {
    for (int r = row; r < row + Rows; ++r) {
      weigh_alone(chunk, source, r, chunk.first[r], chunk.last[r]);
    }
    return;
  }
  for (int r = row; r < row + Rows; ++r) {
    weigh_alone(chunk, source, r, chunk.first[r], 2 * pair_begin);
  }
  weigh_pairs<Rows>(chunk, source, row, pair_begin, pair_end);
  for (int r = row; r < row + Rows; ++r) {
    weigh_alone(chunk, source, r, 2 * pair_end, chunk.last[r]);
  }
}

}  // namespace
}  // namespace fewbits
