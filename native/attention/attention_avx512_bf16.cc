// Attention on the bf16 dot product, for caches whose codes are exact in bf16. Numbers go in pairs,
// as VDPBF16PS takes them: of channels for q k^T, of positions for the values,
//
//     key_scratch    blocks of 64 positions   [pair of channels][64 positions]
//     value_scratch  [pair of positions][stride channels]
//     weights        [rows][pair of positions], in the scores' place
//
// and the order of accumulation is that of attention.h.
#include "attention/append.h"
#include "attention/bf16_codes.h"
#include "attention/kernel.h"

namespace fewbits {
namespace {

#ifndef FEWSTEP
#define FEWSTEP 32
#endif
constexpr int kScoreVectors = 4;  // 4 x 4 accumulators hide the latency of a dot product
constexpr int kWeighVectors = 4;
constexpr int kPairsPerRow = kChunk;  // score_scratch's rows, in pairs

using Pairs = __m512i;

FEWBITS_INLINE Lanes dot(Pairs a, Pairs b, Lanes sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

FEWBITS_INLINE Pairs load_pairs(const uint32_t* source) { return _mm512_loadu_si512(source); }

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

uint32_t* weight_pairs(const AttendChunk& chunk, int row) {
  return reinterpret_cast<uint32_t*>(chunk.score_scratch + row * kChunk);
}

// The keys of [begin, end), whole groups of 16, to `columns` of the first one.
template <CacheKind kind>
void pair_keys(const AttendChunk& chunk, int begin, int end) {
  constexpr int kTile = 64 / element_size(kind);  // channels of a register
  for (int group = begin; group < end; group += kLanes) {
    prefetch_keys<kind>(chunk, group);
    uint32_t* column = key_pairs(chunk, group);
    for (int d = 0; d < chunk.stride; d += kTile) {
      const int bytes = (chunk.D - d) * static_cast<int>(element_size(kind));
      Lanes tile[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        tile[i] = load_bytes(static_cast<const char*>(chunk.keys[group + i]) +
                                 d * static_cast<int>(element_size(kind)),
                             bytes);
      }
      transpose(tile);
      const int count = chunk.stride - d < kTile ? chunk.stride - d : kTile;
      for (int c = 0; c < kLanes && c * 64 / kLanes < count * element_size(kind); ++c) {
        const Pairs codes = _mm512_castps_si512(tile[c]);
        if constexpr (kind == CacheKind::bf16) {
          _mm512_store_si512(column, codes);
          column += kKeyBlock;
        } else {
          const BytePairs pairs = decode_bytes<kind>(codes);
          _mm512_store_si512(column, pairs.even);
          _mm512_store_si512(column + kKeyBlock, pairs.odd);
          column += 2 * kKeyBlock;
        }
      }
    }
  }
}

// Scores of `Rows` rows and 16 * Vectors positions from j on, within a block.
template <int Rows, int Vectors>
FEWBITS_INLINE void score_tile(const AttendChunk& chunk, int row, int j) {
  Lanes sums[Rows][Vectors];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) sums[r][v] = zero();
  }
  const uint32_t* keys = key_pairs(chunk, j);
  const uint32_t* query = query_pairs(chunk, row);
  for (int pair = 0; pair < chunk.stride / 2; ++pair, keys += kKeyBlock) {
    Pairs key[Vectors];
    for (int v = 0; v < Vectors; ++v) key[v] = load_pairs(keys + v * kLanes);
    for (int r = 0; r < Rows; ++r) {
      const Pairs q = _mm512_set1_epi32(static_cast<int>(query[r * chunk.stride + pair]));
      for (int v = 0; v < Vectors; ++v) sums[r][v] = dot(q, key[v], sums[r][v]);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    float* scores = chunk.score_scratch + (row + r) * kChunk + j;
    for (int v = 0; v < Vectors; ++v) {
      store(scores + v * kLanes, scaled_scores(chunk, j + v * kLanes, sums[r][v]));
    }
  }
}

// Positions [begin, end), begin being a multiple of 16.
template <int Rows>
void score_pairs(const AttendChunk& chunk, int row, int begin, int end) {
  for (int j = begin; j < end;) {
    const int block_end = (j / kKeyBlock + 1) * kKeyBlock;
    const int vectors = ((end < block_end ? end : block_end) - j + kLanes - 1) / kLanes;
    if (vectors == 4) score_tile<Rows, kScoreVectors>(chunk, row, j);
    if (vectors == 3) score_tile<Rows, 3>(chunk, row, j);
    if (vectors == 2) score_tile<Rows, 2>(chunk, row, j);
    if (vectors == 1) score_tile<Rows, 1>(chunk, row, j);
    j = block_end;
  }
}

// 2^x, for x at most about 0; the relative error is below 2^-18, that of rounding to bf16 2^-9.
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
  float* scores = chunk.score_scratch + row * kChunk;
  uint32_t* weights = weight_pairs(chunk, row);
  const int begin = first / kStep * kStep;
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

// The values of [begin, end), begin being even; beside the last of an odd number its own.
template <CacheKind kind>
void pair_values(const AttendChunk& chunk, int begin, int end) {
  constexpr int kTile = 64 / element_size(kind);
  constexpr int kBytes = element_size(kind);
  for (int j = begin; j < end; j += 2) {
    const char* even = static_cast<const char*>(chunk.values[j]);
    const char* odd = static_cast<const char*>(chunk.values[j + 1 < end ? j + 1 : j]);
    prefetch_row(chunk.values[j + kLookAhead], chunk.D * kBytes);
    prefetch_row(chunk.values[j + 1 + kLookAhead], chunk.D * kBytes);
    uint32_t* target = value_pairs(chunk, j / 2);
    for (int d = 0; d < chunk.stride; d += kTile) {
      const int bytes = (chunk.D - d) * kBytes;
      const Pairs a = _mm512_castps_si512(load_bytes(even + d * kBytes, bytes));
      const Pairs b = _mm512_castps_si512(load_bytes(odd + d * kBytes, bytes));
      Pairs pairs[kTile / kLanes];
      pair_rows<kind>(a, b, pairs);
      for (int v = 0; v < kTile / kLanes; ++v) {
        if (d + v * kLanes < chunk.stride) {
          _mm512_store_si512(target + d + v * kLanes, pairs[v]);
        }
      }
    }
  }
}

// `kept`: the halves of a pair that count; the others are not touched by a multiplication.
template <int Rows, int Vectors>
FEWBITS_INLINE void weigh_tile(const AttendChunk& chunk, int row, int pair_begin, int pair_end,
                               int d, uint32_t kept) {
  float* accumulator = chunk.accumulator_scratch + row * chunk.stride + d;
  const uint32_t* weights = weight_pairs(chunk, row);
  const Pairs mask = _mm512_set1_epi32(static_cast<int>(kept));
  Lanes sums[Rows][Vectors];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v)
      sums[r][v] = load(accumulator + r * chunk.stride + v * kLanes);
  }
  for (int pair = pair_begin; pair < pair_end; ++pair) {
    const uint32_t* values = value_pairs(chunk, pair) + d;
    Pairs value[Vectors];
    for (int v = 0; v < Vectors; ++v) {
      value[v] = load_pairs(values + v * kLanes);
      if constexpr (Rows == 1) value[v] = _mm512_and_si512(value[v], mask);
    }
    for (int r = 0; r < Rows; ++r) {
      const uint32_t both = weights[r * kPairsPerRow + pair];
      const Pairs weight = _mm512_set1_epi32(static_cast<int>(Rows == 1 ? both & kept : both));
      for (int v = 0; v < Vectors; ++v) sums[r][v] = dot(weight, value[v], sums[r][v]);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v)
      store(accumulator + r * chunk.stride + v * kLanes, sums[r][v]);
  }
}

