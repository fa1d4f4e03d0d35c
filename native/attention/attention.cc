#include "attention/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "attention/visible.h"
#include "cpu.h"
#include "memory.h"
#include "threads.h"

namespace fewbits {
namespace {

// Rows of one kv head that share a reading of the cache: its conversion to f32 is then a small part
// of the work, and rows, keys and values of a block stay in the second-level cache.
constexpr int kRowsPerItem = 256;

// Below these amounts of work (multiply-adds; channels), which take a core some 8 us, waking the
// pool costs more than it saves.
constexpr int64_t kParallelAttend = 1 << 17;
constexpr int64_t kParallelAppend = 1 << 14;

const AttentionKernels& kernels() {
  static const AttentionKernels& chosen = []() -> const AttentionKernels& {
#if defined(__x86_64__)
    if (tier() >= Tier::avx512_bf16) return attention_kernels_avx512_bf16();
    if (tier() >= Tier::avx512) return attention_kernels_avx512();
    if (tier() >= Tier::avx2) return attention_kernels_avx2();
#endif
    return attention_kernels_ref();
  }();
  return chosen;
}

// Of Running: contiguous, so that it can be kept between two phases.
int64_t running_floats(int rows, int value_stride) {
  return (static_cast<int64_t>(rows) * (value_stride + 2) + 15) / 16 * 16;
}

Running running_at(float* memory, int rows, int value_stride) {
  float* maximum = memory + static_cast<int64_t>(rows) * value_stride;
  return {maximum, maximum + rows, memory};
}

void clear(const Running& running, int rows, int value_stride) {
  std::fill_n(running.maximum, rows, -std::numeric_limits<float>::infinity());
  std::fill_n(running.sum, rows, 0.0f);
  std::fill_n(running.accumulator, static_cast<int64_t>(rows) * value_stride, 0.0f);
}

// Some query rows of one sequence for one kv head, over the chunks of [begin, end) positions. Its
// rows are (token, head within the group), token by token.
struct Item {
  int sequence, kv_head;
  int token_begin, token_end;  // rows of the batch
  int64_t begin, end;          // positions; begin is a multiple of kChunk
};

// A thread's working memory, kept from call to call.
struct Scratch {
  Buffer buffer;
  float *query, *keys, *values, *scores, *accumulator, *total;
  int32_t *first, *last;
  const void* key_rows[kChunk + kLookAhead];
  const void* value_rows[kChunk + kLookAhead];
  alignas(64) float key_scales[kChunk];
  alignas(64) float value_scales[kChunk];

  void reserve(int rows, int stride, int value_stride) {
    const int64_t query_floats = static_cast<int64_t>(rows) * stride;
    const int64_t accumulator_floats = static_cast<int64_t>(rows) * value_stride;
    const int64_t key_floats = static_cast<int64_t>(kChunk) * stride;
    const int64_t value_floats = static_cast<int64_t>(kChunk) * value_stride;
    const int64_t score_floats = static_cast<int64_t>(rows) * kChunk;
    const int64_t total_floats = running_floats(rows, value_stride);
    const int64_t range_floats = (rows + 15) / 16 * 16;
    const int64_t floats = query_floats + accumulator_floats + key_floats + value_floats +
                           score_floats + total_floats + 2 * range_floats;
    if (buffer.bytes() < floats * sizeof(float)) buffer = Buffer(floats * sizeof(float));
    query = buffer.as<float>();
    keys = query + query_floats;
    values = keys + key_floats;
    scores = values + value_floats;
    accumulator = scores + score_floats;
    total = accumulator + accumulator_floats;
    first = reinterpret_cast<int32_t*>(total + total_floats);
    last = first + range_floats;
  }
};

class Attention {
 public:
  explicit Attention(const Attend& task)
      : task_(task),
        group_(task.heads / task.kv_heads),
        stride_((task.D + 15) / 16 * 16),
        value_stride_((task.value_D + 15) / 16 * 16) {
    for (int s = 0; s < task.sequences; ++s) {
      listed_.push_back(is_listed(task, s));
      for (int t = task.query_start[s]; t < task.query_start[s + 1]; ++t) {
        sees_.push_back(visible_to(task, s, t, listed_[s]));
      }
      add_items(s);
    }
  }

  void run() {
    const bool parallel = work_ >= kParallelAttend && thread_count() > 1;
    const auto items = static_cast<int64_t>(items_.size());
    if (parallel && items < 4 * thread_count() && chunks_ > items) {
      run_split();
      return;
    }
    auto run_items = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Item* const next = i + 1 < end ? &items_[i + 1] : nullptr;
        if (next) prefetch_rows(task_.query, task_.D, *next);
        prefetch_rows(task_.out, task_.value_D, items_[i]);
        run_item(items_[i], nullptr, next);
      }
    };
    for_range(items, parallel, run_items);
  }

