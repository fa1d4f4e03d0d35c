#include "gemm/gemm.h"

#include <string.h>

#include <algorithm>
#include <stdexcept>

#include "cpu.h"
#include "threads.h"

namespace fewbits {
namespace {

constexpr int64_t kFloatsPerLine = 16;

// Preparing this many values of x takes about as long as waking the pool.
constexpr int64_t kParallelPrepare = 1 << 16;

const GemmKernel* choose_kernel(WeightKind kind) {
  const GemmKernel* kernel = nullptr;
#if defined(__x86_64__)
  const Tier chosen = tier();
  if (chosen >= Tier::avx512_bf16) kernel = gemm_kernel_avx512_bf16(kind);
  if (!kernel && chosen >= Tier::avx512) kernel = gemm_kernel_avx512(kind);
  if (!kernel && chosen >= Tier::avx2) kernel = gemm_kernel_avx2(kind);
#endif
  return kernel ? kernel : gemm_kernel_ref(kind);
}

// An odd number of cache lines: rows a power of two apart would compete for the same set of the
// cache.
int64_t row_stride(int64_t floats) {
  return ((floats + kFloatsPerLine - 1) / kFloatsPerLine | 1) * kFloatsPerLine;
}

// The calling thread's memory for prepared rows of x.
float* scratch(int64_t floats) {
  thread_local Buffer buffer;
  const size_t bytes = floats * sizeof(float);
  if (buffer.bytes() < bytes) buffer = Buffer(bytes);
  return buffer.as<float>();
}

}  // namespace

Gemm::Gemm(std::vector<std::shared_ptr<const PackedWeight>> weights,
           std::vector<std::vector<float>> biases) {
  if (weights.empty()) throw std::invalid_argument("a product needs at least one weight");
  if (biases.size() != weights.size()) {
    throw std::invalid_argument("a product needs as many biases as weights");
  }
  k_ = weights[0]->K();
  for (size_t i = 0; i < weights.size(); ++i) {
    add_product(std::move(weights[i]), std::move(biases[i]));
  }
}

void Gemm::add_product(std::shared_ptr<const PackedWeight> weight, std::vector<float> bias) {
  if (weight->K() != k_) {
    throw std::invalid_argument("weights with " + std::to_string(k_) + " and " +
                                std::to_string(weight->K()) + " columns can't share x");
  }
  if (weight->first_missing_row() != weight->N()) {
    throw std::invalid_argument("row " + std::to_string(weight->first_missing_row()) +
                                " of a packed weight has not been filled");
  }
  if (!bias.empty() && static_cast<int64_t>(bias.size()) != weight->N()) {
    throw std::invalid_argument("a bias of " + std::to_string(bias.size()) +
                                " elements doesn't fit a weight of " + std::to_string(weight->N()) +
                                " rows");
  }
  const GemmKernel* kernel = choose_kernel(weight->kind());
  const SpanList list = weight->spans();
  const bool sums = weight->has_zero() || kernel->sums_when_symmetric;
  size_t input = 0;
  while (input < inputs_.size() &&
         !(inputs_[input].kernel->prepare == kernel->prepare && inputs_[input].sums == sums &&
           inputs_[input].weight->spans().codes_per_word == list.codes_per_word &&
           inputs_[input].weight->group_size() == weight->group_size())) {
    ++input;
  }
  if (input == inputs_.size()) {
    const int64_t padded = int64_t{list.spans[list.count - 1].word_end} * list.codes_per_word;
    inputs_.push_back({kernel, weight.get(), sums, row_stride(padded / kernel->values_per_float),
                       sums ? row_stride(list.count) : 0});
  }
  const int64_t panel_begin = panels_;
  panels_ += weight->panels();
  products_.push_back({std::move(weight), std::move(bias), kernel, input, panel_begin});
}

// Up to kMaxRows rows of x and y.
struct Gemm::Pass {
  const Gemm* gemm;
  const float* x;
  int64_t row_begin, rows;
  float* const* y;
  bool add;
  std::vector<GemmInput> inputs;

  static void prepare(void* context, int64_t begin, int64_t end) {
    const Pass& pass = *static_cast<Pass*>(context);
    for (size_t i = 0; i < pass.inputs.size(); ++i) {
      const Input& how = pass.gemm->inputs_[i];
      const GemmInput& in = pass.inputs[i];
      for (int64_t m = begin; m < end; ++m) {
        how.kernel->prepare(pass.x + (pass.row_begin + m) * pass.gemm->k_, pass.gemm->k_,
                            how.weight->spans(),
                            const_cast<float*>(in.values) + m * in.value_stride,
                            how.sums ? const_cast<float*>(in.sums) + m * in.sum_stride : nullptr);
      }
    }
  }

  static void multiply(void* context, int64_t begin, int64_t end) {
    const Pass& pass = *static_cast<Pass*>(context);
    alignas(64) float totals[(kMaxRows + kRowPadding) * kPanelRows];
    size_t i = 0;
    for (int64_t panel = begin; panel < end; ++panel) {
      const std::vector<Product>& products = pass.gemm->products_;
      while (i + 1 < products.size() && panel >= products[i + 1].panel_begin) ++i;
      const Product& product = products[i];
      const int64_t index = panel - product.panel_begin;
      memset(totals, 0, (pass.rows + kRowPadding) * kPanelRows * sizeof(float));
      product.kernel->panel(product.weight->panel(index), pass.inputs[product.input], pass.rows,
                            totals);
      pass.store(product, pass.y[i], index, totals);
    }
  }

  void store(const Product& product, float* out, int64_t panel, const float* totals) const {
    const int64_t N = product.weight->N();
    const int64_t n = panel * kPanelRows;
    const int64_t columns = std::min<int64_t>(kPanelRows, N - n);
    const float* bias = product.bias.empty() ? nullptr : product.bias.data() + n;
    for (int64_t m = 0; m < rows; ++m) {
      float* row = out + (row_begin + m) * N + n;
      const float* total = totals + m * kPanelRows;
      for (int64_t j = 0; j < columns; ++j) {
        const float value = bias ? total[j] + bias[j] : total[j];
        row[j] = add ? row[j] + value : value;
      }
    }
  }
};

void Gemm::run(const float* x, int64_t M, float* const* y, bool add) const {
  const int64_t row_limit = std::min<int64_t>(M, kMaxRows);
  int64_t floats = 0;
  for (const Input& input : inputs_) {
    floats += (row_limit + kRowPadding) * (input.value_stride + input.sum_stride);
  }
  float* const memory = scratch(floats);
  for (int64_t m = 0; m < M; m += kMaxRows) {
    Pass pass{this, x, m, std::min<int64_t>(kMaxRows, M - m), y, add, {}};
    float* next = memory;
    for (const Input& input : inputs_) {
      float* const values = next;
      float* const sums = values + (row_limit + kRowPadding) * input.value_stride;
      next = sums + (row_limit + kRowPadding) * input.sum_stride;
      memset(values + pass.rows * input.value_stride, 0,
             kRowPadding * input.value_stride * sizeof(float));
      memset(sums + pass.rows * input.sum_stride, 0,
             kRowPadding * input.sum_stride * sizeof(float));
      pass.inputs.push_back({values, input.value_stride, sums, input.sum_stride});
    }
    if (pass.rows > 1 && pass.rows * k_ >= kParallelPrepare) {
      parallel_for(pass.rows, Pass::prepare, &pass);
    } else {
      Pass::prepare(&pass, 0, pass.rows);
    }
    parallel_for(panels_, Pass::multiply, &pass);
  }
}

}  // namespace fewbits
