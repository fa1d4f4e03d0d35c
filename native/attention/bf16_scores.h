// Scores on the bf16 dot product: q k^T in pairs of channels. For tier files with AVX-512 BF16 and
// VBMI; see attention_avx512_bf16.cc.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "attention/attention.h"
#include "attention/bf16_codes.h"
#include "attention/cached.h"
#include "elementwise/lanes.h"

namespace fewbits {
namespace {

constexpr int kRowGroup = 16;
constexpr int kBlockVectors = kKeyBlock / kLanes;  // 4 x 4 accumulators hide a product's latency

using Pairs = __m512i;

FEWBITS_INLINE Lanes dot(Pairs a, Pairs b, Lanes sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

FEWBITS_INLINE Pairs broadcast_pair(uint32_t pair) {
  return _mm512_set1_epi32(static_cast<int>(pair));
}

// Which channels pair up is the keys' matter: queries follow.
inline void prepare_queries(CacheKind kind, float* query, int rows, int stride) {
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

inline const uint32_t* query_pairs(const AttendChunk& chunk, int row) {
  return reinterpret_cast<const uint32_t*>(chunk.query + row * chunk.stride);
}

inline uint32_t* key_pairs(const AttendChunk& chunk, int position) {
  return reinterpret_cast<uint32_t*>(chunk.key_scratch) +
         position / kKeyBlock * kKeyBlock * (chunk.stride / 2) + position % kKeyBlock;
}

inline uint32_t* value_pairs(const AttendChunk& chunk, int pair) {
  return reinterpret_cast<uint32_t*>(chunk.value_scratch) + pair * chunk.value_stride;
}

inline float* scores_of(const AttendChunk& chunk, int row) {
  return chunk.score_scratch + row % kRowGroup * kChunk;
}

// The weights of a row, by pair of positions, take the place of its scores.
inline uint32_t* weights_of(const AttendChunk& chunk, int row) {
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
inline void score_few(const AttendChunk& chunk) {
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
inline void pair_keys(const AttendChunk& chunk) {
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
inline void score_tile(const AttendChunk& chunk, int row, int j) {
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
inline void score_block(const AttendChunk& chunk, int row, int begin, int end) {
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

}  // namespace
}  // namespace fewbits
