// Paged attention with grouped queries: rotary embedding, the KV cache, softmax(q K^T) V.
//
// Cache, one array for the keys and one for the values of a layer, D numbers in a row:
//
//     page 0                                   page 1
//     [ kv head 0: row 0 .. row page_size-1 ]  [ kv head 0: ... ]
//     [ kv head 1: row 0 .. row page_size-1 ]  [ kv head 1: ... ]
//
// slot = page * page_size + row. Rows are f32, bf16, f16 or fp8 (e4m3fn; value = code * scale[kv
// head]).
//
// Order of accumulation. The entries that a query row sees have logical positions 0, 1, 2, ... (for
// a row with an ancestor mask its n-th ancestor in the batch follows at once on the older entries,
// as it would in a batch without siblings). Positions are taken in blocks of kKeyBlock; a block's
// scores are complete before its values are added:
//
//     position   0 ........ 63 | 64 ...... 127 | ... | 192 ..... 255 | 256 ...
//                block 0         block 1               block 3
//                chunk 0: softmax with a running maximum             | chunk 1: starts afresh
//
// and the chunks' (maximum, sum, weighted values) are merged in order. Blocks and chunks lie at
// absolute positions, and a row's fused multiply-adds run over d and over positions one after the
// other, so the bits of a row depend on nothing but its own entries: not on the rows beside it, on
// how a prompt was split or on how many threads work. What a row doesn't see is never multiplied by
// zero: it may be NaN.
#pragma once

#include <stdint.h>

namespace fewbits {

enum class CacheKind : int { f32, bf16, f16, fp8 };

constexpr int kKeyBlock = 64;
constexpr int kChunk =
    256;  // 4 blocks: long enough to make a merge cheap, short enough to share out
constexpr int kLookAhead = 64;  // positions whose rows are prefetched
constexpr int kMaxHeadDim = 1024;

// Query rows of one kv head against one block of positions; the tiers' unit of work.
// `stride` is D rounded up to 16. Rows of scratch arrays are 64-byte aligned.
struct AttendBlock {
  int rows, D, stride;
  CacheKind kind;
  const float* query;         // [rows][stride], multiplied by the softmax and key scales
  const void* const* keys;    // [kKeyBlock + kLookAhead] one row of the cache per position; those
  const void* const* values;  // outside what the rows see repeat an address of one inside
  int begin, end;             // the positions that some row sees, within the block
  const int32_t* first;  // [rows] row r sees [first[r], last[r]), within the block; may be empty
  const int32_t* last;
  float* maximum;        // [rows]          in and out: running maximum,
  float* sum;            // [rows]          sum of exponentials and
  float* accumulator;    // [rows][stride]  values weighted by them
  float* key_scratch;    // [stride][kKeyBlock]
  float* value_scratch;  // [kKeyBlock][stride]
  float* score_scratch;  // [rows][kKeyBlock]
};

// New tokens: per-head RMS norm and rotary embedding of q (in place) and k, then k and v rounded to
// the cache's type (to nearest, ties to even; fp8: x / scale clamped to +-448) and stored at their
// slots. k and v are left as they are.
struct AppendTokens {
  float* query;        // [T, heads * D]
  const float* key;    // [T, kv_heads * D]
  const float* value;  // [T, kv_heads * D]
  int heads, kv_heads, D;
  int rotary_dim;    // even; channels from rotary_dim on stay as they are
  bool interleaved;  // pairs (2i, 2i + 1) instead of (i, i + rotary_dim / 2)
  const float* cos;  // [T, rotary_dim / 2]
  const float* sin;
  const float* query_norm;  // [D] or null
  const float* key_norm;    // [D] or null
  float norm_eps, norm_offset;
  const int64_t* slots;  // [T]
  void* key_cache;
  void* value_cache;
  int page_size;
  CacheKind kind;
  const float* key_scale;    // [kv_heads]; fp8 only, otherwise null
  const float* value_scale;  // [kv_heads]
};

struct Attend {
  const float* query;  // [T, heads * D]
  float* out;          // [T, heads * D]
  int64_t T;
  int heads, kv_heads, D;
  int sequences;
  const int32_t* query_start;  // [sequences + 1] rows of the batch
  const int32_t* kv_len;  // [sequences] entries, those of the batch's rows included (they are last)
  const int32_t* block_table;  // [sequences, max_pages]
  int max_pages;
  const int64_t* positions;  // [T]
  const void* key_cache;
  const void* value_cache;
  int page_size;
  CacheKind kind;
  const float* key_scale;
  const float* value_scale;
  float scale;
  int window;           // 0: none; else an entry is seen if its position > the row's - window
  const float* sinks;   // [heads] or null: one more logit per head, without a value
  const uint8_t* mask;  // [T, T] or null: which of the batch's rows each sees (itself included)
};

void rope_and_append(const AppendTokens& task, int64_t T);
void attend(const Attend& task);

// The tiers.
struct AttentionKernels {
  void (*attend_block)(const AttendBlock& block);
  void (*append_tokens)(const AppendTokens& task, int64_t begin, int64_t end);
};

void attend_block_ref(const AttendBlock& block);
void append_tokens_ref(const AppendTokens& task, int64_t begin, int64_t end);
void attend_block_avx2(const AttendBlock& block);
void append_tokens_avx2(const AppendTokens& task, int64_t begin, int64_t end);
void attend_block_avx512(const AttendBlock& block);
void append_tokens_avx512(const AppendTokens& task, int64_t begin, int64_t end);

}  // namespace fewbits
