// Attention on the bf16 dot product, for caches whose codes are exact in bf16. Numbers go in pairs,
// as VDPBF16PS takes them: of channels for q k^T, of positions for the values. The order of
// accumulation is that of attention.h.
//
// Few rows use keys and values as soon as they are paired, in registers. For many rows they are
// paired once per chunk, into
//
//     key_scratch    blocks of 64 positions   [pair of channels][64 positions]
//     value_scratch  [pair of positions][stride channels]
//
// and rows take turns in groups: a block of keys or values and the scores of a group stay in the
// first-level cache.
#include "attention/append.h"
#include "attention/bf16_codes.h"
#include "attention/kernel.h"

namespace fewbits {
namespace {

constexpr int kRowGroup = 16;
constexpr int kBlockVectors = kKeyBlock / kLanes;  // 4 x 4 accumulators hide a product's latency
constexpr int kWeighVectors = 4;

using Pairs = __m512i;

FEWBITS_INLINE Lanes dot(Pairs a, Pairs b, Lanes sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

FEWBITS_INLINE Pairs broadcast_pair(uint32_t pair) {
  return _mm512_set1_epi32(static_cast<int>(pair));
}

// Which channels pair up is the keys' matter: queries follow.
void prepare_queries(CacheKind kind, float* query, int rows, int stride) {
  if (kind == CacheKind::f32 || kind == CacheKind::f16) return;
  const __m256i order =
      element_size(kind) == 1
          ? _mm256_setr_epi16(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15)
          : _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int r = 0; r < rows; ++r, query += stride) {
    uint16_t* rounded = reinterpret_cast<uint16_t*>(query);
    for (int d = 0; d < stride; d += kLanes) {
      const __m256i codes = (__m256i)_mm512_cvtneps_pbh(load(query + d));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(rounded + d),
                          _mm256_permutexvar_epi16(order, codes));
    }
  }
}

const uint32_t* query_pairs(const AttendChunk& chunk, int row) {
  return reinterpret_cast<const uint32_t*>(chunk.query + row * chunk.stride);
}

uint32_t* key_pairs(const AttendChunk& chunk, int position) {
  return reinterpret_cast<uint32_t*>(chunk.key_scratch) +
         position / kKeyBlock * kKeyBlock * (chunk.stride / 2) + position % kKeyBlock;
}

uint32_t* value_pairs(const AttendChunk& chunk, int pair) {
  return reinterpret_cast<uint32_t*>(chunk.value_scratch) + pair * chunk.stride;
}

float* scores_of(const AttendChunk& chunk, int row) {
  return chunk.score_scratch + row % kRowGroup * kChunk;
}

// The weights of a row, by pair of positions, take the place of its scores.
uint32_t* weights_of(const AttendChunk& chunk, int row) {
  return reinterpret_cast<uint32_t*>(scores_of(chunk, row));
}

// Calls use(pair, column) for every pair of channels, in order; `column` holds it of 16 keys.
template <CacheKind kind, typename Use>
FEWBITS_INLINE void each_pair_column(const AttendChunk& chunk, int group, Use use) {
  constexpr int kBytes = element_size(kind);
  constexpr int kPairs = 2 / kBytes;  // of channels in 32 bits
  const void* const* keys = chunk.keys + group;
  const int D = chunk.D, stride = chunk.stride;
  prefetch_keys<kind>(chunk, group);
  for (int d = 0; d < stride; d += 64 / kBytes) {
    Lanes tile[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      tile[i] = load_bytes(static_cast<const char*>(keys[i]) + d * kBytes, (D - d) * kBytes);
    }
    transpose(tile);
    const int left = (stride - d) * kBytes / 4;
    // Unrolled, it keeps the tile in registers.
#pragma GCC unroll 16
    for (int c = 0; c < kLanes; ++c) {
      if (c >= left) continue;
      const Pairs codes = _mm512_castps_si512(tile[c]);
      if constexpr (kind == CacheKind::bf16) {
        use(d / 2 + c, codes);
      } else {
        const BytePairs pairs = decode_bytes<kind>(codes);
        use(d / 2 + kPairs * c, pairs.even);
        use(d / 2 + kPairs * c + 1, pairs.odd);
      }
    }
  }
}

template <CacheKind kind, int Rows>
void score_few(const AttendChunk& chunk) {
  for (int group = chunk.begin / kLanes * kLanes; group < chunk.end; group += kLanes) {
    Lanes sums[Rows];
    for (int r = 0; r < Rows; ++r) sums[r] = zero();
    each_pair_column<kind>(
        chunk, group, [&](int pair, Pairs column) __attribute__((always_inline)) {
          for (int r = 0; r < Rows; ++r) {
            sums[r] = dot(column, broadcast_pair(query_pairs(chunk, r)[pair]), sums[r]);
          }
        });
    for (int r = 0; r < Rows; ++r) {
      store(scores_of(chunk, r) + group, sums[r]);
    }
  }
}

template <CacheKind kind>
void pair_keys(const AttendChunk& chunk) {
  for (int group = chunk.begin / kLanes * kLanes; group < chunk.end; group += kLanes) {
    uint32_t* columns = key_pairs(chunk, group);
    each_pair_column<kind>(chunk, group,
                           [&](int pair, Pairs column) __attribute__((always_inline)) {
                             _mm512_store_si512(columns + pair * kKeyBlock, column);
                           });
  }
}

// Scores of `Rows` rows and 16 * Vectors positions from j on, within a block.
template <int Rows, int Vectors>
void score_tile(const AttendChunk& chunk, int row, int j) {
  Lanes sums[Rows][Vectors];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) sums[r][v] = zero();
  }
  const uint32_t* keys = key_pairs(chunk, j);
  const uint32_t* query = query_pairs(chunk, row);
  for (int pair = 0; pair < chunk.stride / 2; ++pair, keys += kKeyBlock) {
    Pairs key[Vectors];
    for (int v = 0; v < Vectors; ++v) key[v] = _mm512_load_si512(keys + v * kLanes);
    for (int r = 0; r < Rows; ++r) {
      const Pairs q = broadcast_pair(query[r * chunk.stride + pair]);
      for (int v = 0; v < Vectors; ++v) sums[r][v] = dot(key[v], q, sums[r][v]);
    }
  }
  float* scores = scores_of(chunk, row) + j;
  // Left as loops, they would make of the sums an array in memory.
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) store(scores + r * kChunk + v * kLanes, sums[r][v]);
  }
}

