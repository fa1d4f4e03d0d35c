#include <string.h>

#include <algorithm>
#include <iterator>
#include <stdexcept>

#include "gemm/gemm.h"
#include "threads.h"

namespace fewbits {
namespace {

constexpr int64_t kMaxSize = int64_t{1} << 31;  // spans count words in 32 bits

// Words of a row that are copied at once: one cache line of the source, and lines of the panel that
// fit the first-level cache.
constexpr int64_t kCopyWords = 16;

constexpr int64_t scale_bytes(ScaleKind kind) {
  switch (kind) {
    case ScaleKind::none:
      return 0;
    case ScaleKind::f32:
      return 4;
    case ScaleKind::bf16:
    case ScaleKind::f16:
      return 2;
    case ScaleKind::e4m3:
    case ScaleKind::e8m0:
      break;
  }
  return 1;
}

template <typename Enum, size_t count>
Enum named(const char* what, const char* const (&names)[count], const std::string& name) {
  const auto found = std::find(std::begin(names), std::end(names), name);
  if (found == std::end(names)) throw std::invalid_argument("no " + std::string(what) + " " + name);
  return static_cast<Enum>(found - std::begin(names));
}

}  // namespace

WeightKind weight_kind(const std::string& name) {
  constexpr const char* kNames[] = {"int4", "int8", "fp4", "fp8", "bf16", "f16", "f32"};
  return named<WeightKind>("kind of weight", kNames, name);
}

ScaleKind scale_kind(const std::string& name) {
  constexpr const char* kNames[] = {"none", "f32", "bf16", "f16", "e4m3", "e8m0"};
  return named<ScaleKind>("type of scales", kNames, name);
}

Quantizer quantizer(const std::string& name) {
  constexpr const char* kNames[] = {"none",
                                    "int8_token",
                                    "int8_token_asymmetric",
                                    "int8_static",
                                    "int8_static_asymmetric",
                                    "int8_group",
                                    "fp8_token",
                                    "fp8_static",
                                    "fp8_group",
                                    "nvfp4",
                                    "mxfp4",
                                    "mxfp6",
                                    "mxfp8"};
  return named<Quantizer>("quantizer", kNames, name);
}

PackedWeight::PackedWeight(WeightKind kind, int64_t N, int64_t K, int64_t group_size,
                           ScaleKind scale, bool shared, bool zero)
    : kind_(kind),
      n_(N),
      k_(K),
      group_size_(group_size),
      scale_kind_(scale),
      shared_(shared),
      has_zero_(zero) {
  if (N < 1 || K < 1 || N >= kMaxSize || K >= kMaxSize) {
    throw std::invalid_argument("a weight of " + std::to_string(N) + " x " + std::to_string(K) +
                                " can't be packed");
  }
  const int64_t codes = codes_per_word(kind);
  if (group_size < 1 || group_size > K || (group_size != K && group_size % codes != 0)) {
    throw std::invalid_argument("groups of " + std::to_string(group_size) + " columns of " +
                                std::to_string(K) + " can't be packed: a group is a multiple of " +
                                std::to_string(codes) + " or the whole row");
  }
  if (zero && kind != WeightKind::int4 && kind != WeightKind::int8) {
    throw std::invalid_argument("only integer codes have zero points");
  }
  groups_ = (K + group_size - 1) / group_size;
  words_ = (K + codes - 1) / codes;
  filled_.resize(N);
  packed_ = Buffer(panels() * words_ * kPanelRows * sizeof(uint32_t));
  scale_ = Buffer(panels() * groups_ * (shared ? 1 : kPanelRows) * scale_bytes(scale));
  if (zero) zero_ = Buffer(panels() * groups_ * kPanelRows);
}

int64_t PackedWeight::code_row_bytes() const {
  const int64_t codes = codes_per_word(kind_);
  return codes == 8 ? (k_ + 1) / 2 : k_ * 4 / codes;
}

int64_t PackedWeight::nbytes() const { return packed_.bytes() + scale_.bytes() + zero_.bytes(); }

int64_t PackedWeight::first_missing_row() const {
  return std::find(filled_.begin(), filled_.end(), false) - filled_.begin();
}

GemmPanel PackedWeight::panel(int64_t index) const {
  const int64_t scales = index * groups_ * (shared_ ? 1 : kPanelRows);
  return {packed_.as<uint32_t>() + index * words_ * kPanelRows,
          scale_.as<uint8_t>() + scales * scale_bytes(scale_kind_),
          scale_kind_,
          shared_,
          has_zero_ ? zero_.as<int8_t>() + index * groups_ * kPanelRows : nullptr,
          {}};
}

void PackedWeight::fill(int64_t row_begin, int64_t rows, const uint8_t* codes, const void* scale,
                        const int8_t* zero) {
  if (row_begin < 0 || rows < 0 || row_begin > n_ - rows) {
    throw std::invalid_argument("rows " + std::to_string(row_begin) + " to " +
                                std::to_string(row_begin + rows) + " lie outside a weight of " +
                                std::to_string(n_) + " rows");
  }
  if ((scale != nullptr) != (scale_kind_ != ScaleKind::none)) {
    throw std::invalid_argument("a scale is given where the weight has them, and only there");
  }
  if ((zero != nullptr) != has_zero_) {
    throw std::invalid_argument("zero points are given where the weight has them, and only there");
  }
  if (rows == 0) return;
  struct Job {
    PackedWeight* self;
    int64_t row_begin, row_end, first_panel;
    const uint8_t* codes;
    const uint8_t* scale;
    const int8_t* zero;
  } job{this,
        row_begin,
        row_begin + rows,
        row_begin / kPanelRows,
        codes,
        static_cast<const uint8_t*>(scale),
        zero};
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
                              const uint8_t* codes, const uint8_t* scale, const int8_t* zero) {
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
  const int64_t width = scale_bytes(scale_kind_);
  const int64_t per_group = shared_ ? 1 : kPanelRows;
  for (int64_t row = first; row < last; ++row) {
    for (int64_t group = 0; group < groups_; ++group) {
      const int64_t source = (row - row_begin) * groups_ + group;
      const int64_t place = panel * groups_ + group;
      const int64_t scale_place = place * per_group + (shared_ ? 0 : row % kPanelRows);
      if (scale) memcpy(scale_.as<uint8_t>() + scale_place * width, scale + source * width, width);
      if (zero) zero_.as<int8_t>()[place * kPanelRows + row % kPanelRows] = zero[source];
    }
  }
}

}  // namespace fewbits