template <int Rows>
void weigh_pairs(const AttendChunk& chunk, int row, int pair_begin, int pair_end,
                 uint32_t kept = ~uint32_t{0}) {
  if (pair_begin >= pair_end) return;
  int d = 0;
  for (; d + kWeighVectors * kLanes <= chunk.stride; d += kWeighVectors * kLanes) {
    weigh_tile<Rows, kWeighVectors>(chunk, row, pair_begin, pair_end, d, kept);
  }
  const int vectors = (chunk.stride - d) / kLanes;
  if (vectors == 3) weigh_tile<Rows, 3>(chunk, row, pair_begin, pair_end, d, kept);
  if (vectors == 2) weigh_tile<Rows, 2>(chunk, row, pair_begin, pair_end, d, kept);
  if (vectors == 1) weigh_tile<Rows, 1>(chunk, row, pair_begin, pair_end, d, kept);
}

// A row's own positions [begin, end); a pair may be half of them.
void weigh_alone(const AttendChunk& chunk, int row, int begin, int end) {
  if (begin < end && begin % 2) {
    weigh_pairs<1>(chunk, row, begin / 2, begin / 2 + 1, 0xffff0000);
    ++begin;
  }
  weigh_pairs<1>(chunk, row, begin / 2, end / 2);
  if (begin < end && end % 2) weigh_pairs<1>(chunk, row, end / 2, end / 2 + 1, 0x0000ffff);
}

