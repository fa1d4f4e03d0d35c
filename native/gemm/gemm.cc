#include "gemm/gemm.h"

#include <math.h>
#include <string.h>

#include <algorithm>
#include <stdexcept>

#include "cpu.h"
#include "elementwise/elementwise.h"
#include "threads.h"

namespace fewbits {
namespace {

constexpr int64_t kWordsPerLine = 16;

// Preparing this many values of x takes about as long as waking the pool.
constexpr int64_t kParallelPrepare = 1 << 14;

const GemmKernel* choose_kernel(WeightKind kind, DotKind dot) {
  const GemmKernel* kernel = nullptr;
#if defined(__x86_64__)
  const Tier chosen = tier();
  if (chosen >= Tier::avx512_bf16) kernel = gemm_kernel_avx512_bf16(kind, dot);
  if (!kernel && chosen >= Tier::avx512_vnni) kernel = gemm_kernel_avx512_vnni(kind, dot);
  if (!kernel && chosen >= Tier::avx512) kernel = gemm_kernel_avx512(kind, dot);
  if (!kernel && chosen >= Tier::avx2_vnni) kernel = gemm_kernel_avx2_vnni(kind, dot);
  if (!kernel && chosen >= Tier::avx2) kernel = gemm_kernel_avx2(kind, dot);
#endif
  return kernel ? kernel : gemm_kernel_ref(kind, dot);
}

const RowKernels* choose_row_kernels() {
#if defined(__x86_64__)
  if (tier() >= Tier::avx512) return row_kernels_avx512();
  if (tier() >= Tier::avx2) return row_kernels_avx2();
#endif
  return row_kernels_ref();
}

bool has_row_zero(const Activation& activation) {
  return activation.quantizer == Quantizer::int8_token_asymmetric ||
         activation.quantizer == Quantizer::int8_static_asymmetric;
}

DotKind dot_kind(const Product& product) {
  const WeightKind kind = product.weight->kind();
  const Quantizer quantizer = product.activation.quantizer;
  if (kind == WeightKind::fp4 && (quantizer == Quantizer::nvfp4 || quantizer == Quantizer::mxfp4)) {
    return DotKind::int8;
  }
  if (kind != WeightKind::int4 && kind != WeightKind::int8) return DotKind::floats;
  switch (quantizer) {
    case Quantizer::int8_token:
    case Quantizer::int8_token_asymmetric:
    case Quantizer::int8_static:
    case Quantizer::int8_static_asymmetric:
    case Quantizer::int8_group:
      return DotKind::int8;
    case Quantizer::int16_group:
      return DotKind::int16;
    default:
      return DotKind::floats;
  }
}

// An odd number of cache lines: rows a power of two apart would compete for the same set of the
// cache.
int64_t row_stride(int64_t words) {
  return ((words + kWordsPerLine - 1) / kWordsPerLine | 1) * kWordsPerLine;
}

// The calling thread's memory: for prepared rows of x; and for the row that is being prepared, as
// it is computed and as it is quantized.
template <int purpose>
float* scratch(int64_t words) {
  thread_local Buffer buffer;
  const size_t bytes = words * sizeof(float);
  if (buffer.bytes() < bytes) buffer = Buffer(bytes);
  return buffer.as<float>();
}

// Codes of x in groups (or one), doubled. NaN is no integer: the group's scale tells of it.
void double_codes(float* codes, int64_t K, int64_t group_size, float* scales) {
  if (group_size == 0) group_size = K;
  for (int64_t begin = 0; begin < K; begin += group_size, ++scales) {
    const int64_t end = std::min(begin + group_size, K);
    bool numbers = true;
    for (int64_t k = begin; k < end; ++k) {
      numbers &= codes[k] == codes[k];
      codes[k] *= 2;
    }
    if (!numbers) *scales = NAN;
  }
}

std::vector<Span> make_spans(const Product& product) {
  const PackedWeight& weight = *product.weight;
  const int64_t codes = codes_per_word(weight.kind());
  const int64_t words = (weight.K() + codes - 1) / codes;
  const int64_t x_group =
      product.activation.group_size ? product.activation.group_size : weight.K();
  std::vector<Span> spans;
  for (int64_t begin = 0; begin < words;) {
    const int64_t k = begin * codes;
    const int64_t border =
        std::min((k / weight.group_size() + 1) * weight.group_size(), (k / x_group + 1) * x_group);
    const int64_t limit = std::min((border + codes - 1) / codes, begin + kSpanCodes / codes);
    const int64_t end = std::min(limit, words);
    spans.push_back({static_cast<int32_t>(begin), static_cast<int32_t>(end),
                     static_cast<int32_t>(k / weight.group_size())});
    begin = end;
  }
  return spans;
}

}  // namespace

Gemm::Gemm(std::vector<std::shared_ptr<const Product>> products) {
  if (products.empty()) throw std::invalid_argument("a product needs at least one weight");
  k_ = products[0]->weight->K();
  for (auto& product : products) add(std::move(product));
}

void Gemm::add(std::shared_ptr<const Product> product) {
  const PackedWeight& weight = *product->weight;
  const auto need = [](bool fits, const std::string& text) {
    if (!fits) throw std::invalid_argument(text);
  };
  need(weight.K() == k_, "weights with " + std::to_string(k_) + " and " +
                             std::to_string(weight.K()) + " columns can't share x");
  need(weight.first_missing_row() == weight.N(), "row " +
                                                     std::to_string(weight.first_missing_row()) +
                                                     " of a packed weight has not been filled");
  const auto fits = [](const auto& values, int64_t length) {
    return values.empty() || static_cast<int64_t>(values.size()) == length;
  };
  need(fits(product->bias, weight.N()) && fits(product->row_sums, weight.N()) &&
           fits(product->order, k_),
       "a bias, sums or an order doesn't fit a weight of " + std::to_string(weight.N()) + " x " +
           std::to_string(k_));
  for (const int32_t column : product->order) {
    need(column >= 0 && column < k_, "an order names column " + std::to_string(column));
  }
  const Activation& activation = product->activation;
  need(!has_row_zero(activation) || !product->row_sums.empty(),
       "zero points of x need the sums of the weight's rows");
  need(activation.group_size >= 0 && (activation.group_size >= k_ ||
                                      activation.group_size % codes_per_word(weight.kind()) == 0),
       "groups of " + std::to_string(activation.group_size) + " columns of x cut a word in two");
  if (activation.quantizer == Quantizer::int16_group) {
    need(dot_kind(*product) == DotKind::int16,
         "only integer weights take x as integers of 16 bits");
    need(activation.group_size > 0 && activation.group_size <= kMaxInt16Codes,
         "groups of " + std::to_string(activation.group_size) + " columns of 16 bits overflow");
  }
  const GemmKernel* kernel = choose_kernel(weight.kind(), dot_kind(*product));
  const size_t input = input_for(*product, kernel);
  const int64_t panel_begin = panels_;
  panels_ += weight.panels();
  parts_.push_back({std::move(product), kernel, input, panel_begin});
}

size_t Gemm::input_for(const Product& product, const GemmKernel* kernel) {
  for (size_t i = 0; i < inputs_.size(); ++i) {
    const Input& input = inputs_[i];
    const Product& other = *input.product;
    if (input.kernel->prepare == kernel->prepare && input.kernel->sums == kernel->sums &&
        other.activation == product.activation && other.order == product.order &&
        other.weight->group_size() == product.weight->group_size()) {
      return i;
    }
  }
  std::vector<Span> spans = make_spans(product);
  const int64_t words = int64_t{spans.back().word_end} * kernel->x_words;
  const int64_t span_stride = row_stride(static_cast<int64_t>(spans.size()));
  inputs_.push_back({kernel, &product, std::move(spans), row_stride(words), span_stride});
  return inputs_.size() - 1;
}

int64_t Gemm::Input::words() const {
  return (kMaxRows + kRowPadding) * (value_stride + 2 * span_stride + 2);
}

// Rows of x in the form of an input.
struct Gemm::Prepared {
  const Input* how;
  uint32_t* values;
  float *sums, *scales, *factor, *zero;

