#include "experts/experts.h"

#include <string.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "gemm/bound.h"
#include "threads.h"

namespace fewbits {
namespace {

// Rows of experts that are computed at once: as many as keep their products busy, few enough that
// what they need between products is some dozens of MB.
constexpr int64_t kRowsAtOnce = 4096;

// Parts of y that a thread computes one after the other, each with all experts.
constexpr int64_t kPartsOfThread = 2;

constexpr int64_t kRowsAligned = 16;  // words of 32 bits

int64_t panels_of(int64_t columns) { return (columns + kPanelRows - 1) / kPanelRows; }

int64_t aligned(int64_t words) { return (words + kRowsAligned - 1) / kRowsAligned * kRowsAligned; }

}  // namespace

struct Experts::Bound {
  struct Input {
    BoundProduct bound;
    size_t form;
    int64_t column;  // of its first output
  };
  std::vector<Input> inputs;
  std::vector<Form> forms;  // of the inputs
  BoundProduct down;
  Form down_form;
  int64_t panels;  // of the inputs

  explicit Bound(const Expert& expert)
      : down(expert.down), down_form(*down.product, *down.kernel), panels(0) {
    int64_t column = 0;
    for (const auto& product : expert.inputs) {
      const BoundProduct bound(product);
      inputs.push_back({bound, form_for(forms, bound), column});
      column += product->weight->N();
      panels += product->weight->panels();
    }
  }
};

Experts::Experts(std::vector<Expert> experts, Gating gating) : gating_(gating) {
  if (experts.empty()) throw std::invalid_argument("there are no experts");
  for (const Expert& expert : experts) {
    experts_.emplace_back(expert);
    int64_t columns = 0;
    bool fits = !expert.inputs.empty();
    if (experts_.size() == 1 && fits) {
      h_ = expert.inputs[0]->weight->K();
      w_ = expert.down->weight->K();
    }
    for (const auto& input : expert.inputs) {
      columns += input->weight->N();
      fits = fits && input->weight->K() == h_;
    }
    fits = fits && columns == 2 * w_ && expert.down->weight->N() == h_ &&
           expert.down->weight->K() == w_;
    if (!fits) throw std::invalid_argument("the shapes of experts don't fit together");
  }
}

Experts::~Experts() = default;

// Some tokens. Their rows are numbered expert by expert, and within one token by token.
struct Experts::Pass {
  struct Chosen {
    const Bound* expert;
    int64_t begin, end;       // rows
    int64_t panel_begin;      // of the inputs, all experts' one after the other
    std::vector<Rows> x;      // by form
    std::vector<Rows> gated;  // one
  };

  const Experts* experts;
  const float* x;
  float* y;
  std::vector<Chosen> chosen;
  std::vector<int32_t> tokens;  // by row
  std::vector<float> weights;   // by row
  std::vector<int32_t> of_row;  // index into chosen
  float *gate_up, *total;       // [rows][2 W], [T][H]
  int64_t T;
  int64_t part_panels;  // of y that a thread computes at once

  static void prepare_inputs(void* context, int64_t begin, int64_t end) {
    const Pass& pass = *static_cast<Pass*>(context);
    for (int64_t row = begin; row < end; ++row) {
      const Chosen& chosen = pass.chosen[pass.of_row[row]];
      const float* const x = pass.x + pass.tokens[row] * pass.experts->h_;
      for (const Rows& rows : chosen.x) rows.set(row - chosen.begin, x);
    }
  }

  static void multiply_inputs(void* context, int64_t begin, int64_t end) {
    const Pass& pass = *static_cast<Pass*>(context);
    const int64_t columns = 2 * pass.experts->w_;
    auto chosen =
        std::upper_bound(pass.chosen.begin(), pass.chosen.end(), begin,
                         [](int64_t panel, const Chosen& c) { return panel < c.panel_begin; });
    --chosen;
    while (begin < end) {
      const Bound& expert = *chosen->expert;
      int64_t panel = begin - chosen->panel_begin;
      for (const Bound::Input& input : expert.inputs) {
        const int64_t panels = input.bound.product->weight->panels();
        for (; panel < panels && begin < end; ++panel, ++begin) {
          each_block(*chosen, [&](int64_t first, int64_t rows) {
            float* const out = pass.gate_up + (chosen->begin + first) * columns + input.column +
                               panel * kPanelRows;
            input.bound.multiply(chosen->x[input.form], first, rows, panel, out, columns, false);
          });
        }
        panel -= panels;
      }
      ++chosen;
    }
  }

  static void prepare_downs(void* context, int64_t begin, int64_t end) {
    const Pass& pass = *static_cast<Pass*>(context);
    const int64_t W = pass.experts->w_;
    for (int64_t row = begin; row < end; ++row) {
      const Chosen& chosen = pass.chosen[pass.of_row[row]];
      const float* const gate = pass.gate_up + row * 2 * W;
      const RowSource source = {RowSource::Kind::gated, gate, gate + W, 0, 0,
                                pass.experts->gating_};
      chosen.gated[0].set(row - chosen.begin, row_of(source, W, 0));
    }
  }

