// New tokens into the cache, written once over the sixteen lanes of elementwise/lanes.h; for tier
// files.
#pragma once

#include <stdint.h>

#include "attention/attention.h"
#include "attention/cached.h"
#include "elementwise/lanes.h"

namespace fewbits {
namespace {

// x / sqrt(mean(x^2) + eps) * (weight + offset), in place.
inline void norm_head(float* x, const float* weight, int D, float eps, float offset) {
  Lanes squares = zero();
  for (int d = 0; d < D; d += kLanes) {
    const Lanes value = load_part(x + d, D - d);
    squares = multiply_add(value, value, squares);
  }
  const float mean = sum_lanes(squares) / static_cast<float>(D);
  const Lanes factor = broadcast(1.0f / __builtin_sqrtf(mean + eps));
  for (int d = 0; d < D; d += kLanes) {
    const Lanes weights = add(load_part(weight + d, D - d), broadcast(offset));
    store_part(x + d, multiply(multiply(load_part(x + d, D - d), factor), weights), D - d);
  }
}

// In place. `cos` and `sin` hold one entry per pair, or per channel with the sine's sign where
// interleaved.
inline void rotate_head(float* x, const float* cos, const float* sin, int rotary_dim,
                        bool interleaved) {
  if (interleaved) {
    for (int d = 0; d < rotary_dim; d += kLanes) {
      const int count = rotary_dim - d;
      const Lanes value = load_part(x + d, count);
      const Lanes turned = multiply(swap_pairs(value), load_part(sin + d, count));
      store_part(x + d, multiply_add(value, load_part(cos + d, count), turned), count);
    }
    return;
  }
  const int half = rotary_dim / 2;
  for (int d = 0; d < half; d += kLanes) {
    const int count = half - d;
    const Lanes low = load_part(x + d, count), high = load_part(x + half + d, count);
    const Lanes c = load_part(cos + d, count), s = load_part(sin + d, count);
    store_part(x + d, subtract(multiply(low, c), multiply(high, s)), count);
    store_part(x + half + d, multiply_add(high, c, multiply(low, s)), count);
  }
}

// The scale of an int8 row: max |x| / 127, 0 where that is subnormal, NaN where x isn't finite.
inline float row_scale(const float* x, int D) {
  Lanes largest = zero(), finite = zero();
  for (int d = 0; d < D; d += kLanes) {
    const Lanes value = load_part(x + d, D - d);
    largest = maximum(largest, subtract(zero(), minus_magnitude(value)));
    finite = multiply_add(value, zero(), finite);  // infinity * 0 is NaN
  }
  const float scale = maximum_lanes(largest) / 127.0f;
  const float normal = scale < 0x1p-126f ? 0.0f : scale;
  return normal + sum_lanes(finite);
}

// `scale` is read for fp8, stored for int8 and otherwise null.
template <CacheKind kind>
void store_cached(const float* x, float* scale, void* row, int D) {
  using Element = typename CacheElement<kind>::Type;
  Element* target = static_cast<Element*>(row);
  if constexpr (kind == CacheKind::int8) *scale = row_scale(x, D);
  for (int d = 0; d < D; d += kLanes) {
    Lanes value = load_part(x + d, D - d);
    if constexpr (element_size(kind) == 1) value = divide(value, broadcast(*scale));
    if (d + kLanes <= D) {
      store_elements<kind>(target + d, value);
      continue;
    }
    Element part[kLanes];
    store_elements<kind>(part, value);
    for (int i = 0; i < D - d; ++i) target[d + i] = part[i];
  }
}

template <CacheKind kind>
void append_tokens(const AppendTokens& task, int64_t begin, int64_t end) {
  using Element = typename CacheElement<kind>::Type;
  const int D = task.D, half = task.rotary_dim / 2;
  float pair_cos[kMaxHeadDim], pair_sin[kMaxHeadDim], head[kMaxHeadDim];
  for (int64_t t = begin; t < end; ++t) {
    const float* cos = task.cos + task.positions[t] * half;
    const float* sin = task.sin + task.positions[t] * half;
    if (task.interleaved) {
      for (int i = 0; i < half; ++i) {
        pair_cos[2 * i] = pair_cos[2 * i + 1] = cos[i];
        pair_sin[2 * i] = -sin[i];
        pair_sin[2 * i + 1] = sin[i];
      }
      cos = pair_cos;
      sin = pair_sin;
    }
    for (int h = 0; h < task.heads; ++h) {
      float* query = task.query + (t * task.heads + h) * D;
      if (task.query_norm) norm_head(query, task.query_norm, D, task.norm_eps, task.norm_offset);
      rotate_head(query + task.rotary_begin, cos, sin, task.rotary_dim, task.interleaved);
    }
    const int64_t page = task.slots[t] / task.page_size, offset = task.slots[t] % task.page_size;
    for (int h = 0; h < task.kv_heads; ++h) {
      const float* key = task.key + (t * task.kv_heads + h) * D;
      const float* value = task.value + (t * task.kv_heads + h) * task.value_D;
      const int64_t row = (page * task.kv_heads + h) * task.page_size + offset;
      for (int d = 0; d < D; d += kLanes) {
        store_part(head + d, load_part(key + d, D - d), D - d);
      }
      if (task.key_norm) norm_head(head, task.key_norm, D, task.norm_eps, task.norm_offset);
      rotate_head(head + task.rotary_begin, cos, sin, task.rotary_dim, task.interleaved);
      const int64_t scale = kind == CacheKind::int8 ? row : h;
      store_cached<kind>(head, task.key_scale + scale,
                         static_cast<Element*>(task.key_cache) + row * D, D);
      if (task.value_cache == task.key_cache) continue;
      store_cached<kind>(value, task.value_scale + scale,
                         static_cast<Element*>(task.value_cache) + row * task.value_D,
                         task.value_D);
    }
  }
}

inline void append_tokens(const AppendTokens& task, int64_t begin, int64_t end) {
  switch (task.kind) {
    case CacheKind::f32:
      return append_tokens<CacheKind::f32>(task, begin, end);
    case CacheKind::bf16:
      return append_tokens<CacheKind::bf16>(task, begin, end);
    case CacheKind::f16:
      return append_tokens<CacheKind::f16>(task, begin, end);
    case CacheKind::fp8:
      return append_tokens<CacheKind::fp8>(task, begin, end);
    case CacheKind::int8:
      return append_tokens<CacheKind::int8>(task, begin, end);
  }
}

}  // namespace
}  // namespace fewbits