  Prepared(const Input& input, float* memory) : how(&input) {
    constexpr int64_t kRows = kMaxRows + kRowPadding;
    values = reinterpret_cast<uint32_t*>(memory);
    sums = memory + kRows * input.value_stride;
    scales = sums + kRows * input.span_stride;
    factor = scales + kRows * input.span_stride;
    zero = factor + kRows;
  }

  // The rows behind the last take part in products that nobody reads, so they must be finite only
  // for the sake of speed: subnormals and NaN may be slow.
  void pad(int64_t rows) const {
    memset(values + rows * how->value_stride, 0, kRowPadding * how->value_stride * 4);
    memset(sums + rows * how->span_stride, 0, kRowPadding * how->span_stride * 4);
    memset(scales + rows * how->span_stride, 0, kRowPadding * how->span_stride * 4);
  }

  GemmInput input() const {
    const Activation& activation = how->product->activation;
    return {values, how->value_stride, how->kernel->sums ? sums : nullptr,
            activation.group_size ? scales : nullptr, how->span_stride};
  }

  void row(const RowKernels& kernels, const float* x, int64_t K, int64_t m) const {
    const Activation& activation = how->product->activation;
    const std::vector<int32_t>& order = how->product->order;
    const int64_t groups = activation.group_size ? (K - 1) / activation.group_size + 1 : 1;
    const bool copies = activation.quantizer != Quantizer::none || !order.empty();
    float* const line = copies ? scratch<1>(K + groups) : nullptr;
    float* const group_scales = line + K;
    if (!order.empty()) {
      for (int64_t k = 0; k < K; ++k) line[k] = x[order[k]];
      x = line;
    }
    factor[m] = 1;
    zero[m] = 0;
    if (activation.quantizer != Quantizer::none) {
      kernels.quantize(activation, x, K, line, group_scales, zero + m);
      x = line;
      if (!activation.group_size) factor[m] = group_scales[0];
    }
    if (how->kernel->doubled) double_codes(line, K, activation.group_size, group_scales);
    uint32_t* const words = values + m * how->value_stride;
    how->kernel->prepare(x, K, words);
    const int64_t codes = codes_per_word(how->product->weight->kind());
    for (size_t s = 0; s < how->spans.size(); ++s) {
      const Span& span = how->spans[s];
      const int64_t place = m * how->span_stride + static_cast<int64_t>(s);
      if (how->kernel->sums) sums[place] = how->kernel->sum(words, span.word_begin, span.word_end);
      if (activation.group_size) {
        scales[place] = group_scales[span.word_begin * codes / activation.group_size];
      }
    }
  }
};

// Up to kMaxRows rows of x and y.
struct Gemm::Pass {
  const Gemm* gemm;
  const RowKernels* kernels;
  RowSource x;
  int64_t row_begin, rows;
  float* const* y;
  bool add;
  std::vector<Prepared> inputs;

