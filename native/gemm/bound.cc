#include "gemm/bound.h"

#include <math.h>
#include <string.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu.h"
#include "elementwise/elementwise.h"
#include "threads.h"

namespace fewbits {
namespace {

constexpr int64_t kWordsPerLine = 16;

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

const RowKernels& row_kernels() {
  static const RowKernels* const chosen = [] {
#if defined(__x86_64__)
    if (tier() >= Tier::avx512) return row_kernels_avx512();
    if (tier() >= Tier::avx2) return row_kernels_avx2();
#endif
    return row_kernels_ref();
  }();
  return *chosen;
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

enum class Purpose { prepared_rows, computed_row, quantized_row };

// The calling thread's memory, kept from call to call.
template <Purpose purpose>
float* scratch(int64_t words) {
  thread_local Buffer buffer;
  const size_t bytes = words * sizeof(float);
  if (buffer.bytes() < bytes) buffer = Buffer(bytes);
  return buffer.as<float>();
}

std::vector<Span> make_spans(const Product& product, int most_codes) {
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
    const int64_t limit = std::min((border + codes - 1) / codes, begin + most_codes / codes);
    const int64_t end = std::min(limit, words);
    spans.push_back({static_cast<int32_t>(begin), static_cast<int32_t>(end),
                     static_cast<int32_t>(k / weight.group_size())});
    begin = end;
  }
  return spans;
}

}  // namespace

Form::Form(const Product& p, const GemmKernel& k)
    : kernel(&k), product(&p), spans(make_spans(p, k.span_codes)) {
  value_stride = row_stride(int64_t{spans.back().word_end} * k.x_words);
  span_stride = row_stride(static_cast<int64_t>(spans.size()));
  span_words = spans[0].word_end;
  const int64_t codes = codes_per_word(p.weight->kind()), x_group = p.activation.group_size;
  for (const Span& span : spans) {
    if (span.word_end - span.word_begin != span_words) span_words = 0;
    if (x_group) x_groups.push_back(static_cast<int32_t>(span.word_begin * codes / x_group));
  }
}

SpanList Form::list() const {
  return {spans.data(), static_cast<int64_t>(spans.size()), span_words};
}

bool Form::serves(const Product& other, const GemmKernel& its_kernel) const {
  return kernel->prepare == its_kernel.prepare && kernel->sums == its_kernel.sums &&
         product->activation == other.activation && product->order == other.order &&
         product->weight->K() == other.weight->K() &&
         product->weight->group_size() == other.weight->group_size();
}

int64_t Rows::words(const Form& form, int64_t rows) {
  return rows * (form.value_stride + 2 * form.span_stride + 2);
}

Rows::Rows(const Form& form, int64_t rows, float* memory) : form_(&form) {
  values_ = reinterpret_cast<uint32_t*>(memory);
  sums_ = values_ + rows * form.value_stride;
  scales_ = memory + rows * (form.value_stride + form.span_stride);
  factors_ = scales_ + rows * form.span_stride;
  zeros_ = factors_ + rows;
}

void Rows::set(int64_t m, const float* x) const {
  const GemmKernel& kernel = *form_->kernel;
  const Product& product = *form_->product;
  const Activation& activation = product.activation;
  const std::vector<int32_t>& order = product.order;
  const int64_t K = product.weight->K();
  const int64_t groups = activation.group_size ? (K - 1) / activation.group_size + 1 : 1;
  const bool copies = activation.quantizer != Quantizer::none || !order.empty();
  float* const line = copies ? scratch<Purpose::quantized_row>(K + groups) : nullptr;
  float* const group_scales = line + K;
  if (!order.empty()) {
    for (int64_t k = 0; k < K; ++k) line[k] = x[order[k]];
    x = line;
  }
  factors_[m] = 1;
  zeros_[m] = 0;
  if (activation.quantizer != Quantizer::none) {
    row_kernels().quantize(activation, x, K, line, group_scales, zeros_ + m);
    x = line;
    if (!activation.group_size) factors_[m] = group_scales[0];
  }
  uint32_t* const words = values_ + m * form_->value_stride;
  kernel.prepare(x, K, words);
  if (kernel.sums) kernel.sums(words, form_->list(), sums_ + m * form_->span_stride);
  float* const scales = scales_ + m * form_->span_stride;
  for (size_t s = 0; s < form_->x_groups.size(); ++s) scales[s] = group_scales[form_->x_groups[s]];
}

void Rows::copy(int64_t m, const Rows& other, int64_t row) const {
  const auto take = [&](auto* to, const auto* from, int64_t stride) {
    memcpy(to + m * stride, from + row * stride, stride * 4);
  };
  take(values_, other.values_, form_->value_stride);
  if (form_->kernel->sums) take(sums_, other.sums_, form_->span_stride);
  if (form_->product->activation.group_size) take(scales_, other.scales_, form_->span_stride);
  take(factors_, other.factors_, 1);
  take(zeros_, other.zeros_, 1);
}

BoundProduct::BoundProduct(std::shared_ptr<const Product> given) : product(std::move(given)) {
  const PackedWeight& weight = *product->weight;
  const int64_t N = weight.N(), K = weight.K();
  const auto need = [](bool fits, const std::string& text) {
    if (!fits) throw std::invalid_argument(text);
  };
  need(weight.first_missing_row() == N, "row " + std::to_string(weight.first_missing_row()) +
                                            " of a packed weight has not been filled");
  const auto fits = [](const auto& values, int64_t length) {
    return values.empty() || static_cast<int64_t>(values.size()) == length;
  };
  need(fits(product->bias, N) && fits(product->row_sums, N) && fits(product->order, K),
       "a bias, sums or an order doesn't fit a weight of " + std::to_string(N) + " x " +
           std::to_string(K));
  for (const int32_t column : product->order) {
    need(column >= 0 && column < K, "an order names column " + std::to_string(column));
  }
  const Activation& activation = product->activation;
  need(!has_row_zero(activation) || !product->row_sums.empty(),
       "zero points of x need the sums of the weight's rows");
  need(activation.group_size >= 0 && (activation.group_size >= K ||
                                      activation.group_size % codes_per_word(weight.kind()) == 0),
       "groups of " + std::to_string(activation.group_size) + " columns of x cut a word in two");
  if (activation.quantizer == Quantizer::int16_group) {
    need(dot_kind(*product) == DotKind::int16,
         "only integer weights take x as integers of 16 bits");
    need(activation.group_size > 0 && activation.group_size <= kMaxInt16Codes,
         "groups of " + std::to_string(activation.group_size) + " columns of 16 bits overflow");
  }
  kernel = choose_kernel(weight.kind(), dot_kind(*product));
}

void BoundProduct::multiply(const Rows& x, int64_t begin, int64_t rows, int64_t index,
                            const uint32_t* next, const Target& target) const {
  const Form& form = *x.form_;
  const Activation& activation = product->activation;
  GemmPanel panel = product->weight->panel(index);
  panel.next = next;
  panel.intel = cpu_features().intel;
  panel.list = form.list();
  const uint32_t* const sums = kernel->sums ? x.sums_ + begin * form.span_stride : nullptr;
  const float* const scales =
      activation.group_size ? x.scales_ + begin * form.span_stride : nullptr;
  alignas(64) float totals[kMaxRows * kPanelRows];
  memset(totals, 0, rows * kPanelRows * sizeof(float));
  kernel->panel(
      panel,
      {x.values_ + begin * form.value_stride, form.value_stride, sums, scales, form.span_stride},
      rows, totals);

  const int64_t n = index * kPanelRows;
  const int64_t columns = std::min<int64_t>(kPanelRows, product->weight->N() - n);
  const double unit = kernel->doubled ? 0.25 : 1;
  const double multiplier = unit * product->multiplier * activation.global_scale;
  float factor[kMaxRows];
  for (int64_t m = 0; m < rows; ++m) {
    factor[m] = static_cast<float>(x.factors_[begin + m] * multiplier);
  }
  float bias[kPanelRows], row_sums[kPanelRows];
  const bool zeros = has_row_zero(activation);
  if (!product->bias.empty()) std::copy_n(product->bias.data() + n, columns, bias);
  if (zeros) std::copy_n(product->row_sums.data() + n, columns, row_sums);
  row_kernels().finish({target, columns, factor, zeros ? x.zeros_ + begin : nullptr, row_sums,
                        product->bias.empty() ? nullptr : bias},
                       rows, totals);
}

size_t form_for(std::vector<Form>& forms, const BoundProduct& bound) {
  for (size_t i = 0; i < forms.size(); ++i) {
    if (forms[i].serves(*bound.product, *bound.kernel)) return i;
  }
  forms.emplace_back(*bound.product, *bound.kernel);
  return forms.size() - 1;
}

const float* row_of(const RowSource& x, int64_t K, int64_t m) {
  const float* const stored = x.x + m * K;
  if (x.kind == RowSource::Kind::plain) return stored;
  float* const line = scratch<Purpose::computed_row>(K);
  if (x.kind == RowSource::Kind::rms_norm) {
    rms_norm_row(stored, x.other, line, K, x.eps, x.offset);
  } else {
    gated_row(stored, x.other + m * K, line, K, x.gating);
  }
  return line;
}

float* prepared_memory(int64_t words) { return scratch<Purpose::prepared_rows>(words); }

}  // namespace fewbits
