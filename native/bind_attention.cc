// fewbits._native: attention. Arrays come as addresses, which the caller keeps alive; what can be
// checked without knowing their sizes is checked here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "attention/attention.h"

namespace nb = nanobind;

namespace {

using fewbits::CacheKind;

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void require(bool condition, const std::string& sentence) {
  if (!condition) throw std::invalid_argument(sentence);
}

CacheKind cache_kind(const std::string& name) {
  if (name == "f32") return CacheKind::f32;
  if (name == "bf16") return CacheKind::bf16;
  if (name == "f16") return CacheKind::f16;
  if (name == "fp8") return CacheKind::fp8;
  if (name == "int8") return CacheKind::int8;
  throw std::invalid_argument("the cache's kind is f32, bf16, f16, fp8 or int8, not " + name);
}

void check_width(const char* what, int D) {
  require(D > 0 && D <= fewbits::kMaxHeadDim, what + std::to_string(D) + " is not between 1 and " +
                                                  std::to_string(fewbits::kMaxHeadDim));
}

void check_shape(int64_t T, int heads, int kv_heads, int D, int value_D, int page_size) {
  require(T >= 0, "the number of tokens can't be negative");
  require(kv_heads > 0 && heads > 0 && heads % kv_heads == 0,
          "heads (" + std::to_string(heads) + ") must be a multiple of kv_heads (" +
              std::to_string(kv_heads) + ")");
  check_width("head dimension ", D);
  check_width("width of values ", value_D);
  require(page_size > 0, "the page size must be positive");
}

// Keys that hold the values, too.
void check_shared(uintptr_t k_cache, uintptr_t v_cache, uintptr_t k_scale, uintptr_t v_scale, int D,
                  int value_D) {
  if (k_cache != v_cache || k_cache == 0) return;
  require(value_D <= D, "values of " + std::to_string(value_D) + " numbers aren't within keys of " +
                            std::to_string(D));
  require(k_scale == v_scale, "keys that hold the values share their scales with them");
}

void check_scales(CacheKind kind, uintptr_t k_scale, uintptr_t v_scale) {
  const bool wanted = kind == CacheKind::fp8 || kind == CacheKind::int8;
  require((k_scale != 0) == wanted && (v_scale != 0) == wanted,
          "k_scale and v_scale go with an fp8 or int8 cache, and with no other");
}

void rope_and_append(uintptr_t q, uintptr_t k, uintptr_t v, int64_t T, int heads, int kv_heads,
                     int D, int value_D, int rotary_begin, int rotary_dim, bool interleaved,
                     uintptr_t cos, uintptr_t sin, uintptr_t q_norm, uintptr_t k_norm,
                     float norm_eps, float norm_offset, uintptr_t slots, uintptr_t k_cache,
                     uintptr_t v_cache, int page_size, const std::string& kind, uintptr_t k_scale,
                     uintptr_t v_scale) {
  check_shape(T, heads, kv_heads, D, value_D, page_size);
  require(rotary_begin >= 0 && rotary_begin <= D, "rotary_begin (" + std::to_string(rotary_begin) +
                                                      ") must be within the head dimension (" +
                                                      std::to_string(D) + ")");
  require(rotary_dim >= 0 && rotary_dim <= D - rotary_begin && rotary_dim % 2 == 0,
          "rotary_dim (" + std::to_string(rotary_dim) +
              ") must be even and at most what the head dimension (" + std::to_string(D) +
              ") leaves");
  fewbits::AppendTokens task;
  task.query = at<float>(q);
  task.key = at<const float>(k);
  task.value = at<const float>(v);
  task.heads = heads;
  task.kv_heads = kv_heads;
  task.D = D;
  task.value_D = value_D;
  task.rotary_begin = rotary_begin;
  task.rotary_dim = rotary_dim;
  task.interleaved = interleaved;
  task.cos = at<const float>(cos);
  task.sin = at<const float>(sin);
  task.query_norm = at<const float>(q_norm);
  task.key_norm = at<const float>(k_norm);
  task.norm_eps = norm_eps;
  task.norm_offset = norm_offset;
  task.slots = at<const int64_t>(slots);
  task.key_cache = at<void>(k_cache);
  task.value_cache = at<void>(v_cache);
  task.page_size = page_size;
  task.kind = cache_kind(kind);
  task.key_scale = at<float>(k_scale);
  task.value_scale = at<float>(v_scale);
  check_scales(task.kind, k_scale, v_scale);
  check_shared(k_cache, v_cache, k_scale, v_scale, D, value_D);
  for (int64_t t = 0; t < T; ++t) {
    require(task.slots[t] >= 0, "token " + std::to_string(t) + " has a negative slot");
  }
  fewbits::rope_and_append(task, T);
}

void attend(uintptr_t q, uintptr_t out, int64_t T, int heads, int kv_heads, int D, int value_D,
            uintptr_t query_start, int sequences, uintptr_t kv_len, uintptr_t block_table,
            int max_pages, uintptr_t positions, uintptr_t k_cache, uintptr_t v_cache, int page_size,
            const std::string& kind, uintptr_t k_scale, uintptr_t v_scale, float scale, int window,
            uintptr_t sinks, uintptr_t mask) {
  check_shape(T, heads, kv_heads, D, value_D, page_size);
  require(sequences >= 0, "the number of sequences can't be negative");
  require(window >= 0, "the window can't be negative");
  fewbits::Attend task;
  task.query = at<const float>(q);
  task.out = at<float>(out);
  task.T = T;
  task.heads = heads;
  task.kv_heads = kv_heads;
  task.D = D;
  task.value_D = value_D;
  task.sequences = sequences;
  task.query_start = at<const int32_t>(query_start);
  task.kv_len = at<const int32_t>(kv_len);
  task.block_table = at<const int32_t>(block_table);
  task.max_pages = max_pages;
  task.positions = at<const int64_t>(positions);
  task.key_cache = at<const void>(k_cache);
  task.value_cache = at<const void>(v_cache);
  task.page_size = page_size;
  task.kind = cache_kind(kind);
  task.key_scale = at<const float>(k_scale);
  task.value_scale = at<const float>(v_scale);
  task.scale = scale;
  task.window = window;
  task.sinks = at<const float>(sinks);
  task.mask = at<const uint8_t>(mask);
  check_scales(task.kind, k_scale, v_scale);
  check_shared(k_cache, v_cache, k_scale, v_scale, D, value_D);
  require(task.query_start[0] == 0 && task.query_start[sequences] == T,
          "query_start must begin with 0 and end with the number of tokens");
  for (int s = 0; s < sequences; ++s) {
    const int64_t rows = task.query_start[s + 1] - task.query_start[s];
    const std::string sequence = "sequence " + std::to_string(s);
    require(rows >= 0, sequence + ": query_start must not decrease");
    require(task.kv_len[s] >= rows, sequence + ": kv_len counts the rows of the batch too");
    require(task.kv_len[s] <= int64_t{max_pages} * page_size,
            sequence + ": kv_len is beyond the pages of the block table");
  }
  fewbits::attend(task);
}

}  // namespace