  static void prepare(void* context, int64_t begin, int64_t end) {
    const Pass& pass = *static_cast<Pass*>(context);
    for (int64_t m = begin; m < end; ++m) {
      const float* const x = pass.row(pass.row_begin + m);
      for (const Prepared& input : pass.inputs) input.row(*pass.kernels, x, pass.gemm->k_, m);
    }
  }

  // Row m of x, in the thread's memory where it has to be computed.
  const float* row(int64_t m) const {
    const int64_t K = gemm->k_;
    const float* const stored = x.x + m * K;
    if (x.kind == RowSource::Kind::plain) return stored;
    float* const line = scratch<2>(K);
    if (x.kind == RowSource::Kind::rms_norm) {
      rms_norm_row(stored, x.other, line, K, x.eps, x.offset);
    } else {
      silu_mul_row(stored, x.other + m * K, line, K, x.limit);
    }
    return line;
  }

  static void multiply(void* context, int64_t begin, int64_t end) {
    const Pass& pass = *static_cast<Pass*>(context);
    const std::vector<Part>& parts = pass.gemm->parts_;
    alignas(64) float totals[(kMaxRows + kRowPadding) * kPanelRows];
    size_t i = 0;
    for (int64_t panel = begin; panel < end; ++panel) {
      while (i + 1 < parts.size() && panel >= parts[i + 1].panel_begin) ++i;
      const Part& part = parts[i];
      const Prepared& input = pass.inputs[part.input];
      GemmPanel weight = part.product->weight->panel(panel - part.panel_begin);
      weight.list = {input.how->spans.data(), static_cast<int64_t>(input.how->spans.size())};
      memset(totals, 0, (pass.rows + kRowPadding) * kPanelRows * sizeof(float));
      part.kernel->panel(weight, input.input(), pass.rows, totals);
      pass.finish(part, input, pass.y[i], panel - part.panel_begin, totals);
    }
  }

  void finish(const Part& part, const Prepared& input, float* out, int64_t panel,
              const float* totals) const {
    const Product& product = *part.product;
    const int64_t N = product.weight->N();
    const int64_t n = panel * kPanelRows, columns = std::min<int64_t>(kPanelRows, N - n);
    const double unit = part.kernel->doubled ? 0.25 : 1;
    const double multiplier = unit * product.multiplier * product.activation.global_scale;
    float factor[kMaxRows];
    for (int64_t m = 0; m < rows; ++m) factor[m] = static_cast<float>(input.factor[m] * multiplier);
    float bias[kPanelRows] = {}, sums[kPanelRows] = {};
    const bool zeros = has_row_zero(product.activation);
    if (!product.bias.empty()) std::copy_n(product.bias.data() + n, columns, bias);
    if (zeros) std::copy_n(product.row_sums.data() + n, columns, sums);
    kernels->finish({out + row_begin * N + n, N, columns, factor, zeros ? input.zero : nullptr,
                     sums, product.bias.empty() ? nullptr : bias, add},
                    rows, totals);
  }
};

void Gemm::run(const RowSource& x, int64_t M, float* const* y, bool add) const {
  static const RowKernels* const kernels = choose_row_kernels();
  int64_t words = 0;
  for (const Input& input : inputs_) words += input.words();
  float* const memory = scratch<0>(words);
  for (int64_t m = 0; m < M; m += kMaxRows) {
    Pass pass{this, kernels, x, m, std::min<int64_t>(kMaxRows, M - m), y, add, {}};
    float* next = memory;
    for (const Input& input : inputs_) {
      pass.inputs.emplace_back(input, next);
      pass.inputs.back().pad(pass.rows);
      next += input.words();
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
