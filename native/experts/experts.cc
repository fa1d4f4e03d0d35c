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
    size_t form;     // of the expert's
    int64_t column;  // of its first output
  };
  std::vector<Input> inputs;
  std::vector<size_t> forms;  // of the layer's, that the inputs take
  BoundProduct down;
  size_t down_form;

  Bound(const Expert& expert, std::vector<Form>& layer)
      : down(expert.down), down_form(form_for(layer, down)) {
    int64_t column = 0;
    for (const auto& product : expert.inputs) {
      const BoundProduct bound(product);
      const size_t form = form_for(layer, bound);
      const auto found = std::find(forms.begin(), forms.end(), form);
      inputs.push_back({bound, static_cast<size_t>(found - forms.begin()), column});
      if (found == forms.end()) forms.push_back(form);
      column += product->weight->N();
    }
  }
};

Experts::Experts(std::vector<Expert> experts, Gating gating) : gating_(gating) {
  if (experts.empty()) throw std::invalid_argument("there are no experts");
  for (const Expert& expert : experts) {
    experts_.emplace_back(expert, forms_);
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
  takers_.resize(forms_.size());
  for (const Bound& expert : experts_) {
    for (const size_t form : expert.forms) ++takers_[form];
  }
}

Experts::~Experts() = default;

// Some tokens. Their rows are numbered expert by expert, and within one token by token.
struct Experts::Pass {
  struct Chosen {
    const Bound* expert;
    int64_t begin, end;       // rows
    std::vector<Rows> x;      // by the expert's forms
    std::vector<Rows> gated;  // one
    bool all;                 // its rows are those of all tokens
  };

  // A product of x, as one of all that are computed, panel by panel.
  struct Input {
    const Bound::Input* input;
    const Chosen* chosen;
    int64_t panel_begin;
  };

  const Experts* experts;
  const float* x;
  float* y;
  int64_t T;
  std::vector<Chosen> chosen;
  std::vector<Input> inputs;
  std::vector<int32_t> tokens;  // by row
  std::vector<float> weights;   // by row
  std::vector<int32_t> of_row;  // index into chosen
  std::vector<Rows> shared;     // the tokens' rows in forms that several experts take
  std::vector<int32_t> place;   // in these, by form; -1: not there
  float *gate_up, *total;       // [rows][2 W], [T][H]
  int64_t part_panels;          // of y that a thread computes at once

  static void prepare_shared(void* context, int64_t begin, int64_t end) {
    const Pass& pass = *static_cast<Pass*>(context);
    for (int64_t t = begin; t < end; ++t) {
      for (const Rows& rows : pass.shared) rows.set(t, pass.x + t * pass.experts->h_);
    }
  }

  static void prepare_inputs(void* context, int64_t begin, int64_t end) {
    const Pass& pass = *static_cast<Pass*>(context);
    for (int64_t row = begin; row < end; ++row) {
      const Chosen& chosen = pass.chosen[pass.of_row[row]];
      const int64_t token = pass.tokens[row], own = row - chosen.begin;
      for (size_t i = 0; i < chosen.x.size(); ++i) {
        const int32_t place = pass.place[chosen.expert->forms[i]];
        if (place < 0) {
          chosen.x[i].set(own, pass.x + token * pass.experts->h_);
        } else if (!chosen.all) {
          chosen.x[i].copy(own, pass.shared[place], token);
        }
      }
    }
  }

  static void multiply_inputs(void* context, int64_t begin, int64_t end) {
    const Pass& pass = *static_cast<Pass*>(context);
    const int64_t columns = 2 * pass.experts->w_;
    auto input =
        std::upper_bound(pass.inputs.begin(), pass.inputs.end(), begin,
                         [](int64_t panel, const Input& i) { return panel < i.panel_begin; });
    --input;
    for (; begin < end; ++begin) {
      if (input + 1 < pass.inputs.end() && begin == input[1].panel_begin) ++input;
      const BoundProduct& bound = input->input->bound;
      const PackedWeight& weight = *bound.product->weight;
      const int64_t panel = begin - input->panel_begin;
      const bool last = panel + 1 == weight.panels() && input + 1 < pass.inputs.end();
      const uint32_t* const next =
          last ? input[1].input->bound.product->weight->words(0) : weight.words(panel + 1);
      const Chosen& chosen = *input->chosen;
      float* const out = pass.gate_up + chosen.begin * columns + input->input->column;
      multiply(bound, chosen.x[input->input->form], chosen, panel, next,
               {out + panel * kPanelRows, columns, false});
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
    for (const Chosen& chosen : pass.chosen) {
      const BoundProduct& down = chosen.expert->down;
      const bool last = &chosen == &pass.chosen.back();
      const Bound& following = last ? *pass.chosen[0].expert : *(&chosen + 1)->expert;
      const int64_t its_panel = last ? std::min(end, panels_of(H) - 1) : begin;
      for (int64_t panel = begin; panel < end; ++panel) {
        const uint32_t* const next = panel + 1 < end
                                         ? down.product->weight->words(panel + 1)
                                         : following.down.product->weight->words(its_panel);
        multiply(down, chosen.gated[0], chosen, panel, next,
                 {pass.total + panel * kPanelRows, H, true, pass.tokens.data() + chosen.begin,
                  pass.weights.data() + chosen.begin});
      }
    }
    for (int64_t t = 0; t < pass.T; ++t) {
      float* const out = pass.y + t * H + first_column;
      const float* const sum = pass.total + t * H + first_column;
      for (int64_t n = 0; n < columns; ++n) out[n] += sum[n];
    }
  }

  // All rows of an expert times a panel.
  static void multiply(const BoundProduct& bound, const Rows& x, const Chosen& chosen,
                       int64_t panel, const uint32_t* next, const Target& target) {
    const int64_t rows = chosen.end - chosen.begin;
    for (int64_t first = 0; first < rows; first += kMaxRows) {
      const bool last = first + kMaxRows >= rows;
      bound.multiply(x, first, std::min<int64_t>(kMaxRows, rows - first), panel,
                     last ? next : bound.product->weight->words(panel), target.from_row(first));
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
  const int64_t most = std::min<int64_t>(panels_of(h_), kPartsOfThread * thread_count());
  const int64_t part_panels = (panels_of(h_) + most - 1) / most;
  const int64_t parts = (panels_of(h_) + part_panels - 1) / part_panels;  // none of them empty
  Pass pass{};
  pass.experts = this;
  pass.x = x;
  pass.y = y;
  pass.T = T;
  pass.part_panels = part_panels;
  const int64_t rows = T * k;
  std::vector<int32_t> order(rows);
  for (int64_t i = 0; i < rows; ++i) order[i] = static_cast<int32_t>(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return chosen[a] < chosen[b]; });
  for (int64_t row = 0; row < rows; ++row) {
    const int32_t place = order[row];
    const Bound* const expert = &experts_[chosen[place]];
    if (pass.chosen.empty() || pass.chosen.back().expert != expert) {
      pass.chosen.push_back({expert, row, row, {}, {}, false});
    }
    pass.chosen.back().end = row + 1;
    pass.tokens.push_back(static_cast<int32_t>(place / k));
    pass.weights.push_back(weights[place]);
    pass.of_row.push_back(static_cast<int32_t>(pass.chosen.size() - 1));
  }

  // Forms that several experts take are prepared once.
  pass.place.assign(forms_.size(), -1);
  std::vector<size_t> shared;
  int64_t panels = 0;
  int64_t words = aligned(rows * 2 * w_) + aligned(T * h_);
  for (auto& one : pass.chosen) {
    const int64_t count = one.end - one.begin;
    one.all = count == T;
    for (const size_t form : one.expert->forms) {
      if (takers_[form] > 1 && pass.place[form] < 0) {
        pass.place[form] = static_cast<int32_t>(shared.size());
        shared.push_back(form);
        words += aligned(Rows::words(forms_[form], T));
      }
      if (takers_[form] == 1 || !one.all) words += aligned(Rows::words(forms_[form], count));
    }
    words += aligned(Rows::words(forms_[one.expert->down_form], count));
    for (const auto& input : one.expert->inputs) {
      pass.inputs.push_back({&input, &one, panels});
      panels += input.bound.product->weight->panels();
    }
  }
  float* next = prepared_memory(words);
  const auto take = [&next](int64_t count) {
    float* const taken = next;
    next += aligned(count);
    return taken;
  };
  const auto take_rows = [&](size_t form, int64_t count) {
    return Rows(forms_[form], count, take(Rows::words(forms_[form], count)));
  };
  pass.gate_up = take(rows * 2 * w_);
  pass.total = take(T * h_);
  for (const size_t form : shared) pass.shared.push_back(take_rows(form, T));
  for (auto& one : pass.chosen) {
    const int64_t count = one.end - one.begin;
    for (const size_t form : one.expert->forms) {
      const int32_t place = pass.place[form];
      const bool taken_over = place >= 0 && one.all;
      one.x.push_back(taken_over ? pass.shared[place] : take_rows(form, count));
    }
    one.gated.push_back(take_rows(one.expert->down_form, count));
  }

  prepare_rows(T, h_, Pass::prepare_shared, &pass);
  prepare_rows(rows, h_, Pass::prepare_inputs, &pass);
  parallel_for(panels, Pass::multiply_inputs, &pass);
  prepare_rows(rows, w_, Pass::prepare_downs, &pass);
  parallel_for(parts, Pass::multiply_downs, &pass);
}

}  // namespace fewbits
