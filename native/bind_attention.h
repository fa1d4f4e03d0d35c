// What attention works on, as Python gives it, and whether it fits. Every pass checks that:
// sentences are made where one is wrong.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention/attention.h"

// A step that keeps its arrays.
struct BoundStep : fewbits::Step {
  template <typename T, int dimensions>
  using Array = nanobind::ndarray<const T, nanobind::ndim<dimensions>, nanobind::c_contig,
                                  nanobind::device::cpu>;
  using Longs = Array<int64_t, 1>;
  using Ints = Array<int32_t, 1>;
  using Table = Array<int32_t, 2>;
  using Mask = Array<uint8_t, 2>;

  // `wanted`: the rows whose results are, or all.
  BoundStep(Longs slots, Longs positions, Ints query_start, Ints kv_len, Table block_table,
            std::optional<Mask> mask, std::optional<Longs> wanted);

  int64_t highest = 0;  // position

  // The wanted rows, null where all are. Throws std::invalid_argument where they are no pass.
  const fewbits::LastRows* last() const;
  std::optional<std::vector<int64_t>> wanted() const;

  // The pass that the wanted rows are.
  BoundStep of_last() const;
  // Passes behind this one, each of a token more of the first so many sequences, whose pages the
  // block table has.
  std::vector<BoundStep> ahead(const std::vector<int>& rows, int page_size) const;

 private:
  // What a step consists of that is made here.
  struct Made {
    std::vector<int64_t> numbers, slots, positions;
    std::vector<int32_t> start, lengths;
    fewbits::LastRows last;
    bool fits = false;
  };

  void find_last(const int64_t* wanted, int64_t count);
  BoundStep with(const fewbits::Step& step, std::shared_ptr<const Made> made) const;

  Longs slots_, positions_;
  Ints query_start_, kv_len_;
  Table table_;
  std::optional<Mask> mask_;
  std::shared_ptr<const Made> last_;  // where not all rows are wanted
  std::shared_ptr<const Made> own_;   // of a step that is made of another
};

inline void check_fit(const fewbits::AttentionSpec& spec, const fewbits::LayerCache& cache) {
  const bool shared = cache.key_cache == cache.value_cache && cache.key_cache;
  if (!shared || spec.value_D <= spec.D) return;
  throw std::invalid_argument("values of " + std::to_string(spec.value_D) +
                              " numbers aren't within keys of " + std::to_string(spec.D));
}

inline void check_fit(const fewbits::Step& step, const fewbits::LayerCache& cache) {
  for (int s = 0; s < step.sequences; ++s) {
    if (step.kv_len[s] <= int64_t{step.max_pages} * cache.page_size) continue;
    throw std::invalid_argument("sequence " + std::to_string(s) +
                                ": kv_len is beyond the pages of the block table");
  }
}
