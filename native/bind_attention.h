// What attention works on, as Python gives it, and whether it fits. Every pass checks that:
// sentences are made where one is wrong.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <optional>
#include <stdexcept>
#include <string>

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

  BoundStep(Longs slots, Longs positions, Ints query_start, Ints kv_len, Table block_table,
            std::optional<Mask> mask);

  int64_t highest = 0;  // position

 private:
  Longs slots_, positions_;
  Ints query_start_, kv_len_;
  Table table_;
  std::optional<Mask> mask_;
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