  // Panels of y: each expert's results are added where they belong, one expert after the other.
  static void multiply_downs(void* context, int64_t first_part, int64_t end_part) {
    const Pass& pass = *static_cast<Pass*>(context);
    const int64_t H = pass.experts->h_;
    const int64_t begin = first_part * pass.part_panels;
    const int64_t end = std::min(end_part * pass.part_panels, panels_of(H));
    const int64_t first_column = begin * kPanelRows;
    const int64_t columns = std::min(end * kPanelRows, H) - first_column;
    for (int64_t t = 0; t < pass.T; ++t) memset(pass.total + t * H + first_column, 0, columns * 4);
    float results[kMaxRows * kPanelRows];
    for (const Chosen& chosen : pass.chosen) {
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t column = panel * kPanelRows;
        const int64_t width = std::min<int64_t>(kPanelRows, H - column);
        each_block(chosen, [&](int64_t first, int64_t rows) {
          chosen.expert->down.multiply(chosen.gated[0], first, rows, panel, results, kPanelRows,
                                       false);
          for (int64_t i = 0; i < rows; ++i) {
            const int64_t row = chosen.begin + first + i;
            float* const sum = pass.total + pass.tokens[row] * H + column;
            const float weight = pass.weights[row];
            for (int64_t n = 0; n < width; ++n) sum[n] += weight * results[i * kPanelRows + n];
          }
        });
      }
    }
    for (int64_t t = 0; t < pass.T; ++t) {
      float* const out = pass.y + t * H + first_column;
      const float* const sum = pass.total + t * H + first_column;
      for (int64_t n = 0; n < columns; ++n) out[n] += sum[n];
    }
  }

  template <typename Use>
  static void each_block(const Chosen& chosen, Use use) {
    const int64_t rows = chosen.end - chosen.begin;
    for (int64_t first = 0; first < rows; first += kMaxRows) {
      use(first, std::min<int64_t>(kMaxRows, rows - first));
    }
  }
};

void Experts::run(const float* x, const int32_t* chosen, const float* weights, int64_t T, int64_t k,
                  float* y) const {
  const auto count = static_cast<int32_t>(experts_.size());
  for (int64_t i = 0; i < T * k; ++i) {
    if (chosen[i] < 0 || chosen[i] >= count) {
      throw std::invalid_argument("there is no expert " + std::to_string(chosen[i]));
    }
  }
  const int64_t tokens = std::max<int64_t>(1, kRowsAtOnce / std::max<int64_t>(k, 1));
  for (int64_t t = 0; t < T; t += tokens) {
    run_tokens(x + t * h_, chosen + t * k, weights + t * k, std::min(tokens, T - t), k, y + t * h_);
  }
}

void Experts::run_tokens(const float* x, const int32_t* chosen, const float* weights, int64_t T,
                         int64_t k, float* y) const {
  // A thread goes from expert to expert, and memory is slow where it begins to read.
  const int64_t parts = std::min<int64_t>(panels_of(h_), kPartsOfThread * thread_count());
  Pass pass{this, x, y, {}, {}, {}, {}, nullptr, nullptr, T, (panels_of(h_) + parts - 1) / parts};
  const int64_t rows = T * k;
  std::vector<int32_t> order(rows);
  for (int64_t i = 0; i < rows; ++i) order[i] = static_cast<int32_t>(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return chosen[a] < chosen[b]; });
  int64_t panels = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int32_t place = order[row];
    const Bound* const expert = &experts_[chosen[place]];
    if (pass.chosen.empty() || pass.chosen.back().expert != expert) {
      pass.chosen.push_back({expert, row, row, panels, {}, {}});
      panels += expert->panels;
    }
    pass.chosen.back().end = row + 1;
    pass.tokens.push_back(static_cast<int32_t>(place / k));
    pass.weights.push_back(weights[place]);
    pass.of_row.push_back(static_cast<int32_t>(pass.chosen.size() - 1));
  }

  const int64_t gate_up_words = aligned(rows * 2 * w_);
  int64_t words = gate_up_words + aligned(T * h_);
  for (const auto& one : pass.chosen) {
    const int64_t count = one.end - one.begin;
    for (const Form& form : one.expert->forms) words += aligned(Rows::words(form, count));
    words += aligned(Rows::words(one.expert->down_form, count));
  }
  pass.gate_up = prepared_memory(words);
  pass.total = pass.gate_up + gate_up_words;
  float* next = pass.total + aligned(T * h_);
  const auto take = [&next](const Form& form, int64_t count) {
    const Rows taken(form, count, next);
    next += aligned(Rows::words(form, count));
    return taken;
  };
  for (auto& one : pass.chosen) {
    const int64_t count = one.end - one.begin;
    for (const Form& form : one.expert->forms) one.x.push_back(take(form, count));
    one.gated.push_back(take(one.expert->down_form, count));
  }

  prepare_rows(rows, h_, Pass::prepare_inputs, &pass);
  parallel_for(panels, Pass::multiply_inputs, &pass);
  prepare_rows(rows, w_, Pass::prepare_downs, &pass);
  parallel_for(parts, Pass::multiply_downs, &pass);
}

}  // namespace fewbits
