// The elementwise kernels, written once over sixteen lanes; each tier's file includes this.
#pragma once

#include <stdint.h>

#include "elementwise/elementwise.h"
#include "elementwise/lanes.h"

namespace fewbits {
namespace {

// The elements of a row of `count` that are left from i on, as the partial forms of lanes.h want
// them.
inline int left(int64_t count, int64_t i) {
  return count - i < kLanes ? static_cast<int>(count - i) : kLanes;
}

inline void rms_norm_rows(const float* x, const float* weight, float* y, int64_t rows, int64_t H,
                          float eps, float offset) {
  constexpr int kSums = 4;  // independent sums hide the latency of an addition
  for (int64_t row = 0; row < rows; ++row, x += H, y += H) {
    Lanes squares[kSums] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + kSums * kLanes <= H; i += kSums * kLanes) {
      for (int s = 0; s < kSums; ++s) {
        const Lanes value = load(x + i + s * kLanes);
        squares[s] = multiply_add(value, value, squares[s]);
      }
    }
    for (; i < H; i += kLanes) {
      const Lanes value = load_part(x + i, left(H, i));
      squares[0] = multiply_add(value, value, squares[0]);
    }
    const Lanes sum = add(add(squares[0], squares[1]), add(squares[2], squares[3]));
    const float mean = sum_lanes(sum) / static_cast<float>(H);
    const Lanes factor = broadcast(1.0f / __builtin_sqrtf(mean + eps));
    for (i = 0; i < H; i += kLanes) {
      const int count = left(H, i);
      const Lanes weights = add(load_part(weight + i, count), broadcast(offset));
      store_part(y + i, multiply(multiply(load_part(x + i, count), factor), weights), count);
    }
  }
}

// x times the sigmoid of `scaled`. With t = e^-|s|: 1 / (1 + e^-s) is 1 / (1 + t) for s >= 0 and
// t / (1 + t) below; nothing overflows.
inline Lanes times_sigmoid(Lanes x, Lanes scaled) {
  const Lanes t = exp_lanes(minus_magnitude(scaled));
  const Lanes numerator = where_negative(scaled, t, broadcast(1.0f));
  return divide(multiply(x, numerator), add(broadcast(1.0f), t));
}

// What is bounded passes NaN.
inline void gated_range(const float* gate, const float* up, float* y, int64_t count,
                        Gating gating) {
  const bool bounded = gating.limit > 0;
  const Lanes most = broadcast(gating.limit), least = broadcast(-gating.limit);
  for (int64_t i = 0; i < count; i += kLanes) {
    const int part = left(count, i);
    Lanes x = load_part(gate + i, part);
    Lanes factor = load_part(up + i, part);
    if (bounded) factor = maximum(least, minimum(most, factor));
    if (gating.kind == Gating::Kind::silu) {
      x = times_sigmoid(x, x);
      if (bounded) x = minimum(most, x);
    } else {
      if (bounded) x = minimum(most, x);
      x = times_sigmoid(x, multiply(broadcast(1.702f), x));
      factor = add(factor, broadcast(1.0f));
    }
    store_part(y + i, multiply(x, factor), part);
  }
}

inline void exp_range(const float* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int part = left(count, i);
    store_part(y + i, exp_lanes(load_part(x + i, part)), part);
  }
}

inline float exp_sum_range(const float* x, int64_t count, float largest) {
  constexpr int kSums = 4;
  const Lanes top = broadcast(largest);
  Lanes sums[kSums] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + kSums * kLanes <= count; i += kSums * kLanes) {
    for (int s = 0; s < kSums; ++s) {
      sums[s] = add(sums[s], exp_lanes(subtract(load(x + i + s * kLanes), top)));
    }
  }
  for (; i < count; i += kLanes) {
    float rest[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      rest[lane] = i + lane < count ? x[i + lane] - largest : 2 * kExpLowest;
    }
    sums[0] = add(sums[0], exp_lanes(load(rest)));
  }
  return sum_lanes(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

// A block of the row is looked through number by number only where its largest is above all before
// it, or where the difference of a number from itself isn't 0: NaN and infinities.
inline int64_t first_largest(const float* x, int64_t count) {
  constexpr int64_t kBlock = 32 * kLanes;
  constexpr int kParts = 4;  // independent maxima hide the latency of one
  int64_t best = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = begin + kBlock < count ? begin + kBlock : count;
    if (end == begin + kBlock) {
      Lanes largest[kParts], odd[kParts];
      for (int p = 0; p < kParts; ++p) {
        largest[p] = load(x + begin + p * kLanes);
        odd[p] = subtract(largest[p], largest[p]);
      }
      for (int64_t i = begin + kParts * kLanes; i < end; i += kParts * kLanes) {
        for (int p = 0; p < kParts; ++p) {
          const Lanes value = load(x + i + p * kLanes);
          largest[p] = maximum(largest[p], value);
          odd[p] = add(odd[p], subtract(value, value));
        }
      }
      const float top =
          maximum_lanes(maximum(maximum(largest[0], largest[1]), maximum(largest[2], largest[3])));
      const float finite = sum_lanes(add(add(odd[0], odd[1]), add(odd[2], odd[3])));
      if (finite == 0.0f && top <= x[best]) continue;
    }
    for (int64_t i = begin; i < end; ++i) {
      if (x[i] != x[i]) return i;
      if (x[i] > x[best]) best = i;
    }
  }
  return best;
}

}  // namespace
}  // namespace fewbits
