#include <string.h>

#include <algorithm>
#include <iterator>
#include <stdexcept>

#include "gemm/gemm.h"

namespace fewbits {
namespace {

constexpr int64_t kMaxSize = int64_t{1} << 31;  // spans count words in 32 bits

// Bytes of a row that are copied at once: a cache line, so that each is read once, and the lines of
// the panel that they go to fit the first-level cache.
constexpr int64_t kLine = 64;

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

// columns[i * kPanelRows + row] = element i of a row.
template <typename T>
void transpose(const uint8_t* source, int64_t row_bytes, int64_t rows, int64_t count, T* columns) {
  constexpr int64_t kElements = kLine / sizeof(T);
  for (int64_t i = 0; i < count; i += kElements) {
    const int64_t elements = std::min(kElements, count - i);
    for (int64_t row = 0; row < rows; ++row) {
      T line[kElements];
      memcpy(line, source + row * row_bytes + i * sizeof(T), elements * sizeof(T));
      for (int64_t j = 0; j < elements; ++j) columns[(i + j) * kPanelRows + row] = line[j];
    }
  }
}

typedef uint32_t Quad __attribute__((vector_size(16)));

template <int... i>
Quad pick(Quad a, Quad b) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, i...);
#else
  return __builtin_shuffle(a, b, Quad{i...});
#endif
}

// `transpose` of four words of four rows.
void transpose_quad(const uint8_t* source, int64_t row_bytes, uint32_t* columns) {
  Quad row[4];
  for (int i = 0; i < 4; ++i) memcpy(&row[i], source + i * row_bytes, sizeof(Quad));
  const Quad low01 = pick<0, 4, 1, 5>(row[0], row[1]), high01 = pick<2, 6, 3, 7>(row[0], row[1]);
  const Quad low23 = pick<0, 4, 1, 5>(row[2], row[3]), high23 = pick<2, 6, 3, 7>(row[2], row[3]);
  const Quad column[4] = {pick<0, 1, 4, 5>(low01, low23), pick<2, 3, 6, 7>(low01, low23),
                          pick<0, 1, 4, 5>(high01, high23), pick<2, 3, 6, 7>(high01, high23)};
  for (int i = 0; i < 4; ++i) memcpy(columns + i * kPanelRows, &column[i], sizeof(Quad));
}

// `transpose` of words, at 6 to 13 GB/s of codes instead of 3 on one core of a Zen 4.
void transpose_words(const uint8_t* source, int64_t row_bytes, int64_t rows, int64_t count,
                     uint32_t* columns) {
  constexpr int64_t kWords = kLine / sizeof(uint32_t);
  const int64_t lines = count / kWords * kWords, quads = rows / 4 * 4;
  for (int64_t kw = 0; kw < lines; kw += kWords) {
    for (int64_t row = 0; row < quads; row += 4) {
      for (int64_t i = kw; i < kw + kWords; i += 4) {
        transpose_quad(source + row * row_bytes + i * sizeof(uint32_t), row_bytes,
                       columns + i * kPanelRows + row);
      }
    }
  }
  transpose(source + quads * row_bytes, row_bytes, rows - quads, lines, columns + quads);
  transpose(source + lines * sizeof(uint32_t), row_bytes, rows, count - lines,
            columns + lines * kPanelRows);
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
                                    "int16_group",
                                    "fp8_token",
                                    "fp8_static",
                                    "fp8_group",
                                    "nvfp4",
                                    "mxfp4",
                                    "mxfp6",
                                    "mxfp6e3m2",
                                    "mxfp8"};
  return named<Quantizer>("quantizer", kNames, name);
}

ScaleRounding scale_rounding(const std::string& name) {
  constexpr const char* kNames[] = {"even", "floor", "ceil"};
  return named<ScaleRounding>("rounding of scales", kNames, name);
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
  packed_ = Buffer::lasting(panels() * words_ * kPanelRows * sizeof(uint32_t));
  scale_ = Buffer::lasting(panels() * groups_ * (shared ? 1 : kPanelRows) * scale_bytes(scale));
  if (zero) zero_ = Buffer::lasting(panels() * groups_ * kPanelRows);
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
  return {words(index),
          words(index + 1),
          scale_.as<uint8_t>() + scales * scale_bytes(scale_kind_),
          scale_kind_,
          shared_,
          has_zero_ ? zero_.as<int8_t>() + index * groups_ * kPanelRows : nullptr,
          {},
          false};
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
  const int64_t row_end = row_begin + rows;
  for (int64_t panel = row_begin / kPanelRows; panel * kPanelRows < row_end; ++panel) {
    fill_panel(panel, row_begin, row_end, codes, static_cast<const uint8_t*>(scale), zero);
  }
  std::fill(filled_.begin() + row_begin, filled_.begin() + row_end, true);
}

void PackedWeight::fill_panel(int64_t panel, int64_t row_begin, int64_t row_end,
                              const uint8_t* codes, const uint8_t* scale, const int8_t* zero) {
  const int64_t first = std::max(row_begin, panel * kPanelRows);
  const int64_t last = std::min(row_end, (panel + 1) * kPanelRows);
  const int64_t rows = last - first, source_row = first - row_begin, place = first % kPanelRows;

  const int64_t row_bytes = code_row_bytes();
  const int64_t whole = row_bytes / int64_t{sizeof(uint32_t)};
  const uint8_t* const code = codes + source_row * row_bytes;
  uint32_t* const words = packed_.as<uint32_t>() + panel * words_ * kPanelRows + place;
  transpose_words(code, row_bytes, rows, whole, words);
  if (whole < words_) {
    const int64_t begin = whole * int64_t{sizeof(uint32_t)};
    for (int64_t row = 0; row < rows; ++row) {
      uint32_t word = 0;
      memcpy(&word, code + row * row_bytes + begin, row_bytes - begin);
      words[whole * kPanelRows + row] = word;
    }
  }

  const int64_t width = scale_bytes(scale_kind_), scale_row = groups_ * width;
  if (scale && shared_) {
    memcpy(scale_.as<uint8_t>() + panel * scale_row, scale + source_row * scale_row, scale_row);
  } else if (scale) {
    const uint8_t* const source = scale + source_row * scale_row;
    const int64_t target = panel * groups_ * kPanelRows + place;
    if (width == 4) {
      transpose(source, scale_row, rows, groups_, scale_.as<uint32_t>() + target);
    } else if (width == 2) {
      transpose(source, scale_row, rows, groups_, scale_.as<uint16_t>() + target);
    } else {
      transpose(source, scale_row, rows, groups_, scale_.as<uint8_t>() + target);
    }
  }
  if (zero) {
    transpose(reinterpret_cast<const uint8_t*>(zero) + source_row * groups_, groups_, rows, groups_,
              zero_.as<int8_t>() + panel * groups_ * kPanelRows + place);
  }
}

}  // namespace fewbits
