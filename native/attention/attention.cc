#include "attention/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu.h"
#include "elementwise/elementwise.h"
#include "memory.h"
#include "threads.h"

namespace fewbits {
namespace {

// Rows of one kv head that share a reading of the cache: its conversion to f32 is then a small part
// of the work, and rows, keys and values of a block stay in the second-level cache.
constexpr int kRowsPerItem = 64;

// Below these amounts of work (multiply-adds; channels), which take a core some 8 us, waking the
// pool costs more than it saves.
constexpr int64_t kParallelAttend = 1 << 17;
constexpr int64_t kParallelAppend = 1 << 14;

const AttentionKernels& kernels() {
  static const AttentionKernels chosen = [] {
#if defined(__x86_64__)
    if (tier() >= Tier::avx512) return AttentionKernels{attend_block_avx512, append_tokens_avx512};
    if (tier() >= Tier::avx2) return AttentionKernels{attend_block_avx2, append_tokens_avx2};
#endif
    return AttentionKernels{attend_block_ref, append_tokens_ref};
  }();
  return chosen;
}

int64_t element_size(CacheKind kind) {
  return kind == CacheKind::f32 ? 4 : kind == CacheKind::fp8 ? 1 : 2;
}

// The softmax of some rows over some positions. Contiguous, so that it can be kept between two
// phases: [rows] maxima, [rows] sums, [rows][stride] weighted values.
struct Part {
  float* maximum;
  float* sum;
  float* accumulator;

  Part(float* memory, int rows, int stride)
      : maximum(memory + static_cast<int64_t>(rows) * stride),
        sum(maximum + rows),
        accumulator(memory) {}

  static int64_t floats(int rows, int stride) {
    return (static_cast<int64_t>(rows) * (stride + 2) + 15) / 16 * 16;
  }

  void clear(int rows, int stride) {
    std::fill_n(maximum, rows, -std::numeric_limits<float>::infinity());
    std::fill_n(sum, rows, 0.0f);
    std::fill_n(accumulator, static_cast<int64_t>(rows) * stride, 0.0f);
  }

  // Adds a part that covers later positions.
  void merge(const Part& later, int rows, int stride) {
    for (int r = 0; r < rows; ++r) {
      if (later.sum[r] == 0.0f) continue;
      const float now = std::max(maximum[r], later.maximum[r]);
      float weights[2] = {maximum[r] - now, later.maximum[r] - now};
      exp_negative(weights, weights, 2);
      maximum[r] = now;
      sum[r] = sum[r] * weights[0] + later.sum[r] * weights[1];
      float* mine = accumulator + static_cast<int64_t>(r) * stride;
      const float* other = later.accumulator + static_cast<int64_t>(r) * stride;
      for (int d = 0; d < stride; ++d) mine[d] = mine[d] * weights[0] + other[d] * weights[1];
    }
  }
};

// Some query rows of one sequence for one kv head, over the blocks of [begin, end) positions. Its
// rows are (token, head within the group), token by token.
struct Item {
  int sequence, kv_head;
  int token_begin, token_end;  // rows of the batch
  int64_t begin, end;          // positions; begin is a multiple of kKeyBlock
};

// What one row of the batch sees: positions [first, last). In a listed sequence, those from `past`
// on are the sequence's rows listed[position - past].
struct Visible {
  int64_t first, last;
  std::vector<int32_t> listed;
};

int past_of(const Attend& task, int sequence) {
  return task.kv_len[sequence] - (task.query_start[sequence + 1] - task.query_start[sequence]);
}

// Whether the rows of a sequence must be looked up one by one: they see a choice of each other.
bool is_listed(const Attend& task, int sequence) {
  if (task.mask) return true;
  if (task.window == 0) return false;
  const int begin = task.query_start[sequence], end = task.query_start[sequence + 1];
  for (int t = begin; t < end; ++t) {
    if (task.positions[t] != past_of(task, sequence) + (t - begin)) return true;
  }
  return false;
}

Visible visible_to(const Attend& task, int sequence, int token, bool listed) {
  const int begin = task.query_start[sequence], end = task.query_start[sequence + 1];
  const int64_t past = past_of(task, sequence);
  const int64_t lowest = task.window ? task.positions[token] - task.window + 1 : INT64_MIN;
  if (!listed) {
    const int64_t last = past + (token - begin) + 1;
    return {std::clamp<int64_t>(lowest, 0, last), last, {}};
  }
  Visible sees{std::clamp<int64_t>(lowest, 0, past), past, {}};
  for (int other = begin; other < end; ++other) {
    const bool ancestor = task.mask ? task.mask[token * task.T + other] != 0 : other <= token;
    if (!ancestor) continue;
    const bool in_window = task.window == 0 || task.positions[other] >= lowest;
    // Ancestors that the window has left keep their position, as older entries do.
    const bool none_seen = sees.first == past + static_cast<int64_t>(sees.listed.size());
    if (!in_window && !none_seen) continue;
    sees.listed.push_back(other - begin);
    if (!in_window) ++sees.first;
  }
  sees.last = past + static_cast<int64_t>(sees.listed.size());
  return sees;
}

// A thread's working memory, kept from call to call.
struct Scratch {
  Buffer buffer;
  float *query, *keys, *values, *scores;
  float *part, *total;
  int32_t *first, *last;
  const void* key_rows[kKeyBlock + kLookAhead];
  const void* value_rows[kKeyBlock + kLookAhead];

