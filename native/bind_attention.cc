// fewbits._native: attention. Arrays come as addresses, which the caller keeps alive; what can be
// checked without knowing their sizes is checked here.
#include "bind_attention.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "attention/attention.h"

namespace nb = nanobind;

namespace {

using fewbits::AttentionSpec;
using fewbits::CacheKind;
using fewbits::LayerCache;

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

CacheKind cache_kind(const std::string& name) {
  if (name == "f32") return CacheKind::f32;
  if (name == "bf16") return CacheKind::bf16;
  if (name == "f16") return CacheKind::f16;
  if (name == "fp8") return CacheKind::fp8;
  if (name == "int8") return CacheKind::int8;
  throw std::invalid_argument("the cache's kind is f32, bf16, f16, fp8 or int8, not " + name);
}

void require(bool condition, const std::string& sentence) {
  if (!condition) throw std::invalid_argument(sentence);
}

void check_width(const char* what, int D) {
  require(D > 0 && D <= fewbits::kMaxHeadDim, what + std::to_string(D) + " is not between 1 and " +
                                                  std::to_string(fewbits::kMaxHeadDim));
}

// Addresses are 0 where there is none; what is checked is what can be without the arrays.
void make_spec(AttentionSpec* self, int heads, int kv_heads, int D, int value_D, int rotary_begin,
               int rotary_dim, bool interleaved, uintptr_t q_norm, uintptr_t k_norm, float norm_eps,
               float norm_offset, float scale, int window, uintptr_t sinks) {
  require(kv_heads > 0 && heads > 0 && heads % kv_heads == 0,
          "heads (" + std::to_string(heads) + ") must be a multiple of kv_heads (" +
              std::to_string(kv_heads) + ")");
  check_width("head dimension ", D);
  check_width("width of values ", value_D);
  require(rotary_begin >= 0 && rotary_begin <= D, "rotary_begin (" + std::to_string(rotary_begin) +
                                                      ") must be within the head dimension (" +
                                                      std::to_string(D) + ")");
  require(rotary_dim >= 0 && rotary_dim <= D - rotary_begin && rotary_dim % 2 == 0,
          "rotary_dim (" + std::to_string(rotary_dim) +
              ") must be even and at most what the head dimension (" + std::to_string(D) +
              ") leaves");
  require(window >= 0, "the window can't be negative");
  new (self) AttentionSpec{heads,
                           kv_heads,
                           D,
                           value_D,
                           rotary_begin,
                           rotary_dim,
                           interleaved,
                           at<const float>(q_norm),
                           at<const float>(k_norm),
                           norm_eps,
                           norm_offset,
                           scale,
                           window,
                           at<const float>(sinks)};
}

void make_cache(LayerCache* self, uintptr_t keys, uintptr_t values, int page_size,
                const std::string& kind, uintptr_t k_scale, uintptr_t v_scale) {
  require(page_size > 0, "the page size must be positive");
  const CacheKind stored = cache_kind(kind);
  const bool wanted = stored == CacheKind::fp8 || stored == CacheKind::int8;
  require((k_scale != 0) == wanted && (v_scale != 0) == wanted,
          "k_scale and v_scale go with an fp8 or int8 cache, and with no other");
  require(keys != values || keys == 0 || k_scale == v_scale,
          "keys that hold the values share their scales with them");
  new (self) LayerCache{at<void>(keys), at<void>(values),   page_size,
                        stored,         at<float>(k_scale), at<float>(v_scale)};
}

void rope_and_append(const AttentionSpec& spec, uintptr_t q, uintptr_t k, uintptr_t v,
                     const BoundStep& step, const LayerCache& cache, uintptr_t cos, uintptr_t sin) {
  check_fit(spec, cache);
  const fewbits::Rotation rotation = {at<const float>(cos), at<const float>(sin)};
  fewbits::rope_and_append(
      {spec, cache, step, rotation, at<float>(q), at<const float>(k), at<const float>(v)});
}

void attend(const AttentionSpec& spec, uintptr_t q, uintptr_t out, const BoundStep& step,
            const LayerCache& cache) {
  check_fit(spec, cache);
  check_fit(step, cache);
  fewbits::attend({spec, cache, step, at<const float>(q), at<float>(out)});
}

}  // namespace

BoundStep::BoundStep(Longs slots, Longs positions, Ints query_start, Ints kv_len, Table block_table,
                     std::optional<Mask> mask, std::optional<Longs> wanted)
    : Step{static_cast<int64_t>(slots.shape(0)),
           slots.data(),
           positions.data(),
           static_cast<int>(kv_len.shape(0)),
           query_start.data(),
           kv_len.data(),
           block_table.data(),
           static_cast<int>(block_table.shape(1)),
           mask ? mask->data() : nullptr},
      slots_(std::move(slots)),
      positions_(std::move(positions)),
      query_start_(std::move(query_start)),
      kv_len_(std::move(kv_len)),
      table_(std::move(block_table)),
      mask_(std::move(mask)) {
  const auto rows = static_cast<size_t>(T), all = static_cast<size_t>(sequences);
  require(positions_.shape(0) == rows && query_start_.shape(0) == all + 1 &&
              table_.shape(0) == all &&
              (!mask_ || (mask_->shape(0) == rows && mask_->shape(1) == rows)),
          "the arrays of a step don't fit together");
  for (int64_t t = 0; t < T; ++t) {
    const bool slot = Step::slots[t] < 0, position = Step::positions[t] < 0;
    if (slot || position) {
      throw std::invalid_argument("token " + std::to_string(t) + " has a negative " +
                                  (slot ? "slot" : "position"));
    }
    highest = std::max(highest, Step::positions[t]);
  }
  require(Step::query_start[0] == 0 && Step::query_start[sequences] == T,
          "query_start must begin with 0 and end with the number of tokens");
  for (int s = 0; s < sequences; ++s) {
    const int64_t its = Step::query_start[s + 1] - Step::query_start[s];
    if (its >= 0 && Step::kv_len[s] >= its) continue;
    throw std::invalid_argument("sequence " + std::to_string(s) +
                                (its < 0 ? ": query_start must not decrease"
                                         : ": kv_len counts the rows of the batch too"));
  }
  if (wanted && wanted->shape(0) != rows) find_last(wanted->data(), wanted->shape(0));
}

