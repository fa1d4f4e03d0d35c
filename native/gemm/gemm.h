// Products y = x W^T of float32 activations with packed weights, as Python sees them. The packed
// layout is drawn in kernel.h.
#pragma once

#include <stdint.h>

#include <memory>
#include <string>
#include <vector>

#include "gemm/kernel.h"
#include "memory.h"

namespace fewbits {

// Throws std::invalid_argument for a name that isn't int4, int8, bf16, f16 or f32.
WeightKind weight_kind(const std::string& name);

// A weight [N, K] in the kernels' layout. It is filled with blocks of rows, and copies what it is
// given.
class PackedWeight {
 public:
  // Integer kinds have a float32 scale, and a zero point where `zero`, per row and group of
  // `group_size` columns: a multiple of the codes in a word (8 for int4, 4 for int8), or K. The
  // others have neither, and group_size K. Throws std::invalid_argument.
  PackedWeight(WeightKind kind, int64_t N, int64_t K, int64_t group_size, bool zero);

  // codes: [rows][code_row_bytes()], little-endian, nibbles low first; scale and zero:
  // [rows][groups], or null where the weight has none. Zero points are in the units of the
  // offset-binary codes.
  void fill(int64_t row_begin, int64_t rows, const uint8_t* codes, const float* scale,
            const float* zero);

  WeightKind kind() const { return kind_; }
  int64_t N() const { return n_; }
  int64_t K() const { return k_; }
  int64_t group_size() const { return group_size_; }
  int64_t groups() const { return groups_; }
  bool quantized() const { return kind_ == WeightKind::int4 || kind_ == WeightKind::int8; }
  bool has_zero() const { return zero_.bytes() != 0; }
  int64_t code_row_bytes() const;
  int64_t nbytes() const;
  int64_t panels() const { return (n_ + kPanelRows - 1) / kPanelRows; }
  // The first row that no fill has covered, or N.
  int64_t first_missing_row() const;

  const SpanList spans() const {
    return {spans_.data(), static_cast<int64_t>(spans_.size()), codes_per_word(kind_)};
  }
  GemmPanel panel(int64_t index) const;

 private:
  void fill_panel(int64_t panel, int64_t row_begin, int64_t row_end, const uint8_t* codes,
                  const float* scale, const float* zero);

  WeightKind kind_;
  int64_t n_, k_, group_size_, groups_, words_;
  std::vector<Span> spans_;
  std::vector<bool> filled_;
  Buffer packed_, scale_, zero_;
};

// Several products that share x: one pass of the thread pool for all of them.
class Gemm {
 public:
  // One bias per weight, [N] or empty. Throws std::invalid_argument where the K differ, rows are
  // missing or a bias has another length.
  Gemm(std::vector<std::shared_ptr<const PackedWeight>> weights,
       std::vector<std::vector<float>> biases);

  // y[i] [M][N_i] = x [M][K] W_i^T + bias_i, added to what y holds where `add`.
  void run(const float* x, int64_t M, float* const* y, bool add) const;

  int64_t K() const { return k_; }
  size_t size() const { return products_.size(); }

 private:
  struct Product {
    std::shared_ptr<const PackedWeight> weight;
    std::vector<float> bias;
    const GemmKernel* kernel;
    size_t input;  // index into inputs_
    int64_t panel_begin;
  };
  // One way to prepare x, and the products that need it so.
  struct Input {
    const GemmKernel* kernel;
    const PackedWeight* weight;
    bool sums;
    int64_t value_stride, sum_stride;
  };
  struct Pass;

  void add_product(std::shared_ptr<const PackedWeight> weight, std::vector<float> bias);

  int64_t k_ = 0;
  int64_t panels_ = 0;
  std::vector<Product> products_;
  std::vector<Input> inputs_;
};

}  // namespace fewbits