  void reserve(int rows, int stride) {
    const int64_t query_floats = static_cast<int64_t>(rows) * stride;
    const int64_t block_floats = static_cast<int64_t>(kKeyBlock) * stride;
    const int64_t score_floats = static_cast<int64_t>(rows) * kKeyBlock;
    const int64_t part_floats = Part::floats(rows, stride);
    const int64_t range_floats = (rows + 15) / 16 * 16;
    const int64_t floats =
        query_floats + 2 * block_floats + score_floats + 2 * part_floats + 2 * range_floats;
    if (buffer.bytes() < floats * sizeof(float)) buffer = Buffer(floats * sizeof(float));
    query = buffer.as<float>();
    keys = query + query_floats;
    values = keys + block_floats;
    scores = values + block_floats;
    part = scores + score_floats;
    total = part + part_floats;
    first = reinterpret_cast<int32_t*>(total + part_floats);
    last = first + range_floats;
  }
};

class Attention {
 public:
  explicit Attention(const Attend& task)
      : task_(task), group_(task.heads / task.kv_heads), stride_((task.D + 15) / 16 * 16) {
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
    if (parallel && static_cast<int64_t>(items_.size()) < 4 * thread_count()) {
      run_split();
      return;
    }
    auto run_items = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) run_item(items_[i], nullptr);
    };
    for_range(static_cast<int64_t>(items_.size()), parallel, run_items);
  }

 private:
  int rows_of(const Item& item) const { return (item.token_end - item.token_begin) * group_; }