// Positions [begin, end), begin being even. Rows share the pairs that all of them see.
template <int Rows>
void weigh_shared(const AttendChunk& chunk, int row, int begin, int end) {
  const auto first_of = [&](int r) { return chunk.first[r] > begin ? chunk.first[r] : begin; };
  const auto last_of = [&](int r) { return chunk.last[r] < end ? chunk.last[r] : end; };
  int first = begin, last = end;
  for (int r = row; r < row + Rows; ++r) {
    if (first_of(r) > first) first = first_of(r);
    if (last_of(r) < last) last = last_of(r);
  }
  const int pair_begin = (first + 1) / 2, pair_end = last / 2;
  if (pair_begin >= pair_end) {
    for (int r = row; r < row + Rows; ++r) weigh_alone(chunk, r, first_of(r), last_of(r));
    return;
  }
  for (int r = row; r < row + Rows; ++r) weigh_alone(chunk, r, first_of(r), 2 * pair_begin);
  weigh_pairs<Rows>(chunk, row, pair_begin, pair_end);
  for (int r = row; r < row + Rows; ++r) weigh_alone(chunk, r, 2 * pair_end, last_of(r));
}

// Scores of some rows become weights; then `weigh` adds the values, and the rows join their total.
template <int Rows, typename Weigh>
FEWBITS_INLINE void finish_rows(const AttendChunk& chunk, int row, Weigh weigh) {
  float maxima[Rows], sums[Rows];
  for (int r = 0; r < Rows; ++r) weights_of_row(chunk, row + r, maxima[r], sums[r]);
  const int64_t start = static_cast<int64_t>(row) * chunk.stride;
  float* accumulator = chunk.accumulator_scratch + start;
  for (int i = 0; i < Rows * chunk.stride; i += kLanes) store(accumulator + i, zero());
  weigh();
  const Running& total = chunk.total;
  merge_parts({total.maximum + row, total.sum + row, total.accumulator + start},
              {maxima, sums, accumulator}, Rows, chunk.stride);
}

// For few rows: keys and values are used as soon as they are paired, which spreads the waiting for
// memory over the work.
template <CacheKind kind, int Rows>
void attend_few_pairs(const AttendChunk& chunk) {
  constexpr int kStep = FEWSTEP;
  for (int j = chunk.begin / kStep * kStep; j < chunk.end; j += kStep) {
    const int end = j + kStep < chunk.end ? j + kStep : chunk.end;
    pair_keys<kind>(chunk, j, end);
    score_pairs<Rows>(chunk, 0, j, end);
  }
  finish_rows<Rows>(chunk, 0, [&] {
    for (int j = chunk.begin / kStep * kStep; j < chunk.end; j += kStep) {
      const int end = j + kStep < chunk.end ? j + kStep : chunk.end;
      pair_values<kind>(chunk, j, end);
      weigh_shared<Rows>(chunk, 0, j, end);
    }
  });
}

template <CacheKind kind>
void attend_many_pairs(const AttendChunk& chunk) {
  const int begin = chunk.begin / kLanes * kLanes;
  pair_keys<kind>(chunk, begin, chunk.end);
  pair_values<kind>(chunk, begin, chunk.end);
  for_tiles(chunk.rows, [&](auto count, int row) {
    constexpr int kRows = count.value;
    int last = 0;
    for (int r = row; r < row + kRows; ++r) last = chunk.last[r] > last ? chunk.last[r] : last;
    score_pairs<kRows>(chunk, row, begin, last);
    finish_rows<kRows>(chunk, row, [&] { weigh_shared<kRows>(chunk, row, begin, last); });
  });
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
