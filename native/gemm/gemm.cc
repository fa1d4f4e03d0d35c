#include "gemm/gemm.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "gemm/bound.h"
#include "threads.h"

namespace fewbits {

namespace {

// Chunks for each thread: fewer panels are multiplied with some of the rows at a time (a router has
// one panel), but with no fewer than a panel's codes are worth being read for.
constexpr int64_t kChunksPerThread = 4;
constexpr int64_t kRowsWorthReading = 32;

int64_t rows_at_once(int64_t panels, int64_t rows) {
  const int64_t chunks = (kChunksPerThread * thread_count() + panels - 1) / panels;
  return std::max(kRowsWorthReading, (rows + chunks - 1) / chunks);
}

}  // namespace

struct Gemm::Part {
  BoundProduct bound;
  size_t form;  // index into forms_
  int64_t panel_begin;
  int64_t x_begin;           // of its part of a row
  size_t output;             // index into y
  int64_t y_begin, y_width;  // where its part of a row of y begins, and numbers in such a row
};

Gemm::Gemm(std::vector<std::shared_ptr<const Product>> products, Parts parts) {
  if (products.empty()) throw std::invalid_argument("a product needs at least one weight");
  const bool apart = parts == Parts::apart;
  int64_t width = 0;
  for (const auto& product : products) width += product->weight->N();
  if (!apart) k_ = products[0]->weight->K();
  int64_t y_begin = 0;
  for (auto& product : products) {
    const int64_t K = product->weight->K(), N = product->weight->N();
    if (!apart && K != k_) {
      throw std::invalid_argument("weights with " + std::to_string(k_) + " and " +
                                  std::to_string(K) + " columns can't share x");
    }
    const BoundProduct bound(std::move(product));
    if (apart) {
      forms_.emplace_back(*bound.product, *bound.kernel);
      parts_.push_back({bound, forms_.size() - 1, panels_, k_, 0, y_begin, width});
      k_ += K;
      y_begin += N;
    } else {
      parts_.push_back({bound, form_for(forms_, bound), panels_, 0, parts_.size(), 0, N});
    }
    panels_ += bound.product->weight->panels();
  }
}

Gemm::~Gemm() = default;
Gemm::Gemm(Gemm&&) noexcept = default;

size_t Gemm::size() const { return parts_.back().output + 1; }

// Up to kMaxRows rows of x and y.
struct Gemm::Pass {
  const Gemm* gemm;
  RowSource x;
  int64_t row_begin, rows, at_once;  // rows that a panel is multiplied with at once
  float* const* y;
  bool add;
  std::vector<Rows> forms;

  int64_t chunks() const { return (rows + at_once - 1) / at_once; }

  static void prepare(void* context, int64_t begin, int64_t end) {
    const Pass& pass = *static_cast<Pass*>(context);
    for (int64_t m = begin; m < end; ++m) {
      const float* const x = row_of(pass.x, pass.gemm->k_, pass.row_begin + m);
      for (size_t i = 0; i < pass.forms.size(); ++i) {
        // Parts that are apart have a form each, the others begin at 0.
        pass.forms[i].set(m, x + pass.gemm->parts_[i].x_begin);
      }
    }
  }

  static void multiply(void* context, int64_t begin, int64_t end) {
    const Pass& pass = *static_cast<Pass*>(context);
    const std::vector<Part>& parts = pass.gemm->parts_;
    const int64_t chunks = pass.chunks();
    size_t i = 0;
    for (; begin < end; ++begin) {
      const int64_t panel = begin / chunks, m = begin % chunks * pass.at_once;
      while (i + 1 < parts.size() && panel >= parts[i + 1].panel_begin) ++i;
      const Part& part = parts[i];
      const PackedWeight& weight = *part.bound.product->weight;
      const int64_t index = panel - part.panel_begin;
      const bool last = index + 1 == weight.panels() && i + 1 < parts.size();
      const uint32_t* const next =
          last ? parts[i + 1].bound.product->weight->words(0) : weight.words(index + 1);
      float* const out = pass.y[part.output] + (pass.row_begin + m) * part.y_width + part.y_begin +
                         index * kPanelRows;
      part.bound.multiply(pass.forms[part.form], m, std::min(pass.at_once, pass.rows - m), index,
                          next, {out, part.y_width, pass.add});
    }
  }
};

void Gemm::run(const RowSource& x, int64_t M, float* const* y, bool add) const {
  for (int64_t m = 0; m < M; m += kMaxRows) {
    const int64_t rows = std::min<int64_t>(kMaxRows, M - m);
    Pass pass{this, x, m, rows, rows_at_once(panels_, rows), y, add, {}};
    int64_t words = 0;
    for (const Form& form : forms_) words += Rows::words(form, pass.rows);
    float* memory = prepared_memory(words);
    for (const Form& form : forms_) {
      pass.forms.emplace_back(form, pass.rows, memory);
      memory += Rows::words(form, pass.rows);
    }
    const Stage stages[] = {{pass.rows, Pass::prepare}, {panels_ * pass.chunks(), Pass::multiply}};
    parallel_stages(stages, 2, &pass);
  }
}

}  // namespace fewbits
