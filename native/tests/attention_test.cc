// Attention against its definition in double, and the bits of a row in different batches, splits
// and numbers of threads. Slots that hold nothing are NaN.
#include "attention/attention.h"

#include <math.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <limits>
#include <vector>

#include "check.h"
#include "elementwise/numbers.h"
#include "threads.h"

namespace fewbits {
namespace {

constexpr int kPageSize = 5;
constexpr float kScale = 0.2f;

struct Shape {
  CacheKind kind;
  int heads, kv_heads, D, value_D;
  bool interleaved;
  bool in_keys = false;  // values are the first numbers of keys
};

const Shape kShapes[] = {
    {CacheKind::f32, 4, 2, 16, 16, false},        {CacheKind::bf16, 8, 2, 64, 64, true},
    {CacheKind::bf16, 5, 1, 41, 41, true},        {CacheKind::f16, 6, 1, 80, 80, false},
    {CacheKind::fp8, 3, 3, 24, 24, false},        {CacheKind::fp8, 9, 1, 33, 33, true},
    {CacheKind::int8, 8, 2, 64, 64, true},        {CacheKind::int8, 5, 1, 77, 77, false},
    {CacheKind::bf16, 3, 1, 128, 128, true},      {CacheKind::bf16, 7, 1, 112, 112, false},
    {CacheKind::int8, 6, 1, 32, 32, false},       {CacheKind::bf16, 4, 1, 80, 80, true},
    {CacheKind::bf16, 2, 2, 16, 16, false},       {CacheKind::f32, 4, 4, 24, 16, true},
    {CacheKind::bf16, 6, 6, 48, 32, true},        {CacheKind::bf16, 8, 1, 192, 128, true},
    {CacheKind::bf16, 12, 1, 40, 80, false},      {CacheKind::f16, 3, 3, 33, 20, true},
    {CacheKind::fp8, 9, 3, 96, 40, true},         {CacheKind::int8, 10, 1, 72, 17, true},
    {CacheKind::int8, 4, 4, 16, 100, false},      {CacheKind::f32, 4, 1, 40, 32, true, true},
    {CacheKind::bf16, 16, 1, 80, 64, true, true}, {CacheKind::f16, 6, 2, 33, 20, false, true},
    {CacheKind::fp8, 5, 1, 48, 32, true, true},   {CacheKind::int8, 8, 1, 72, 48, true, true},
};

// Memory of exactly so many bytes: what follows can't be read.
class Exact {
 public:
  Exact(size_t bytes, uint8_t value) : page_(sysconf(_SC_PAGESIZE)) {
    mapped_ = (bytes + page_ - 1) / page_ * page_ + page_;
    void* const memory =
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED, "no memory");
    memory_ = static_cast<uint8_t*>(memory);
    uint8_t* const end = memory_ + mapped_ - page_;
    CHECK(mprotect(end, page_, PROT_NONE) == 0, "no guard page");
    data_ = end - bytes;
    memset(data_, value, bytes);
  }
  ~Exact() { munmap(memory_, mapped_); }
  Exact(const Exact&) = delete;
  Exact& operator=(const Exact&) = delete;

  uint8_t* data() const { return data_; }

 private:
  size_t page_, mapped_;
  uint8_t *memory_, *data_;
};

float rounded(CacheKind kind, float value, float scale) {
  switch (kind) {
    case CacheKind::f32:
      return value;
    case CacheKind::bf16:
      return from_bf16(to_bf16(value));
    case CacheKind::f16:
      return from_f16(to_f16(value));
    case CacheKind::fp8:
      return from_fp8(to_fp8(value / scale)) * scale;
    case CacheKind::int8:
      return nearbyintf(value / scale) * scale;
  }
  return 0;
}

// Whether this tier rounds queries and the softmax's exponentials to bf16.
bool rounds_to_bf16(CacheKind kind) {
  return tier() >= Tier::avx512_bf16 && kind != CacheKind::f32 && kind != CacheKind::f16;
}

// One sequence, appended by rope_and_append without rotation, and its queries.
class Sequence {
 public:
  Sequence(const Shape& shape, int length, uint32_t seed)
      : shape_(shape),
        length_(length),
        keys_(cache_bytes(shape, length, shape.D), 0xff),  // a NaN in every kind
        values_(shape.in_keys ? 1 : cache_bytes(shape, length, shape.value_D), 0xff) {
    Random random(seed);
    const int pages = pages_of(length);
    for (int p = 0; p < pages; ++p) table_.push_back((p * 7 + 3) % pages);
    if (pages % 7 == 0) {
      for (int p = 0; p < pages; ++p) table_[p] = pages - 1 - p;
    }
    const bool int8 = shape.kind == CacheKind::int8;
    const size_t scales = shape.kv_heads * size_t(int8 ? pages * kPageSize : 1);
    key_scale_.assign(scales, int8 ? NAN : 0.03f);
    value_scale_ = key_scale_;
    const auto draw = [&](std::vector<float>& x, int heads, int width) {
      for (int i = 0; i < length * heads * width; ++i) x.push_back(random.normal());
    };
    draw(k_, shape.kv_heads, shape.D);
    draw(v_, shape.kv_heads, shape.value_D);
    draw(q_, shape.heads, shape.D);
    append();
  }

