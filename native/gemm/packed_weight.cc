#include <string.h>

#include <algorithm>
#include <stdexcept>

#include "gemm/gemm.h"
#include "threads.h"

namespace fewbits {
namespace {

constexpr int64_t kMaxSize = int64_t{1} << 31;  // spans count words in 32 bits

// Words of a row that are copied at once: one cache line of the source, and lines of the panel that
// fit the first-level cache.
constexpr int64_t kCopyWords = 16;

// The scale of every row of a weight that has none.
alignas(64) constexpr float kOnes[kPanelRows] = {
    1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
    1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
};

float code_offset(WeightKind kind) { return kind == WeightKind::int4 ? 8.0f : 128.0f; }

std::vector<Span> make_spans(WeightKind kind, int64_t words, int64_t group_size) {
  const int64_t codes = codes_per_word(kind);
  const int64_t group_words = (group_size + codes - 1) / codes;
  std::vector<Span> spans;
  for (int64_t group = 0, begin = 0; begin < words; ++group) {
    const int64_t group_end = std::min(begin + group_words, words);
    while (begin < group_end) {
      const int64_t end = std::min(begin + kSpanCodes / codes, group_end);
      spans.push_back(
          {static_cast<int32_t>(begin), static_cast<int32_t>(end), static_cast<int32_t>(group)});
      begin = end;
    }
  }
  return spans;
}

}  // namespace

WeightKind weight_kind(const std::string& name) {
  if (name == "int4") return WeightKind::int4;
  if (name == "int8") return WeightKind::int8;
  if (name == "bf16") return WeightKind::bf16;
  if (name == "f16") return WeightKind::f16;
  if (name == "f32") return WeightKind::f32;
  throw std::invalid_argument("a packed weight's kind is int4, int8, bf16, f16 or f32, not " +
                              name);
}

PackedWeight::PackedWeight(WeightKind kind, int64_t N, int64_t K, int64_t group_size, bool zero)
    : kind_(kind), n_(N), k_(K), group_size_(group_size) {
  if (N < 1 || K < 1 || N >= kMaxSize || K >= kMaxSize) {
    throw std::invalid_argument("a weight of " + std::to_string(N) + " x " + std::to_string(K) +
                                " can't be packed");
  }
  const int64_t codes = codes_per_word(kind);
  const bool whole_row = group_size == K;
  if (group_size < 1 || group_size > K ||
      (!whole_row && (group_size % codes != 0 || !quantized()))) {
    throw std::invalid_argument("groups of " + std::to_string(group_size) + " columns of " +
                                std::to_string(K) + " can't be packed: of integers a group is a " +
                                "multiple of " + std::to_string(codes) + " or the whole row, of " +
                                "floats the whole row");
  }
  if (zero && !quantized()) {
    throw std::invalid_argument("a weight that isn't quantized has no zero points");
  }
  groups_ = (K + group_size - 1) / group_size;
  words_ = (K + codes - 1) / codes;
  spans_ = make_spans(kind, words_, group_size);
  filled_.resize(N);
  packed_ = Buffer(panels() * words_ * kPanelRows * sizeof(uint32_t));
  const size_t parameter_bytes = panels() * groups_ * kPanelRows * sizeof(float);
  if (quantized()) scale_ = Buffer(parameter_bytes);
  if (zero) zero_ = Buffer(parameter_bytes);
}

int64_t PackedWeight::code_row_bytes() const {
  return kind_ == WeightKind::int4 ? (k_ + 1) / 2 : k_ * 4 / codes_per_word(kind_);
}

int64_t PackedWeight::nbytes() const { return packed_.bytes() + scale_.bytes() + zero_.bytes(); }

int64_t PackedWeight::first_missing_row() const {
  return std::find(filled_.begin(), filled_.end(), false) - filled_.begin();
}

GemmPanel PackedWeight::panel(int64_t index) const {
  const int64_t parameters = index * groups_ * kPanelRows;
  return {packed_.as<uint32_t>() + index * words_ * kPanelRows,
          quantized() ? scale_.as<float>() + parameters : kOnes,
          has_zero() ? zero_.as<float>() + parameters : nullptr, spans()};
}

void PackedWeight::fill(int64_t row_begin, int64_t rows, const uint8_t* codes, const float* scale,
                        const float* zero) {
  if (row_begin < 0 || rows < 0 || row_begin > n_ - rows) {
    throw std::invalid_argument("rows " + std::to_string(row_begin) + " to " +
                                std::to_string(row_begin + rows) + " lie outside a weight of " +
                                std::to_string(n_) + " rows");
  }
  if ((scale != nullptr) != quantized()) {
    throw std::invalid_argument("a scale is given for quantized weights, and only for those");
  }
  if ((zero != nullptr) != has_zero()) {
    throw std::invalid_argument("zero points are given where the weight has them, and only there");
  }
  if (rows == 0) return;
  struct Job {
    PackedWeight* self;
    int64_t row_begin, row_end, first_panel;
    const uint8_t* codes;
    const float *scale, *zero;
  } job{this, row_begin, row_begin + rows, row_begin / kPanelRows, codes, scale, zero};
  const int64_t panel_end = (job.row_end + kPanelRows - 1) / kPanelRows;
  parallel_for(
      panel_end - job.first_panel,
      [](void* context, int64_t begin, int64_t end) {
        const Job& j = *static_cast<Job*>(context);
        for (int64_t panel = j.first_panel + begin; panel < j.first_panel + end; ++panel) {
          j.self->fill_panel(panel, j.row_begin, j.row_end, j.codes, j.scale, j.zero);
        }
      },
      &job);
  std::fill(filled_.begin() + row_begin, filled_.begin() + job.row_end, true);
}

void PackedWeight::fill_panel(int64_t panel, int64_t row_begin, int64_t row_end,
                              const uint8_t* codes, const float* scale, const float* zero) {
  const int64_t first = std::max(row_begin, panel * kPanelRows);
  const int64_t last = std::min(row_end, (panel + 1) * kPanelRows);
  const int64_t row_bytes = code_row_bytes();
  uint32_t* const words = packed_.as<uint32_t>() + panel * words_ * kPanelRows;
  for (int64_t kw = 0; kw < words_; kw += kCopyWords) {
    const int64_t byte_begin = kw * int64_t{sizeof(uint32_t)};
    const int64_t bytes = std::min<int64_t>(row_bytes - byte_begin, kCopyWords * sizeof(uint32_t));
    const int64_t count = std::min(kCopyWords, words_ - kw);
    for (int64_t row = first; row < last; ++row) {
      uint32_t line[kCopyWords] = {};
      memcpy(line, codes + (row - row_begin) * row_bytes + byte_begin, bytes);
      for (int64_t i = 0; i < count; ++i) {
        words[(kw + i) * kPanelRows + row % kPanelRows] = line[i];
      }
    }
  }
  if (!quantized()) return;
  const int64_t parameters = panel * groups_ * kPanelRows;
  for (int64_t row = first; row < last; ++row) {
    for (int64_t group = 0; group < groups_; ++group) {
      const int64_t source = (row - row_begin) * groups_ + group;
      const int64_t target = parameters + group * kPanelRows + row % kPanelRows;
      scale_.as<float>()[target] = scale[source];
      if (zero) zero_.as<float>()[target] = zero[source] - code_offset(kind_);
    }
  }
}

}  // namespace fewbits