// Positions [begin, end) of a block, begin being a multiple of 16.
template <int Rows>
void score_block(const AttendChunk& chunk, int row, int begin, int end) {
  switch ((end - begin + kLanes - 1) / kLanes) {
    case 1:
      return score_tile<Rows, 1>(chunk, row, begin);
    case 2:
      return score_tile<Rows, 2>(chunk, row, begin);
    case 3:
      return score_tile<Rows, 3>(chunk, row, begin);
    case kBlockVectors:
      return score_tile<Rows, kBlockVectors>(chunk, row, begin);
  }
}

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

// Scores become weights: exponentials, times their values' scales, in bf16.
void weights_of_row(const AttendChunk& chunk, int row, float& row_maximum, float& row_sum) {
  constexpr int kStep = 2 * kLanes;
  const int first = chunk.first[row], last = chunk.last[row];
  row_maximum = -__builtin_inff();
  row_sum = 0.0f;
  if (first >= last) return;
  float* scores = scores_of(chunk, row);
  uint32_t* weights = weights_of(chunk, row);
  const int begin = first / kStep * kStep;
  if (chunk.key_scales) {
    for (int j = begin; j < last; j += kLanes) {
      store(scores + j, multiply(load(scores + j), load(chunk.key_scales + j)));
    }
  }
  // Groups at the ends hold positions that the row doesn't see.
  const int whole_begin = (first + kLanes - 1) / kLanes * kLanes,
            whole_end = last / kLanes * kLanes;
  for (int j = begin; j < whole_begin; j += kLanes)
    store(scores + j, visible_score(scores, j, first, last));
  const int ends = (last + kStep - 1) / kStep * kStep;
  for (int j = whole_end; j < ends; j += kLanes)
    store(scores + j, visible_score(scores, j, first, last));
  Lanes largest = load(scores + begin), larger = load(scores + begin + kLanes);
  for (int j = begin + kStep; j < last; j += kStep) {
    largest = maximum(largest, load(scores + j));
    larger = maximum(larger, load(scores + j + kLanes));
  }
  row_maximum = maximum_lanes(maximum(largest, larger));
  const Lanes log2_e = broadcast(kLog2E), offset = broadcast(-row_maximum * kLog2E);
  const Pairs ones = _mm512_set1_epi32(0x3f803f80);
  Lanes sums = zero();
  for (int j = begin; j < last; j += kStep) {
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
  row_sum = sum_lanes(sums);
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
void pair_values(const AttendChunk& chunk) {
  const CachedValues<kind> cached{chunk.values, chunk.D, chunk.end};
  const int stride = chunk.stride;
  for (int pair = chunk.begin / 2; 2 * pair < chunk.end; ++pair) {
    uint32_t* target = value_pairs(chunk, pair);
    for (int d = 0; d < stride; d += kWeighVectors * kLanes) {
      Pairs values[kWeighVectors];
      cached.template load<kWeighVectors>(pair, d, values);
      for (int v = 0; v < kWeighVectors; ++v) {
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
  float* accumulator = chunk.accumulator_scratch + row * chunk.stride + d;
  const uint32_t* weights = weights_of(chunk, row);
  Lanes sums[Rows][Vectors];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) {
      sums[r][v] = load(accumulator + r * chunk.stride + v * kLanes);
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
      store(accumulator + r * chunk.stride + v * kLanes, sums[r][v]);
    }
  }
}

template <int Rows, typename Values>
void weigh_pairs(const AttendChunk& chunk, const Values& source, int row, int pair_begin,
                 int pair_end, uint32_t kept = ~uint32_t{0}) {
  if (pair_begin >= pair_end) return;
  int d = 0;
  for (; d + kWeighVectors * kLanes <= chunk.stride; d += kWeighVectors * kLanes) {
    weigh_tile<Rows, kWeighVectors>(chunk, source, row, pair_begin, pair_end, d, kept);
  }
  switch ((chunk.stride - d) / kLanes) {
    case 1:
      return weigh_tile<Rows, 1>(chunk, source, row, pair_begin, pair_end, d, kept);
    case 2:
      return weigh_tile<Rows, 2>(chunk, source, row, pair_begin, pair_end, d, kept);
    case 3:
      return weigh_tile<Rows, 3>(chunk, source, row, pair_begin, pair_end, d, kept);
  }
}

// A row's own positions [begin, end); a pair may be half of them.
template <typename Values>
void weigh_alone(const AttendChunk& chunk, const Values& source, int row, int begin, int end) {
  if (begin < end && begin % 2) {
    weigh_pairs<1>(chunk, source, row, begin / 2, begin / 2 + 1, 0xffff0000);
    ++begin;
  }
  weigh_pairs<1>(chunk, source, row, begin / 2, end / 2);
  if (begin < end && end % 2) {
    weigh_pairs<1>(chunk, source, row, end / 2, end / 2 + 1, 0x0000ffff);
  }
}

// Positions [begin, end), begin being even. Rows share the pairs that all of them see.
template <int Rows, typename Values>
void weigh_shared(const AttendChunk& chunk, const Values& source, int row, int begin, int end) {
  const auto first_of = [&](int r) { return chunk.first[r] > begin ? chunk.first[r] : begin; };
  const auto last_of = [&](int r) { return chunk.last[r] < end ? chunk.last[r] : end; };
  int first = begin, last = end;
  for (int r = row; r < row + Rows; ++r) {
    if (first_of(r) > first) first = first_of(r);
    if (last_of(r) < last) last = last_of(r);
  }
  const int pair_begin = (first + 1) / 2, pair_end = last / 2;
  if (pair_begin >= pair_end) {
    for (int r = row; r < row + Rows; ++r) weigh_alone(chunk, source, r, first_of(r), last_of(r));
    return;
  }
  for (int r = row; r < row + Rows; ++r) {
    weigh_alone(chunk, source, r, first_of(r), 2 * pair_begin);
  }
  weigh_pairs<Rows>(chunk, source, row, pair_begin, pair_end);
  for (int r = row; r < row + Rows; ++r) weigh_alone(chunk, source, r, 2 * pair_end, last_of(r));
}

// Scores of at most kRowGroup rows become weights; then `weigh` adds the values, and the rows join
// their total.
template <typename Weigh>
FEWBITS_INLINE void finish_rows(const AttendChunk& chunk, int row, int rows, Weigh weigh) {
  float maxima[kRowGroup], sums[kRowGroup];
  for (int r = 0; r < rows; ++r) weights_of_row(chunk, row + r, maxima[r], sums[r]);
  const int64_t start = static_cast<int64_t>(row) * chunk.stride;
  float* accumulator = chunk.accumulator_scratch + start;
  for (int i = 0; i < rows * chunk.stride; i += kLanes) store(accumulator + i, zero());
  weigh();
  const Running& total = chunk.total;
  merge_parts({total.maximum + row, total.sum + row, total.accumulator + start},
              {maxima, sums, accumulator}, rows, chunk.stride);
}

template <CacheKind kind, int Rows>
void attend_few_pairs(const AttendChunk& chunk) {
  score_few<kind, Rows>(chunk);
  finish_rows(chunk, 0, Rows, [&] {
    const CachedValues<kind> values{chunk.values, chunk.D, chunk.end};
    weigh_shared<Rows>(chunk, values, 0, chunk.begin / 2 * 2, chunk.end);
  });
}

template <CacheKind kind>
void attend_many_pairs(const AttendChunk& chunk) {
  pair_keys<kind>(chunk);
  pair_values<kind>(chunk);
  const int begin = chunk.begin / kLanes * kLanes;
  for (int group = 0; group < chunk.rows; group += kRowGroup) {
    const int rows = chunk.rows - group < kRowGroup ? chunk.rows - group : kRowGroup;
    int last[kRowGroup] = {};  // of what a tile's rows see
    for (int r = 0; r < rows; ++r) {
      int& of_tile = last[r / kRowTile];
      if (chunk.last[group + r] > of_tile) of_tile = chunk.last[group + r];
    }
    // Calls tile(RowCount<n>, row, first, end) for every block of keys and tile that sees it.
    const auto each_block = [&](auto tile) {
      for (int first = begin; first < chunk.end;) {
        const int block_end = (first / kKeyBlock + 1) * kKeyBlock;
        for_tiles(rows, [&](auto count, int row) {
          const int seen = last[row / kRowTile];
          const int end = seen < block_end ? seen : block_end;
          if (first < end) tile(count, group + row, first, end);
        });
        first = block_end;
      }
    };
    each_block([&](auto count, int row, int first, int end) {
      score_block<count.value>(chunk, row, first, end);
    });
    finish_rows(chunk, group, rows, [&] {
      each_block([&](auto count, int row, int first, int end) {
        weigh_shared<count.value>(chunk, PairedValues{chunk}, row, first, end);
      });
    });
  }
}

template <CacheKind kind>
void attend_pairs(const AttendChunk& chunk) {
  switch (chunk.rows) {
    case 1:
      return attend_few_pairs<kind, 1>(chunk);
    case 2:
      return attend_few_pairs<kind, 2>(chunk);
    case 3:
      return attend_few_pairs<kind, 3>(chunk);
    case 4:
      return attend_few_pairs<kind, 4>(chunk);
    default:
      return attend_many_pairs<kind>(chunk);
  }
}

void attend_chunk_bf16(const AttendChunk& chunk) {
  switch (chunk.kind) {
    case CacheKind::bf16:
      return attend_pairs<CacheKind::bf16>(chunk);
    case CacheKind::fp8:
      return attend_pairs<CacheKind::fp8>(chunk);
    case CacheKind::int8:
      return attend_pairs<CacheKind::int8>(chunk);
    case CacheKind::f32:
      return attend_chunk<CacheKind::f32>(chunk);
    case CacheKind::f16:
      return attend_chunk<CacheKind::f16>(chunk);
  }
}

}  // namespace

const AttentionKernels& attention_kernels_avx512_bf16() {
  static constexpr AttentionKernels kernels = {prepare_queries, attend_chunk_bf16, merge_parts,
                                               append_tokens};
  return kernels;
}

}  // namespace fewbits
