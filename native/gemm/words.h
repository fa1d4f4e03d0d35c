// The words of a prepared row of x, and the table of a tier's kernels. kernel.h says which values
// a word holds.
#pragma once

#include "gemm/numbers.h"
#include "gemm/panel.h"

namespace fewbits {
namespace {

constexpr int kSums = 16;

inline float add_up(float (&lane)[kSums]) {
  for (int width = kSums / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) lane[j] += lane[j + width];
  }
  return lane[0];
}

// `bulk` may prepare some of the columns from the first one on, whole words of the weight, and
// says how many.
struct WordByWord {
  template <int codes, int stride>
  static int64_t bulk(const float*, int64_t, uint32_t*) {
    return 0;
  }
};

struct FloatWords : WordByWord {
  template <int stride>
  static uint32_t word(const float* x) {
    return to_bits(x[0]);
  }
  static float sum(const uint32_t* words, int64_t count) {
    // Sums side by side: one chain of additions would take as long as a small product.
    float lane[kSums] = {};
    int64_t i = 0;
    for (; i + kSums <= count; i += kSums) {
      for (int j = 0; j < kSums; ++j) lane[j] += from_bits(words[i + j]);
    }
    for (; i < count; ++i) lane[i % kSums] += from_bits(words[i]);
    return add_up(lane);
  }
};

// NaN is no integer; the scale of x says that it was there.
inline int as_integer(float value) { return value == value ? static_cast<int>(value) : 0; }

struct Int16Words : WordByWord {
  template <int stride>
  static uint32_t word(const float* x) {
    return static_cast<uint16_t>(as_integer(x[0])) | static_cast<uint32_t>(as_integer(x[stride]))
                                                         << 16;
  }
  static int32_t sum(const uint32_t* words, int64_t count) {
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      sum += static_cast<int16_t>(words[i]) + (static_cast<int32_t>(words[i]) >> 16);
    }
    return sum;
  }
};

// Of `times` x.
template <int times>
struct Int8Words : WordByWord {
  template <int stride>
  static uint32_t word(const float* x) {
    uint32_t word = 0;
    for (int i = 0; i < 4; ++i) {
      word |= uint32_t{static_cast<uint8_t>(as_integer(times * x[i * stride]))} << (8 * i);
    }
    return word;
  }
  static int32_t sum(const uint32_t* words, int64_t count) {
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      for (int j = 0; j < 4; ++j) sum += static_cast<int8_t>(words[i] >> (8 * j));
    }
    return sum;
  }
};

// Words of x for a kind of the weight: step p of a word holds the codes p, p + steps, ...
template <class Dot, class Words, WeightKind kind>
void prepare(const float* x, int64_t K, uint32_t* values) {
  constexpr int kCodes = codes_per_word(kind), kSteps = Dot::template steps<kind>;
  constexpr int kWords = kWordsOfX<Dot, kind>;
  const auto words = [&values](const float* from) {
    constexpr int kEach = Dot::kOperandWords;
    for (int i = 0; i < kWords; ++i) {
      values[i] = Words::template word<kSteps>(from + i / kEach + i % kEach * (kCodes / kEach));
    }
  };
  int64_t k = Words::template bulk<kCodes, kSteps>(x, K, values);
  values += k / kCodes * kWords;
  for (; k + kCodes <= K; k += kCodes, values += kWords) {
    words(x + k);
  }
  if (k < K) {
    float last[kCodes] = {};
    for (int64_t i = k; i < K; ++i) last[i - k] = x[i];
    words(last);
  }
}

template <class Dot, class Words, WeightKind kind>
void span_sums(const uint32_t* values, const SpanList& list, uint32_t* sums) {
  constexpr int kWords = kWordsOfX<Dot, kind>;
  for (int64_t s = 0; s < list.count; ++s) {
    const int64_t begin = list.spans[s].word_begin, end = list.spans[s].word_end;
    const auto sum = Words::sum(values + begin * kWords, (end - begin) * kWords);
    if constexpr (Dot::kIntegers) {
      sums[s] = static_cast<uint32_t>(-Dot::template offset<kind> * sum);
    } else {
      sums[s] = to_bits(sum);
    }
  }
}

template <class Dot, class Words, WeightKind kind>
constexpr GemmKernel make_kernel() {
  return {panel_of<Dot, kind>,
          prepare<Dot, Words, kind>,
          has_sums<Dot, kind>() ? span_sums<Dot, Words, kind> : nullptr,
          kWordsOfX<Dot, kind>,
          kMostCodes<Dot, kind>,
          Dot::template doubled<kind>};
}

// The kernels of a tier that multiplies floats, and integers in pairs: of eight bits where the
// codes have four, else of sixteen.
template <class Floats, class Bytes, class Pairs>
const GemmKernel* tier_kernel(WeightKind kind, DotKind dot) {
  static constexpr GemmKernel kFloats[kWeightKinds] = {
      make_kernel<Floats, FloatWords, WeightKind::int4>(),
      make_kernel<Floats, FloatWords, WeightKind::int8>(),
      make_kernel<Floats, FloatWords, WeightKind::fp4>(),
      make_kernel<Floats, FloatWords, WeightKind::fp8>(),
      make_kernel<Floats, FloatWords, WeightKind::bf16>(),
      make_kernel<Floats, FloatWords, WeightKind::f16>(),
      make_kernel<Floats, FloatWords, WeightKind::f32>(),
  };
  static constexpr GemmKernel kBytes4 = make_kernel<Bytes, Int8Words<1>, WeightKind::int4>();
  static constexpr GemmKernel kBytesFp4 = make_kernel<Bytes, Int8Words<2>, WeightKind::fp4>();
  static constexpr GemmKernel kPairs4 = make_kernel<Pairs, Int16Words, WeightKind::int4>();
  static constexpr GemmKernel kPairs8 = make_kernel<Pairs, Int16Words, WeightKind::int8>();
  if (dot == DotKind::floats) return &kFloats[static_cast<int>(kind)];
  if (kind == WeightKind::fp4) return &kBytesFp4;
  if (kind == WeightKind::int8) return &kPairs8;
  return dot == DotKind::int8 ? &kBytes4 : &kPairs4;
}

// The kernels of a tier whose instructions add up products of integers of eight and sixteen bits.
template <class Bytes, template <int> class ByteWords, class Pairs, class PairWords>
const GemmKernel* integer_kernel(WeightKind kind, DotKind dot) {
  static constexpr GemmKernel kBytes4 = make_kernel<Bytes, ByteWords<1>, WeightKind::int4>();
  static constexpr GemmKernel kBytes8 = make_kernel<Bytes, ByteWords<1>, WeightKind::int8>();
  static constexpr GemmKernel kBytesFp4 = make_kernel<Bytes, ByteWords<2>, WeightKind::fp4>();
  static constexpr GemmKernel kPairs4 = make_kernel<Pairs, PairWords, WeightKind::int4>();
  static constexpr GemmKernel kPairs8 = make_kernel<Pairs, PairWords, WeightKind::int8>();
  if (dot == DotKind::floats) return nullptr;
  const bool pairs = dot == DotKind::int16;
  if (kind == WeightKind::int4) return pairs ? &kPairs4 : &kBytes4;
  if (kind == WeightKind::int8) return pairs ? &kPairs8 : &kBytes8;
  return kind == WeightKind::fp4 && !pairs ? &kBytesFp4 : nullptr;
}

}  // namespace
}  // namespace fewbits