  // The last rows of a prompt see most, so they start first.
  void add_items(int sequence) {
    const int begin = task_.query_start[sequence], end = task_.query_start[sequence + 1];
    const int tokens = std::max(1, kRowsPerItem / group_);
    for (int h = 0; h < task_.kv_heads; ++h) {
      for (int token_end = end; token_end > begin; token_end -= tokens) {
        Item item{sequence, h, std::max(begin, token_end - tokens), token_end, INT64_MAX, 0};
        for (int t = item.token_begin; t < token_end; ++t) {
          const Visible& sees = sees_[t];
          item.begin = std::min(item.begin, sees.first / kKeyBlock * kKeyBlock);
          item.end = std::max(item.end, sees.last);
          work_ += 2 * (sees.last - sees.first) * group_ * task_.D;
        }
        items_.push_back(item);
      }
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
      offsets.push_back(offsets.back() + Part::floats(rows_of(chunk), stride_));
    }
    const Buffer parts(offsets.back() * sizeof(float));
    auto run_chunks = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        run_item(chunks[i], parts.as<float>() + offsets[i]);
      }
    };
    for_range(static_cast<int64_t>(chunks.size()), true, run_chunks);
    auto merge_items = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int rows = rows_of(items_[i]);
        scratch_.reserve(rows, stride_);
        Part total(scratch_.total, rows, stride_);
        start_total(items_[i], total);
        for (int64_t c = first_chunk[i]; c < first_chunk[i + 1]; ++c) {
          total.merge(Part(parts.as<float>() + offsets[c], rows, stride_), rows, stride_);
        }
        finish(items_[i], total);
      }
    };
    for_range(static_cast<int64_t>(items_.size()), false, merge_items);
  }

  // With `part_memory` the item is one chunk, and its part is left there.
  void run_item(const Item& item, float* part_memory) {
    Scratch& scratch = scratch_;
    const int rows = rows_of(item), tokens = item.token_end - item.token_begin;
    scratch.reserve(rows, stride_);
    load_queries(item, scratch.query);
    Part part(part_memory ? part_memory : scratch.part, rows, stride_);
    Part total(scratch.total, rows, stride_);
    if (part_memory) {
      part.clear(rows, stride_);
    } else {
      start_total(item, total);
    }
    const int64_t past = past_of(task_, item.sequence);
    const int64_t shared_end = listed_[item.sequence] ? past / kKeyBlock * kKeyBlock : item.end;
    for (int64_t block = item.begin; block < item.end; block += kKeyBlock) {
      if (!part_memory && (block == item.begin || block % kChunk == 0)) part.clear(rows, stride_);
      if (block < shared_end) {
        run_block(scratch, item, part, 0, tokens, block, std::min(shared_end, item.end));
      } else {
        for (int t = 0; t < tokens; ++t) run_block(scratch, item, part, t, t + 1, block, block);
      }
      const int64_t next = block + kKeyBlock;
      const bool ends_chunk = next >= item.end || next % kChunk == 0;
      if (ends_chunk && !part_memory) total.merge(part, rows, stride_);
    }
    if (!part_memory) finish(item, total);
  }

  void load_queries(const Item& item, float* query) const {
    const float scale = task_.scale * (task_.key_scale ? task_.key_scale[item.kv_head] : 1.0f);
    for (int t = item.token_begin; t < item.token_end; ++t) {
      const float* source =
          task_.query + (static_cast<int64_t>(t) * task_.heads + item.kv_head * group_) * task_.D;
      for (int g = 0; g < group_; ++g, query += stride_, source += task_.D) {
        for (int d = 0; d < task_.D; ++d) query[d] = source[d] * scale;
      }
    }
  }

  // The rows of the item's tokens [token_begin, token_end) against one block. Positions below
  // `shared_end` are the same entries for all of them.
  void run_block(Scratch& scratch, const Item& item, const Part& part, int token_begin,
                 int token_end, int64_t block_begin, int64_t shared_end) {
    int64_t lowest = INT64_MAX, highest = 0;
    for (int t = token_begin; t < token_end; ++t) {
      const Visible& sees = sees_[item.token_begin + t];
      const int first =
          static_cast<int>(std::clamp<int64_t>(sees.first - block_begin, 0, kKeyBlock));
      const int last = static_cast<int>(std::clamp<int64_t>(sees.last - block_begin, 0, kKeyBlock));
      std::fill_n(scratch.first + t * group_, group_, first);
      std::fill_n(scratch.last + t * group_, group_, last);
      if (sees.first >= sees.last) continue;
      lowest = std::min(lowest, sees.first);
      highest = std::max(highest, sees.last);
    }
    if (lowest >= block_begin + kKeyBlock || highest <= block_begin) return;
    const int begin = static_cast<int>(std::max<int64_t>(lowest - block_begin, 0));
    const int end = static_cast<int>(std::min<int64_t>(highest - block_begin, kKeyBlock));
    const int64_t look_ahead =
        std::min({highest, shared_end, block_begin + kKeyBlock + kLookAhead});
    fill_pointers(scratch, item, sees_[item.token_begin + token_begin], block_begin,
                  block_begin + begin, std::max(block_begin + end, look_ahead));
    AttendBlock task;
    const int64_t row = static_cast<int64_t>(token_begin) * group_;
    task.rows = (token_end - token_begin) * group_;
    task.D = task_.D;
    task.stride = stride_;
    task.kind = task_.kind;
    task.query = scratch.query + row * stride_;
    task.keys = scratch.key_rows;
    task.values = scratch.value_rows;
    task.begin = begin;
    task.end = end;
    task.first = scratch.first + row;
    task.last = scratch.last + row;
    task.maximum = part.maximum + row;
    task.sum = part.sum + row;
    task.accumulator = part.accumulator + row * stride_;
    task.key_scratch = scratch.keys;
    task.value_scratch = scratch.values;
    task.score_scratch = scratch.scores;
    kernels().attend_block(task);
  }

  // Addresses of positions [begin, end), the first of which is in the block; before and after them
  // the first one's is repeated.
  void fill_pointers(Scratch& scratch, const Item& item, const Visible& sees, int64_t block,
                     int64_t begin, int64_t end) const {
    const int64_t row_bytes = task_.D * element_size(task_.kind);
    const int64_t past = past_of(task_, item.sequence);
    const int32_t* pages =
        task_.block_table + static_cast<int64_t>(item.sequence) * task_.max_pages;
    const auto offset_of = [&](int64_t entry) {
      const int64_t page = pages[entry / task_.page_size];
      return ((page * task_.kv_heads + item.kv_head) * task_.page_size + entry % task_.page_size) *
             row_bytes;
    };
    const char* key_cache = static_cast<const char*>(task_.key_cache);
    const char* value_cache = static_cast<const char*>(task_.value_cache);
    for (int64_t position = begin; position < end;) {
      const bool listed = listed_[item.sequence] && position >= past;
      const int64_t entry = listed ? past + sees.listed[position - past] : position;
      // Entries of one page follow each other.
      int64_t run = 1;
      if (!listed) {
        run = std::min(end - position, task_.page_size - entry % task_.page_size);
        if (listed_[item.sequence]) run = std::min(run, past - position);
      }
      int64_t offset = offset_of(entry);
      for (; run > 0; --run, ++position, offset += row_bytes) {
        scratch.key_rows[position - block] = key_cache + offset;
        scratch.value_rows[position - block] = value_cache + offset;
      }
    }
    const auto repeat_first = [&](int64_t from, int64_t to) {
      std::fill(scratch.key_rows + from, scratch.key_rows + to, scratch.key_rows[begin - block]);
      std::fill(scratch.value_rows + from, scratch.value_rows + to,
                scratch.value_rows[begin - block]);
    };
    repeat_first(0, begin - block);
    repeat_first(end - block, kKeyBlock + kLookAhead);
  }

  void start_total(const Item& item, Part& total) const {
    total.clear(rows_of(item), stride_);
    if (task_.sinks == nullptr) return;
    for (int r = 0; r < rows_of(item); ++r) {
      total.maximum[r] = task_.sinks[item.kv_head * group_ + r % group_];
      total.sum[r] = std::isinf(total.maximum[r]) ? 0.0f : 1.0f;
    }
  }

  void finish(const Item& item, const Part& total) const {
    const float scale = task_.value_scale ? task_.value_scale[item.kv_head] : 1.0f;
    for (int r = 0; r < rows_of(item); ++r) {
      const int64_t token = item.token_begin + r / group_;
      float* out = task_.out + (token * task_.heads + item.kv_head * group_ + r % group_) * task_.D;
      const float* values = total.accumulator + static_cast<int64_t>(r) * stride_;
      // A row that sees nothing has a sum of 0.
      const float factor = total.sum[r] == 0.0f ? 0.0f : scale / total.sum[r];
      for (int d = 0; d < task_.D; ++d) out[d] = values[d] * factor;
    }
  }

  const Attend& task_;
  const int group_, stride_;
  int64_t work_ = 0;           // multiply-adds
  std::vector<bool> listed_;   // per sequence
  std::vector<Visible> sees_;  // per row of the batch
  std::vector<Item> items_;
  static thread_local Scratch scratch_;
};

thread_local Scratch Attention::scratch_;

}  // namespace

void attend(const Attend& task) { Attention(task).run(); }

void rope_and_append(const AppendTokens& task, int64_t T) {
  const int64_t channels = T * task.D * (task.heads + 2 * task.kv_heads);
  auto append = [&](int64_t begin, int64_t end) { kernels().append_tokens(task, begin, end); };
  for_range(T, channels >= kParallelAppend, append);
}

}  // namespace fewbits
