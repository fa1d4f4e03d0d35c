// Paged attention with grouped queries: rotary embedding, the KV cache, softmax(q K^T) V.
//
// Cache, one array for the keys and one for the values of a layer; D numbers are a row of keys,
// value_D a row of values:
//
//     page 0                                   page 1
//     [ kv head 0: row 0 .. row page_size-1 ]  [ kv head 0: ... ]
//     [ kv head 1: row 0 .. row page_size-1 ]  [ kv head 1: ... ]
//
// slot = page * page_size + row. Rows are f32, bf16, f16, fp8 (e4m3fn; value = code * scale[kv
// head]) or int8 (value = code * the row's own scale, which lies at [page, kv head, row] of an
// array of scales).
//
// Where the array of the values is that of the keys, a value is the first value_D numbers of its
// key, stored once, and the scales of values are those of keys: latents.
//
// Order of accumulation. The entries that a query row sees have logical positions 0, 1, 2, ... (for
// a row with an ancestor mask its n-th ancestor in the batch follows at once on the older entries,
// as it would in a batch without siblings). Positions are taken in chunks of kChunk: a chunk's
// scores are complete before its softmax is taken and its values are added,
//
//     position   0 ............... 255 | 256 ............. 511 | 512 ...
//                chunk 0                 chunk 1                 chunk 2
//
// and the chunks' (maximum, sum, weighted values) are merged in order. Chunks lie at absolute
// positions, and a row's fused multiply-adds run over d and over positions one after the other (in
// tiers with a bf16 dot product, over pairs of both), so the bits of a row depend on nothing but
// its own entries: not on the rows beside it, on how a prompt was split or on how many threads
// work. What a row doesn't see is never multiplied by zero: it may be NaN.
//
// Tiers with a bf16 dot product round queries (times the scales) and the softmax's exponentials to
// bf16 where the cache's codes are exact in bf16; sums are float32. The sum of a row's exponentials
// is that of the rounded ones. The dot product takes subnormal numbers for zeros.
#pragma once

#include <stdint.h>

namespace fewbits {

enum class CacheKind : int { f32, bf16, f16, fp8, int8 };

// Positions whose softmax is taken at once: enough to make merging cheap, few enough to share out.
constexpr int kChunk = 256;
constexpr int kLookAhead = 64;  // positions whose rows are prefetched
constexpr int kMaxHeadDim = 1024;

constexpr int64_t element_size(CacheKind kind) {
  return kind == CacheKind::f32 ? 4 : kind == CacheKind::bf16 || kind == CacheKind::f16 ? 2 : 1;
}

// The softmax of some rows over the positions so far, and the values it weighs; at first
// (-infinity, 0, zeros).
struct Running {
  float* maximum;      // [rows]
  float* sum;          // [rows], of exponentials
  float* accumulator;  // [rows][value_stride], values weighted by them
};

// Query rows of one kv head against one chunk of positions; the tiers' unit of work.
// `stride` is D rounded up to 16, `value_stride` value_D. Rows of scratch arrays are 64-byte
// aligned.
struct AttendChunk {
  int rows, D, stride, value_D, value_stride;
  CacheKind kind;
  const float* query;          // [rows][stride], see AttentionKernels
  const void* const* keys;     // [end rounded up to 16, + kLookAhead] one row of the cache per
  const void* const* values;   // position; those outside what the rows see repeat one inside
  const float* key_scales;     // [kChunk] int8 only, otherwise null
  const float* value_scales;   // [kChunk]
  int begin, end;              // the positions that some row sees, within the chunk
  const int32_t* first;        // [rows] row r sees [first[r], last[r]), within the chunk; may be
  const int32_t* last;         // empty
  Running total;               // in and out
  float* key_scratch;          // [stride][kChunk]
  float* value_scratch;        // [kChunk][value_stride]
  float* score_scratch;        // [rows][kChunk]
  float* accumulator_scratch;  // [rows][value_stride]
};

// A layer's attention, the same in every pass.
struct AttentionSpec {
  int heads, kv_heads, D, value_D;
  // Of a head the channels [rotary_begin, rotary_begin + rotary_dim) are rotated; even.
  int rotary_begin, rotary_dim;
  bool interleaved;  // pairs (2i, 2i + 1) instead of (i, i + rotary_dim / 2), from rotary_begin on
  const float* query_norm;  // [D] or null
  const float* key_norm;    // [D] or null
  float norm_eps, norm_offset;
  float scale;
  int window;          // 0: none; else an entry is seen if its position > the row's - window
  const float* sinks;  // [heads] or null: one more logit per head, without a value
};

// The cache of one layer.
struct LayerCache {
  void* key_cache;
  void* value_cache;
  int page_size;
  CacheKind kind;
  float* key_scale;  // fp8: [kv_heads], read; int8: [pages, kv_heads, page_size], stored; otherwise
  float* value_scale;  // null
};

// The tokens of a pass.
struct Step {
  int64_t T;
  const int64_t* slots;      // [T]
  const int64_t* positions;  // [T], none negative
  int sequences;
  const int32_t* query_start;  // [sequences + 1] rows of the batch
  const int32_t* kv_len;  // [sequences] entries, those of the batch's rows included (they are last)
  const int32_t* block_table;  // [sequences, max_pages]
  int max_pages;
  const uint8_t* mask;  // [T, T] or null: which of the batch's rows each sees (itself included)
};

// The rows of a pass whose results are wanted, the last of their sequences: their numbers, and the
// pass that they are by themselves once keys and values of all rows are stored.
struct LastRows {
  const int64_t* rows;  // [step.T], rising
  Step step;
};

// Of all positions up to the highest of a pass: [positions, rotary_dim / 2].
struct Rotation {
  const float* cos;
  const float* sin;
};

// New tokens: per-head RMS norm and rotary embedding of q (in place) and k, then k and v rounded to
// the cache's type (to nearest, ties to even; fp8: x / scale clamped to +-448; int8: x / scale with
// scale = max |x| / 127 of the head's numbers, NaN where one of them is not finite) and stored at
// their slots. k and v are left as they are.
struct AppendTokens : AttentionSpec, LayerCache, Step, Rotation {
  float* query;        // [T, heads * D]
  const float* key;    // [T, kv_heads * D]
  const float* value;  // [T, kv_heads * value_D]; not read where keys hold the values
};

struct Attend : AttentionSpec, LayerCache, Step {
  const float* query;  // [T, heads * D]
  float* out;          // [T, heads * value_D]
};

void rope_and_append(const AppendTokens& task);
void attend(const Attend& task);

// The tiers.
struct AttentionKernels {
  // What attend_chunk wants of queries [rows][stride] that are multiplied by the scales and padded
  // with zeros; in place. Null where it wants them as they are.
  void (*prepare_queries)(CacheKind kind, float* query, int rows, int stride);
  void (*attend_chunk)(const AttendChunk& chunk);
  // Adds what covers later positions.
  void (*merge)(const Running& total, const Running& later, int rows, int value_stride);
  void (*append_tokens)(const AppendTokens& task, int64_t begin, int64_t end);
};

const AttentionKernels& attention_kernels_ref();
const AttentionKernels& attention_kernels_avx2();
const AttentionKernels& attention_kernels_avx512();
const AttentionKernels& attention_kernels_avx512_bf16();

}  // namespace fewbits
