// Products y = x W^T of float32 activations with packed weights, as Python sees them. The packed
// layout is drawn in kernel.h.
#pragma once

#include <stdint.h>

#include <memory>
#include <string>
#include <vector>

#include "elementwise/elementwise.h"
#include "gemm/kernel.h"
#include "memory.h"

namespace fewbits {

// Throw std::invalid_argument for a name that isn't one of the enumerators'.
WeightKind weight_kind(const std::string& name);
ScaleKind scale_kind(const std::string& name);
Quantizer quantizer(const std::string& name);
ScaleRounding scale_rounding(const std::string& name);

// A weight [N, K] in the kernels' layout. It is filled with blocks of rows, and copies what it is
// given.
class PackedWeight {
 public:
  // `group_size` columns share a scale: a multiple of the codes in a word, or K. `shared`: all rows
  // of each panel of 64 do too. Integer kinds may have zero points. Throws std::invalid_argument.
  PackedWeight(WeightKind kind, int64_t N, int64_t K, int64_t group_size, ScaleKind scale,
               bool shared, bool zero);

  // codes: [rows][code_row_bytes()], little-endian, nibbles low first; scale: [rows][groups] in the
  // type of the scales; zero: [rows][groups], relative to the code that stands for 0. Null where
  // the weight has none.
  void fill(int64_t row_begin, int64_t rows, const uint8_t* codes, const void* scale,
            const int8_t* zero);

  WeightKind kind() const { return kind_; }
  int64_t N() const { return n_; }
  int64_t K() const { return k_; }
  int64_t group_size() const { return group_size_; }
  int64_t groups() const { return groups_; }
  ScaleKind scale() const { return scale_kind_; }
  bool has_zero() const { return has_zero_; }
  int64_t code_row_bytes() const;
  int64_t nbytes() const;
  int64_t panels() const { return (n_ + kPanelRows - 1) / kPanelRows; }
  // The first row that no fill has covered, or N.
  int64_t first_missing_row() const;

  GemmPanel panel(int64_t index) const;
  // Where a panel begins.
  const uint32_t* words(int64_t panel) const {
    return packed_.as<uint32_t>() + panel * words_ * kPanelRows;
  }

 private:
  void fill_panel(int64_t panel, int64_t row_begin, int64_t row_end, const uint8_t* codes,
                  const uint8_t* scale, const int8_t* zero);

  WeightKind kind_;
  int64_t n_, k_, group_size_, groups_, words_;
  ScaleKind scale_kind_;
  bool shared_, has_zero_;
  std::vector<bool> filled_;
  Buffer packed_, scale_, zero_;
};

// What is multiplied with x, and how x is taken.
struct Product {
  std::shared_ptr<const PackedWeight> weight;
  std::vector<float> bias;  // [N] or empty
  Activation activation;
  double multiplier = 1;        // of the whole product
  std::vector<int32_t> order;   // [K] or empty: stored column j is column order[j] of x
  std::vector<float> row_sums;  // [N] of the dequantized weight, without `multiplier`; where x
                                // may have zero points
};

// The rows x [M][K] of a product: as they lie, or computed one by one as the product takes them in,
// which saves a pass over memory and a call of the pool.
struct RowSource {
  enum class Kind { plain, rms_norm, gated } kind;
  const float* x;             // or what the operation (elementwise.h) is done to
  const float* other;         // rms_norm: the weight [K]; gated: up [M][K]
  float eps = 0, offset = 0;  // of rms_norm
  Gating gating = {};
};

struct Form;

// Several products: one pass of the thread pool for all of them.
class Gemm {
 public:
  // They share x; or each takes its own part of a row of x, and makes its own part of a row of y.
  enum class Parts { shared, apart };

  // Throws std::invalid_argument where x is shared and the K differ, rows are missing, a length
  // doesn't fit, x would be scaled in groups that aren't whole words of the weight, or be integers
  // of 16 bits where the weight's codes aren't integers.
  explicit Gemm(std::vector<std::shared_ptr<const Product>> products, Parts parts = Parts::shared);
  ~Gemm();
  Gemm(Gemm&&) noexcept;

  // Added to what y holds where `add`:
  //   shared   y[i] [M][N_i] = x [M][K] W_i^T + bias_i
  //   apart    y[0] [M][sum of N_i], whose part i is the part i of x [M][sum of K_i], times W_i^T,
  //            + bias_i
  void run(const RowSource& x, int64_t M, float* const* y, bool add) const;

  int64_t K() const { return k_; }  // numbers in a row of x
  size_t size() const;              // arrays y

 private:
  struct Part;
  struct Pass;

  int64_t k_ = 0;
  int64_t panels_ = 0;
  std::vector<Part> parts_;
  std::vector<Form> forms_;
};

}  // namespace fewbits
