// The experts of a layer: each chosen one's products over the rows that chose it. Few rows are one
// call of the thread pool; of many, groups of experts take turns.
//
// A row's results are weighed and added to y in float32, in the order of the experts' numbers. No
// row's bits depend on other rows.
#pragma once

#include <stdint.h>

#include <memory>
#include <vector>

#include "gemm/gemm.h"

namespace fewbits {

// gate and up [W, H], or one product [2 W, H] that has gate's rows and behind them up's; and down
// [H, W].
struct Expert {
  std::vector<std::shared_ptr<const Product>> inputs;
  std::shared_ptr<const Product> down;
};

struct Form;

class Experts {
 public:
  // Throws std::invalid_argument where shapes don't fit, or what Gemm doesn't take.
  Experts(std::vector<Expert> experts, Gating gating);
  ~Experts();
  Experts(const Experts&) = delete;

  // y [T][H] += sum over a row's k experts of weight * down(gated(gate(x), up(x))), x [T][H].
  // `chosen` and `weights` are [T][k]; the numbers of a row's experts differ. Throws
  // std::invalid_argument where there is no expert of a number.
  void run(const float* x, const int32_t* chosen, const float* weights, int64_t T, int64_t k,
           float* y) const;

 private:
  struct Bound;
  struct Pass;

  void run_tokens(const float* x, const int32_t* chosen, const float* weights, int64_t T, int64_t k,
                  float* y) const;

  int64_t h_ = 0, w_ = 0;
  Gating gating_;
  std::vector<Bound> experts_;
  std::vector<Form> forms_;
  std::vector<int32_t> takers_;  // of forms of x: experts
  // The most that an expert needs: words of a row of x in all its forms, and of what `down` takes.
  int64_t x_words_ = 0, down_words_ = 0;
  size_t most_forms_ = 0;
};

}  // namespace fewbits