 private:
  int rows_of(const Item& item) const { return (item.token_end - item.token_begin) * group_; }

  // The last rows of a prompt see most, so they start first. Rows of all kv heads lie side by side
  // in queries and outputs: those of the same tokens follow each other.
  void add_items(int sequence) {
    const int begin = task_.query_start[sequence], end = task_.query_start[sequence + 1];
    const int tokens = std::max(1, kRowsPerItem / group_);
    for (int token_end = end; token_end > begin; token_end -= tokens) {
      Item item{sequence, 0, std::max(begin, token_end - tokens), token_end, INT64_MAX, 0};
      for (int t = item.token_begin; t < token_end; ++t) {
        const Visible& sees = sees_[t];
        item.begin = std::min(item.begin, sees.first / kChunk * kChunk);
        item.end = std::max(item.end, sees.last);
        work_ += (sees.last - sees.first) * task_.heads * (task_.D + task_.value_D);
      }
      chunks_ += (item.end - item.begin + kChunk - 1) / kChunk * task_.kv_heads;
      for (; item.kv_head < task_.kv_heads; ++item.kv_head) items_.push_back(item);
    }
  }

  // Of queries or outputs: an item's lie in short pieces, which the hardware doesn't foresee. GCC
  // removes calls of a function that does nothing but prefetch, hence inlined.
  __attribute__((always_inline)) void prefetch_rows(const float* rows, int width,
                                                    const Item& item) const {
    constexpr int kLine = 16;
    for (int64_t t = item.token_begin; t < item.token_end; ++t) {
      const float* row = rows + (t * task_.heads + item.kv_head * group_) * width;
      for (int d = 0; d < group_ * width; d += kLine) __builtin_prefetch(row + d, 0, 2);
    }
  }

