// Attention on the bf16 dot product, for caches whose codes are exact in bf16. Numbers go in pairs,
// as VDPBF16PS takes them: of channels for q k^T, of positions for the values. The order of
// accumulation is that of attention.h.
//
// Up to eight rows use keys and values as soon as they are paired, in registers. For more they are
// paired once per chunk, into
//
//     key_scratch    blocks of 64 positions   [pair of channels][64 positions]
//     value_scratch  [pair of positions][value_stride channels]
//
// and rows take turns in groups: a block of keys and the scores of a group stay in the first-level
// cache. Values come from the second level, which is fast enough for four rows at once; in blocks
// they would cost more for the sums, which are loaded and stored for each.
#include "attention/append.h"
#include "attention/bf16_scores.h"
#include "attention/bf16_values.h"
#include "attention/kernel.h"

namespace fewbits {
namespace {

// Scores of at most kRowGroup rows become weights; then `weigh` adds the values, and the rows join
// their total.
template <typename Weigh>
FEWBITS_INLINE void finish_rows(const AttendChunk& chunk, int row, int rows, Weigh weigh) {
  float maxima[kRowGroup], sums[kRowGroup];
  // One thing for all rows, then the next: while a row waits for its maximum, others go on.
  for (int r = 0; r < rows; ++r) maxima[r] = finish_scores(chunk, row + r);
  for (int r = 0; r < rows; ++r) sums[r] = weights_of_scores(chunk, row + r, maxima[r]);
  const int64_t start = static_cast<int64_t>(row) * chunk.value_stride;
  float* accumulator = chunk.accumulator_scratch + start;
  for (int i = 0; i < rows * chunk.value_stride; i += kLanes) store(accumulator + i, zero());
  weigh();
  const Running& total = chunk.total;
  merge_parts({total.maximum + row, total.sum + row, total.accumulator + start},
              {maxima, sums, accumulator}, rows, chunk.value_stride);
}

template <CacheKind kind, int Rows>
void attend_few_pairs(const AttendChunk& chunk) {
  score_few<kind, Rows>(chunk);
  finish_rows(chunk, 0, Rows, [&] {
    const CachedValues<kind> values{chunk.values, chunk.value_D, chunk.end};
    weigh_shared<Rows>(chunk, values, 0);
  });
}

template <CacheKind kind>
void attend_many_pairs(const AttendChunk& chunk) {
  pair_keys<kind>(chunk);
  pair_values<kind>(chunk);
  for (int group = 0; group < chunk.rows; group += kRowGroup) {
    const int rows = chunk.rows - group < kRowGroup ? chunk.rows - group : kRowGroup;
    int last[kRowGroup] = {};  // of what a tile's rows see
    for (int r = 0; r < rows; ++r) {
      int& of_tile = last[r / kRowTile];
      if (chunk.last[group + r] > of_tile) of_tile = chunk.last[group + r];
    }
    for (int first = chunk.begin / kLanes * kLanes; first < chunk.end;) {
      const int block_end = (first / kKeyBlock + 1) * kKeyBlock;
      for_tiles(rows, [&](auto count, int row) {
        const int seen = last[row / kRowTile];
        const int end = seen < block_end ? seen : block_end;
        if (first < end) score_block<count.value>(chunk, group + row, first, end);
      });
      first = block_end;
    }
    finish_rows(chunk, group, rows, [&] {
      for_tiles(rows, [&](auto count, int row) {
        weigh_shared<count.value>(chunk, PairedValues{chunk}, group + row);
      });
    });
  }
}

template <CacheKind kind>
void attend_pairs(const AttendChunk& chunk) {
  constexpr void (*kFew[])(const AttendChunk&) = {
      attend_few_pairs<kind, 1>, attend_few_pairs<kind, 2>, attend_few_pairs<kind, 3>,
      attend_few_pairs<kind, 4>, attend_few_pairs<kind, 5>, attend_few_pairs<kind, 6>,
      attend_few_pairs<kind, 7>, attend_few_pairs<kind, 8>};
  constexpr int kMostFew = sizeof kFew / sizeof kFew[0];
  (chunk.rows <= kMostFew ? kFew[chunk.rows - 1] : attend_many_pairs<kind>)(chunk);
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