void bind_attention(nb::module_& module) {
  using nb::arg;
  const auto unlocked = nb::call_guard<nb::gil_scoped_release>();
  module.def(
      "rope_and_append", &rope_and_append, arg("q"), arg("k"), arg("v"), arg("T"), arg("heads"),
      arg("kv_heads"), arg("D"), arg("value_D"), arg("rotary_begin"), arg("rotary_dim"),
      arg("interleaved"), arg("cos"), arg("sin"), arg("q_norm"), arg("k_norm"), arg("norm_eps"),
      arg("norm_offset"), arg("slots"), arg("k_cache"), arg("v_cache"), arg("page_size"),
      arg("cache_kind"), arg("k_scale"), arg("v_scale"), unlocked,
      "Norms and rotates q (in place) and k, and stores k and v in the cache at their slots.");
  module.def("attend", &attend, arg("q"), arg("out"), arg("T"), arg("heads"), arg("kv_heads"),
             arg("D"), arg("value_D"), arg("query_start"), arg("sequences"), arg("kv_len"),
             arg("block_table"), arg("max_pages"), arg("positions"), arg("k_cache"), arg("v_cache"),
             arg("page_size"), arg("cache_kind"), arg("k_scale"), arg("v_scale"), arg("scale"),
             arg("window"), arg("sinks"), arg("mask"), unlocked,
             "Causal attention of T rows over the paged cache; see native/attention/attention.h.");
}