  std::vector<float> run(int begin, int end, int window) {
    std::vector<float> out(size_t(end - begin) * shape_.heads * shape_.value_D);
    const int32_t query_start[] = {0, end - begin}, kv_len[] = {end};
    std::vector<int64_t> positions;
    for (int t = begin; t < end; ++t) positions.push_back(t);
    Attend task{};
    task.query = q_.data() + size_t(begin) * shape_.heads * shape_.D;
    task.out = out.data();
    task.T = end - begin;
    task.heads = shape_.heads;
    task.kv_heads = shape_.kv_heads;
    task.D = shape_.D;
    task.value_D = shape_.value_D;
    task.sequences = 1;
    task.query_start = query_start;
    task.kv_len = kv_len;
    task.block_table = table_.data();
    task.max_pages = static_cast<int>(table_.size());
    task.positions = positions.data();
    task.key_cache = keys_.data();
    task.value_cache = (shape_.in_keys ? keys_ : values_).data();
    task.page_size = kPageSize;
    task.kind = shape_.kind;
    task.key_scale = scaled() ? key_scale_.data() : nullptr;
    task.value_scale = scaled() ? (shape_.in_keys ? key_scale_ : value_scale_).data() : nullptr;
    task.scale = kScale;
    task.window = window;
    attend(task);
    return out;
  }

  // The largest error of the rows over what rounding may be off. The definition here takes the
  // query as the tier rounds it.
  double check(const std::vector<float>& out, int begin, int end, int window) const {
    const int group = shape_.heads / shape_.kv_heads, D = shape_.D, value_D = shape_.value_D;
    const std::vector<double> k = stored(k_, D);
    const std::vector<double> v = shape_.in_keys ? first_of(k, D, value_D) : stored(v_, value_D);
    double worst = 0;
    for (int t = begin; t < end; ++t) {
      for (int h = 0; h < shape_.heads; ++h) {
        if (skip_case()) continue;
        const float* q = q_.data() + (size_t(t) * shape_.heads + h) * D;
        const bool rounds = rounds_to_bf16(shape_.kind);
        const bool fp8 = shape_.kind == CacheKind::fp8;
        const float q_scale = kScale * (fp8 ? key_scale_[h / group] : 1.0f);
        const int first = window && t - window + 1 > 0 ? t - window + 1 : 0;
        std::vector<double> scores;
        double largest = -INFINITY, magnitude = 0, sum = 0;
        for (int j = first; j <= t; ++j) {
          double score = 0, size = 0;
          for (int d = 0; d < D; ++d) {
            const float scaled = rounds ? from_bf16(to_bf16(q[d] * q_scale)) : q[d] * q_scale;
            const double product = double(scaled) * kScale / q_scale *
                                   k[(size_t(j) * shape_.kv_heads + h / group) * D + d];
            score += product;
            size += fabs(product);
          }
          scores.push_back(score);
          largest = fmax(largest, score);
          magnitude = fmax(magnitude, size);
        }
        for (double& score : scores) sum += score = exp(score - largest);
        constexpr double kEps = 0x1p-24;
        // Rounding an exponential, here and in the sum, and the tier's own e^x.
        const double weight = rounds ? 2 * 0x1p-8 + 0x1p-17 : 0;
        const double relative = weight + (2 * (D + 3) * magnitude + 2 * kChunk + 32) * kEps;
        for (int d = 0; d < value_D; ++d) {
          double expected = 0, size = 0;
          for (int j = first; j <= t; ++j) {
            const double part = scores[j - first] / sum *
                                v[(size_t(j) * shape_.kv_heads + h / group) * value_D + d];
            expected += part;
            size += fabs(part);
          }
          const float found = out[(size_t(t - begin) * shape_.heads + h) * value_D + d];
          const double error = fabs(found - expected) / (size * relative);
          if (!(error <= worst)) worst = error;
        }
      }
    }
    return worst;
  }

 private:
  static int pages_of(int length) { return (length + kPageSize - 1) / kPageSize; }
  static size_t cache_bytes(const Shape& shape, int length, int width) {
    return size_t(pages_of(length)) * shape.kv_heads * kPageSize * width * element_size(shape.kind);
  }