  // Too few items for the threads (one token and a long context): every chunk becomes one, and the
  // chunks' parts are merged in their order, as run_item does it.
  void run_split() {
    std::vector<Item> chunks;
    std::vector<int64_t> first_chunk;
    for (const Item& item : items_) {
      first_chunk.push_back(static_cast<int64_t>(chunks.size()));
      for (int64_t begin = item.begin; begin < item.end;) {
        Item chunk = item;
        chunk.begin = begin;
        chunk.end = std::min(item.end, (begin / kChunk + 1) * kChunk);
        chunks.push_back(chunk);
        begin = chunk.end;
      }
    }
    first_chunk.push_back(static_cast<int64_t>(chunks.size()));
    std::vector<int64_t> offsets{0};
    for (const Item& chunk : chunks) {
      offsets.push_back(offsets.back() + running_floats(rows_of(chunk), value_stride_));
    }
    const Buffer parts(offsets.back() * sizeof(float));
    auto run_chunks = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        run_item(chunks[i], parts.as<float>() + offsets[i], i + 1 < end ? &chunks[i + 1] : nullptr);
      }
    };
    for_range(static_cast<int64_t>(chunks.size()), true, run_chunks);
    auto merge_items = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int rows = rows_of(items_[i]);
        scratch_.reserve(rows, stride_, value_stride_);
        const Running total = running_at(scratch_.total, rows, value_stride_);
        start_total(items_[i], total);
        for (int64_t c = first_chunk[i]; c < first_chunk[i + 1]; ++c) {
          const Running part = running_at(parts.as<float>() + offsets[c], rows, value_stride_);
          kernels().merge(total, part, rows, value_stride_);
        }
        finish(items_[i], total);
      }
    };
    for_range(static_cast<int64_t>(items_.size()), false, merge_items);
  }

  // With `part_memory` the item is one chunk, and its part is left there. `next`, or null, is what
  // the thread does afterwards.
  void run_item(const Item& item, float* part_memory, const Item* next) {
    Scratch& scratch = scratch_;
    const int rows = rows_of(item), tokens = item.token_end - item.token_begin;
    scratch.reserve(rows, stride_, value_stride_);
    load_queries(item, scratch.query);
    float* const memory = part_memory ? part_memory : scratch.total;
    const Running total = running_at(memory, rows, value_stride_);
    if (part_memory) {
      clear(total, rows, value_stride_);
    } else {
      start_total(item, total);
    }
    const int64_t past = past_of(task_, item.sequence);
    const int64_t shared_end = listed_[item.sequence] ? past / kChunk * kChunk : item.end;
    for (int64_t chunk = item.begin; chunk < item.end; chunk += kChunk) {
      if (chunk < shared_end) {
        run_chunk(scratch, item, total, 0, tokens, chunk, std::min(shared_end, item.end), next);
      } else {
        for (int t = 0; t < tokens; ++t) {
          run_chunk(scratch, item, total, t, t + 1, chunk, chunk, next);
        }
      }
    }
    if (!part_memory) finish(item, total);
  }

  void load_queries(const Item& item, float* query) const {
    const bool fp8 = task_.kind == CacheKind::fp8;
    const float scale = task_.scale * (fp8 ? task_.key_scale[item.kv_head] : 1.0f);
    float* row = query;
    for (int t = item.token_begin; t < item.token_end; ++t) {
      const float* source =
          task_.query + (static_cast<int64_t>(t) * task_.heads + item.kv_head * group_) * task_.D;
      for (int g = 0; g < group_; ++g, row += stride_, source += task_.D) {
        for (int d = 0; d < task_.D; ++d) row[d] = source[d] * scale;
        for (int d = task_.D; d < stride_; ++d) row[d] = 0.0f;
      }
    }
    if (kernels().prepare_queries) {
      kernels().prepare_queries(task_.kind, query, rows_of(item), stride_);
    }
  }

  // The rows of the item's tokens [token_begin, token_end) against one chunk. Positions below
  // `shared_end` are the same entries for all of them.
  void run_chunk(Scratch& scratch, const Item& item, const Running& total, int token_begin,
                 int token_end, int64_t chunk_begin, int64_t shared_end, const Item* next) {
    int64_t lowest = INT64_MAX, highest = 0;
    for (int t = token_begin; t < token_end; ++t) {
      const Visible& sees = sees_[item.token_begin + t];
      const int first = static_cast<int>(std::clamp<int64_t>(sees.first - chunk_begin, 0, kChunk));
      const int last = static_cast<int>(std::clamp<int64_t>(sees.last - chunk_begin, 0, kChunk));
      std::fill_n(scratch.first + t * group_, group_, first);
      std::fill_n(scratch.last + t * group_, group_, last);
      if (sees.first >= sees.last) continue;
      lowest = std::min(lowest, sees.first);
      highest = std::max(highest, sees.last);
    }
    if (lowest >= chunk_begin + kChunk || highest <= chunk_begin) return;
    const int begin = static_cast<int>(std::max<int64_t>(lowest - chunk_begin, 0));
    const int end = static_cast<int>(std::min<int64_t>(highest - chunk_begin, kChunk));
    const int64_t look_ahead = std::min({highest, shared_end, chunk_begin + kChunk + kLookAhead});
    fill_pointers(scratch, item, sees_[item.token_begin + token_begin], chunk_begin,
                  chunk_begin + begin, chunk_begin + end, std::max(chunk_begin + end, look_ahead),
                  next);
    AttendChunk task;
    const int64_t row = static_cast<int64_t>(token_begin) * group_;
    task.rows = (token_end - token_begin) * group_;
    task.D = task_.D;
    task.stride = stride_;
    task.value_D = task_.value_D;
    task.value_stride = value_stride_;
    task.kind = task_.kind;
    task.query = scratch.query + row * stride_;
    task.keys = scratch.key_rows;
    task.values = scratch.value_rows;
    task.key_scales = task_.kind == CacheKind::int8 ? scratch.key_scales : nullptr;
    task.value_scales = task_.kind == CacheKind::int8 ? scratch.value_scales : nullptr;
    task.begin = begin;
    task.end = end;
    task.first = scratch.first + row;
    task.last = scratch.last + row;
    task.total = {total.maximum + row, total.sum + row, total.accumulator + row * value_stride_};
    task.key_scratch = scratch.keys;
    task.value_scratch = scratch.values;
    task.score_scratch = scratch.scores;
    task.accumulator_scratch = scratch.accumulator;
    kernels().attend_chunk(task);
  }

  // Addresses and scales of positions [begin, end), the first of which is in the chunk, and where a
  // kernel looks ahead of positions up to `seen`, those of the next item. Other places repeat the
  // first one's address.
  void fill_pointers(Scratch& scratch, const Item& item, const Visible& sees, int64_t chunk,
                     int64_t begin, int64_t seen, int64_t end, const Item* next) const {
    const int64_t past = past_of(task_, item.sequence);
    const bool listed = listed_[item.sequence];
    const int64_t shared_end = listed ? std::clamp(past, begin, end) : end;
    int64_t at = add_rows(scratch, item, begin, shared_end, begin - chunk);
    for (int64_t position = shared_end; position < end; ++position) {
      const int64_t entry = past + sees.listed[position - past];
      at = add_rows(scratch, item, entry, entry + 1, at);
    }
    const void* const key_row = scratch.key_rows[begin - chunk];
    const void* const value_row = scratch.value_rows[begin - chunk];
    const auto repeat_first = [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        scratch.key_rows[i] = key_row;
        scratch.value_rows[i] = value_row;
      }
    };
    repeat_first(0, begin - chunk);
    const int64_t first_ahead = (begin - chunk) / 16 * 16 + kLookAhead;
    const int64_t last_ahead = (seen - chunk + 15) / 16 * 16 + kLookAhead;
    repeat_first(at, first_ahead);
    at = std::max(at, first_ahead);
    if (next) {
      const int64_t next_end = std::min(next->end, next->begin + last_ahead - at);
      at = add_rows(scratch, *next, next->begin, next_end, at);
    }
    repeat_first(at, last_ahead);
  }

  // Of the entries [begin, end) of an item's sequence, into the places from `at` on; returns the
  // place after them. Entries of one page follow each other.
  int64_t add_rows(Scratch& scratch, const Item& item, int64_t begin, int64_t end,
                   int64_t at) const {
    const int64_t key_bytes = task_.D * element_size(task_.kind);
    const bool in_keys = task_.value_cache == task_.key_cache;
    const int64_t value_bytes = in_keys ? key_bytes : task_.value_D * element_size(task_.kind);
    const int32_t* const pages =
        task_.block_table + static_cast<int64_t>(item.sequence) * task_.max_pages;
    while (begin < end) {
      const int64_t page = pages[begin / task_.page_size], offset = begin % task_.page_size;
      const int64_t row = (page * task_.kv_heads + item.kv_head) * task_.page_size + offset;
      const char* const key = static_cast<const char*>(task_.key_cache) + row * key_bytes;
      const char* const value = static_cast<const char*>(task_.value_cache) + row * value_bytes;
      const int64_t run = std::min(end - begin, task_.page_size - offset);
      for (int64_t i = 0; i < run; ++i) {
        scratch.key_rows[at + i] = key + i * key_bytes;
        scratch.value_rows[at + i] = value + i * value_bytes;
      }
      if (task_.kind == CacheKind::int8) {
        for (int64_t i = 0; i < run && at + i < kChunk; ++i) {
          scratch.key_scales[at + i] = task_.key_scale[row + i];
          scratch.value_scales[at + i] = task_.value_scale[row + i];
        }
      }
      begin += run;
      at += run;
    }
    return at;
  }

  void start_total(const Item& item, const Running& total) const {
    clear(total, rows_of(item), value_stride_);
    if (task_.sinks == nullptr) return;
    for (int r = 0; r < rows_of(item); ++r) {
      total.maximum[r] = task_.sinks[item.kv_head * group_ + r % group_];
      total.sum[r] = std::isinf(total.maximum[r]) ? 0.0f : 1.0f;
    }
  }

  void finish(const Item& item, const Running& total) const {
    const float scale = task_.kind == CacheKind::fp8 ? task_.value_scale[item.kv_head] : 1.0f;
    for (int r = 0; r < rows_of(item); ++r) {
      const int64_t token = item.token_begin + r / group_;
      const int64_t head = token * task_.heads + item.kv_head * group_ + r % group_;
      float* out = task_.out + head * task_.value_D;
      const float* values = total.accumulator + static_cast<int64_t>(r) * value_stride_;
      // A row that sees nothing has a sum of 0.
      const float factor = total.sum[r] == 0.0f ? 0.0f : scale / total.sum[r];
      for (int d = 0; d < task_.value_D; ++d) out[d] = values[d] * factor;
    }
  }

  const Attend& task_;
  const int group_, stride_, value_stride_;
  int64_t work_ = 0;           // multiply-adds
  int64_t chunks_ = 0;         // of all items
  std::vector<bool> listed_;   // per sequence
  std::vector<Visible> sees_;  // per row of the batch
  std::vector<Item> items_;
  static thread_local Scratch scratch_;
};

thread_local Scratch Attention::scratch_;

}  // namespace

void attend(const Attend& task) { Attention(task).run(); }

void rope_and_append(const AppendTokens& task) {
  const int64_t channels =
      task.T * (task.D * (task.heads + task.kv_heads) + task.value_D * task.kv_heads);
  auto append = [&](int64_t begin, int64_t end) { kernels().append_tokens(task, begin, end); };
  for_range(task.T, channels >= kParallelAppend, append);
}

}  // namespace fewbits
