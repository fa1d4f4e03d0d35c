// Lanes (see lanes.h) in plain C++: four of the compiler's 128-bit vectors, which every CPU has or
// gets emulated.
#pragma once

#include <stdint.h>

namespace fewbits {
namespace {

typedef float Quad __attribute__((vector_size(16)));

struct Lanes {
  Quad part[4];
};

constexpr int kKeyVectors = 1;
constexpr int kChannelVectors = 1;

inline Lanes broadcast(float value) {
  const Quad quad = {value, value, value, value};
  return {{quad, quad, quad, quad}};
}

inline Lanes zero() { return broadcast(0.0f); }

inline Lanes load(const float* source) {
  Lanes value;
  __builtin_memcpy(&value, source, sizeof value);
  return value;
}

inline void store(float* target, Lanes value) { __builtin_memcpy(target, &value, sizeof value); }

inline Lanes add(Lanes a, Lanes b) {
  for (int i = 0; i < 4; ++i) a.part[i] += b.part[i];
  return a;
}

inline Lanes subtract(Lanes a, Lanes b) {
  for (int i = 0; i < 4; ++i) a.part[i] -= b.part[i];
  return a;
}

inline Lanes multiply(Lanes a, Lanes b) {
  for (int i = 0; i < 4; ++i) a.part[i] *= b.part[i];
  return a;
}

inline Lanes divide(Lanes a, Lanes b) {
  for (int i = 0; i < 4; ++i) a.part[i] /= b.part[i];
  return a;
}

inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
  for (int i = 0; i < 4; ++i) c.part[i] += a.part[i] * b.part[i];
  return c;
}

// Calls fn(lane) for each lane.
template <typename Fn>
inline Lanes make_lanes(Fn fn) {
  float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = fn(i);
  return load(lanes);
}

inline float lane_of(const Lanes& value, int lane) { return value.part[lane / 4][lane % 4]; }

inline Lanes maximum(Lanes a, Lanes b) {
  return make_lanes(
      [&](int i) { return lane_of(a, i) > lane_of(b, i) ? lane_of(a, i) : lane_of(b, i); });
}
inline Lanes minimum(Lanes a, Lanes b) {
  return make_lanes(
      [&](int i) { return lane_of(a, i) < lane_of(b, i) ? lane_of(a, i) : lane_of(b, i); });
}

inline Lanes minus_magnitude(Lanes value) {
  return make_lanes([&](int i) { return float_of(bits_of(lane_of(value, i)) | 0x80000000); });
}

inline Lanes where_negative(Lanes value, Lanes negative, Lanes other) {
  return make_lanes([&](int i) {
    return bits_of(lane_of(value, i)) >> 31 ? lane_of(negative, i) : lane_of(other, i);
  });
}

inline Lanes select_range(Lanes value, int begin, int end, Lanes other) {
  return make_lanes(
      [&](int i) { return i >= begin && i < end ? lane_of(value, i) : lane_of(other, i); });
}

inline float sum_lanes(Lanes value) {
  const Quad quad = (value.part[0] + value.part[1]) + (value.part[2] + value.part[3]);
  return (quad[0] + quad[2]) + (quad[1] + quad[3]);
}

inline float maximum_lanes(Lanes value) {
  float result = lane_of(value, 0);
  for (int i = 1; i < 16; ++i) {
    if (lane_of(value, i) > result) result = lane_of(value, i);
  }
  return result;
}

inline Lanes swap_pairs(Lanes value) {
  return make_lanes([&](int i) { return lane_of(value, i ^ 1); });
}

inline Lanes exp_lanes(Lanes x) {
  // Adding 1.5 * 2^23 rounds to an integer, which is then the difference in the low bits.
  const Lanes shifter = broadcast(0x1.8p23f);
  const Lanes shifted = multiply_add(x, broadcast(kLog2E), shifter);
  const Lanes n = subtract(shifted, shifter);
  Lanes r = multiply_add(n, broadcast(-kLn2High), x);
  r = multiply_add(n, broadcast(-kLn2Low), r);
  Lanes p = broadcast(kExpC6);
  p = multiply_add(p, r, broadcast(kExpC5));
  p = multiply_add(p, r, broadcast(kExpC4));
  p = multiply_add(p, r, broadcast(kExpC3));
  p = multiply_add(p, r, broadcast(kExpC2));
  p = multiply_add(p, multiply(r, r), r);
  p = add(p, broadcast(1.0f));
  return make_lanes([&](int i) {
    const float value = lane_of(x, i);
    if (!(value >= kExpLowest)) return value < kExpLowest ? 0.0f : value;  // NaN stays NaN
    const uint32_t exponent = bits_of(lane_of(shifted, i)) - bits_of(0x1.8p23f);
    return float_of(bits_of(lane_of(p, i)) + (exponent << 23));
  });
}

inline Lanes load_bf16(const uint16_t* codes) {
  return make_lanes([&](int i) { return from_bf16(codes[i]); });
}
inline Lanes load_f16(const uint16_t* codes) {
  return make_lanes([&](int i) { return from_f16(codes[i]); });
}
inline Lanes load_fp8(const uint8_t* codes) {
  return make_lanes([&](int i) { return from_fp8(codes[i]); });
}
inline Lanes load_int8(const uint8_t* codes) {
  return make_lanes([&](int i) { return from_int8(codes[i]); });
}
inline void store_bf16(uint16_t* codes, Lanes value) {
  for (int i = 0; i < 16; ++i) codes[i] = to_bf16(lane_of(value, i));
}
inline void store_f16(uint16_t* codes, Lanes value) {
  for (int i = 0; i < 16; ++i) codes[i] = to_f16(lane_of(value, i));
}
inline void store_fp8(uint8_t* codes, Lanes value) {
  for (int i = 0; i < 16; ++i) codes[i] = to_fp8(lane_of(value, i));
}
inline void store_int8(uint8_t* codes, Lanes value) {
  for (int i = 0; i < 16; ++i) codes[i] = to_int8(lane_of(value, i));
}

// `bytes` (at most 64) from `source`, zeros after them.
inline Lanes load_bytes(const void* source, int bytes) {
  float part[16] = {};
  __builtin_memcpy(part, source, static_cast<unsigned>(bytes));
  return load(part);
}

inline Lanes low_bf16(Lanes pairs) {
  return make_lanes([&](int i) { return float_of(bits_of(lane_of(pairs, i)) << 16); });
}
inline Lanes high_bf16(Lanes pairs) {
  return make_lanes([&](int i) { return float_of(bits_of(lane_of(pairs, i)) & 0xffff0000); });
}

inline void transpose(Lanes* rows) {
  float columns[16][16];
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) columns[j][i] = lane_of(rows[i], j);
  }
  for (int i = 0; i < 16; ++i) rows[i] = load(columns[i]);
}

}  // namespace
}  // namespace fewbits