  bool scaled() const { return element_size(shape_.kind) == 1; }

  // The first `count` numbers of each row of `width`.
  static std::vector<double> first_of(const std::vector<double>& rows, int width, int count) {
    std::vector<double> first;
    for (size_t row = 0; row < rows.size(); row += width) {
      first.insert(first.end(), rows.begin() + row, rows.begin() + row + count);
    }
    return first;
  }

  // [length][kv_heads][width] as the cache holds them.
  std::vector<double> stored(const std::vector<float>& x, int width) const {
    std::vector<double> all;
    for (size_t row = 0; row < x.size(); row += width) {
      float scale = key_scale_[row / width % shape_.kv_heads];
      if (shape_.kind == CacheKind::int8) {
        float largest = 0;
        for (int d = 0; d < width; ++d) largest = fmaxf(largest, fabsf(x[row + d]));
        scale = largest / 127;
      }
      for (int d = 0; d < width; ++d) all.push_back(rounded(shape_.kind, x[row + d], scale));
    }
    return all;
  }

  void append() {
    std::vector<int64_t> slots, positions;
    for (int j = 0; j < length_; ++j) {
      positions.push_back(j);
      slots.push_back(int64_t{table_[j / kPageSize]} * kPageSize + j % kPageSize);
    }
    const int half = shape_.D / 4;  // half of the channels are rotated, by nothing
    const std::vector<float> cos(size_t(length_) * half, 1.0f), sin(size_t(length_) * half, 0.0f);
    AppendTokens task{};
    task.T = length_;
    task.query = q_.data();
    task.key = k_.data();
    task.value = shape_.in_keys ? nullptr : v_.data();
    task.heads = shape_.heads;
    task.kv_heads = shape_.kv_heads;
    task.D = shape_.D;
    task.value_D = shape_.value_D;
    task.rotary_begin = shape_.D == shape_.value_D ? 0 : shape_.D - 2 * half;
    task.rotary_dim = 2 * half;
    task.interleaved = shape_.interleaved;
    task.cos = cos.data();
    task.sin = sin.data();
    task.slots = slots.data();
    task.positions = positions.data();
    task.key_cache = keys_.data();
    task.value_cache = (shape_.in_keys ? keys_ : values_).data();
    task.page_size = kPageSize;
    task.kind = shape_.kind;
    task.key_scale = scaled() ? key_scale_.data() : nullptr;
    task.value_scale = scaled() ? (shape_.in_keys ? key_scale_ : value_scale_).data() : nullptr;
    const std::vector<float> before = q_;
    rope_and_append(task);
    CHECK(memcmp(before.data(), q_.data(), q_.size() * sizeof(float)) == 0,
          "a rotation by nothing changed a query");
  }

  Shape shape_;
  int length_;
  std::vector<int32_t> table_;
  Exact keys_, values_;
  std::vector<float> key_scale_, value_scale_, q_, k_, v_;
};

void test_shape(const Shape& shape, int length, int window) {
  Sequence sequence(shape, length, static_cast<uint32_t>(length + window));
  const size_t row = size_t(shape.heads) * shape.value_D;
  set_thread_count(1);
  const std::vector<float> whole = sequence.run(0, length, window);
  const double error = sequence.check(whole, 0, length, window);
  CHECK(error <= 1, "%.3g of the bound, D %d and %d, length %d, window %d", error, shape.D,
        shape.value_D, length, window);
  const auto same = [&](int begin, int end, int threads) {
    if (skip_case()) return;
    set_thread_count(threads);
    const std::vector<float> part = sequence.run(begin, end, window);
    CHECK(memcmp(part.data(), whole.data() + begin * row, part.size() * sizeof(float)) == 0,
          "rows %d to %d of %d with %d threads, D %d and %d, window %d", begin, end, length,
          threads, shape.D, shape.value_D, window);
  };
  for (int threads = 1; threads <= 4; ++threads) {
    same(0, length, threads);
    same(length - 1, length, threads);  // many threads share out one row's chunks
    same(length > 1 ? length - 2 : 0, length, threads);
    for (int begin = 0; begin < length; begin += 37) {
      same(begin, begin + 37 < length ? begin + 37 : length, threads);
    }
  }
}

}  // namespace
}  // namespace fewbits

int main() {
  using namespace fewbits;
  skip_unsupported_tier();
  for (const Shape& shape : kShapes) {
    for (const int length : {1, 16, 65, 300}) {
      test_shape(shape, length, 0);
      test_shape(shape, length, 50);
    }
  }
  // Long enough for one row's chunks to be shared out.
  test_shape({CacheKind::bf16, 16, 1, 64, 48, false}, 700, 0);
  printf("%s: attention agrees\n", name(tier()));
}