// They fit where they are the last of their sequences and see all before them.
void BoundStep::find_last(const int64_t* wanted, int64_t count) {
  const auto made = std::make_shared<Made>();
  last_ = made;
  int64_t r = 0;
  made->start.push_back(0);
  for (int s = 0; s < sequences; ++s) {
    const int64_t begin = query_start[s], end = query_start[s + 1];
    while (r < count && wanted[r] >= begin && wanted[r] < end) {
      const int64_t next = r + 1 < count ? wanted[r + 1] : T;
      if (wanted[r] + 1 < end ? next != wanted[r] + 1 : next < end) return;
      made->slots.push_back(slots[wanted[r]]);
      made->positions.push_back(positions[wanted[r++]]);
    }
    made->start.push_back(static_cast<int32_t>(r));
  }
  if (r != count || mask) return;
  made->numbers.assign(wanted, wanted + count);
  made->last = {made->numbers.data(), *this};
  fewbits::Step& step = made->last.step;
  step.T = count;
  step.slots = made->slots.data();
  step.positions = made->positions.data();
  step.query_start = made->start.data();
  made->fits = true;
}

const fewbits::LastRows* BoundStep::last() const {
  require(!last_ || last_->fits,
          "the wanted rows aren't the last of their sequences, or a mask says what they see");
  return last_ ? &last_->last : nullptr;
}

std::optional<std::vector<int64_t>> BoundStep::wanted() const {
  if (!last()) return {};
  return last_->numbers;
}

BoundStep BoundStep::with(const fewbits::Step& step, std::shared_ptr<const Made> made) const {
  BoundStep other(*this);
  static_cast<fewbits::Step&>(other) = step;
  other.own_ = std::move(made);
  other.last_ = nullptr;
  return other;
}

BoundStep BoundStep::of_last() const {
  const fewbits::LastRows* const rows = last();
  return rows ? with(rows->step, last_) : *this;
}

std::vector<BoundStep> BoundStep::ahead(const std::vector<int>& rows, int page_size) const {
  std::vector<BoundStep> steps;
  for (size_t i = 0; i < rows.size(); ++i) {
    require(rows[i] >= 0 && rows[i] <= (i ? rows[i - 1] : sequences) && page_size > 0,
            "steps ahead have no more sequences than the one before");
    const auto made = std::make_shared<Made>();
    made->start.push_back(0);
    int64_t farthest = 0;
    for (int s = 0; s < rows[i]; ++s) {
      const int64_t position = kv_len[s] + static_cast<int64_t>(i), page = position / page_size;
      require(page < max_pages, "the block table has no page for a step ahead");
      made->slots.push_back(block_table[int64_t{s} * max_pages + page] * int64_t{page_size} +
                            position % page_size);
      made->positions.push_back(position);
      made->lengths.push_back(static_cast<int32_t>(position + 1));
      made->start.push_back(s + 1);
      farthest = std::max(farthest, position);
    }
    const fewbits::Step step = {rows[i],     made->slots.data(), made->positions.data(),
                                rows[i],     made->start.data(), made->lengths.data(),
                                block_table, max_pages,          nullptr};
    steps.push_back(with(step, made));
    steps.back().highest = farthest;
  }
  return steps;
}

void bind_attention(nb::module_& module) {
  using nb::arg;
  const auto unlocked = nb::call_guard<nb::gil_scoped_release>();
  nb::class_<AttentionSpec>(module, "AttentionSpec")
      .def("__init__", &make_spec, arg("heads"), arg("kv_heads"), arg("D"), arg("value_D"),
           arg("rotary_begin"), arg("rotary_dim"), arg("interleaved"), arg("q_norm"), arg("k_norm"),
           arg("norm_eps"), arg("norm_offset"), arg("scale"), arg("window"), arg("sinks"))
      .def("rope_and_append", &rope_and_append, arg("q"), arg("k"), arg("v"), arg("step"),
           arg("cache"), arg("cos"), arg("sin"), unlocked)
      .def("attend", &attend, arg("q"), arg("out"), arg("step"), arg("cache"), unlocked);
  nb::class_<LayerCache>(module, "LayerCache")
      .def("__init__", &make_cache, arg("keys"), arg("values"), arg("page_size"), arg("kind"),
           arg("k_scale"), arg("v_scale"));
  nb::class_<BoundStep>(module, "Step")
      .def(nb::init<BoundStep::Longs, BoundStep::Longs, BoundStep::Ints, BoundStep::Ints,
                    BoundStep::Table, std::optional<BoundStep::Mask>,
                    std::optional<BoundStep::Longs>>(),
           arg("slots"), arg("positions"), arg("query_start"), arg("kv_len"), arg("block_table"),
           arg("mask").none(), arg("wanted").none() = nb::none())
      .def("of_last", &BoundStep::of_last)
      .def("ahead", &BoundStep::ahead, arg("rows"), arg("page_size"))
      .def_prop_ro("wanted", &BoundStep::wanted)
      .def_ro("T", &BoundStep::T)
      .def_ro("highest", &BoundStep::highest);
}
