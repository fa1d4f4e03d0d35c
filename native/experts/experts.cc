#include "experts/experts.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "gemm/bound.h"
#include "threads.h"

namespace fewbits {
namespace {

// Rows of experts whose tokens are taken at once: as many as keep their products busy, few enough
// that what `down` takes is some MB.
constexpr int64_t kRowsAtOnce = 4096;

// Of those, what lies between x and `down` is kept for so many (or one expert's), which caches
// hold.
constexpr int64_t kRowsBetween = 1024;

constexpr int64_t kWordsAligned = 16;

int64_t panels_of(int64_t columns) { return (columns + kPanelRows - 1) / kPanelRows; }

int64_t aligned(int64_t words) {
  return (words + kWordsAligned - 1) / kWordsAligned * kWordsAligned;
}

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
  for (const Bound& expert : experts_) {
    int64_t words = 0;
    for (const size_t form : expert.forms) words += Rows::words(forms_[form], 1);
    x_words_ = std::max(x_words_, words);
    down_words_ = std::max(down_words_, Rows::words(forms_[expert.down_form], 1));
    most_forms_ = std::max(most_forms_, expert.forms.size());
  }
}

Experts::~Experts() = default;

// Some tokens. Their rows are numbered expert by expert, and within one token by token.
struct Experts::Pass {
  struct Chosen {
    const Bound* expert;
    int64_t begin, end;  // rows
    size_t x;            // the first of `prepared`, which are by the expert's forms
    size_t gated;        // of `prepared`
    bool all;            // its rows are those of all tokens
  };

  // A product of x, as one of all that are computed, panel by panel.
  struct Input {
    const Bound::Input* input;
    const Chosen* chosen;
    int64_t panel_begin;
  };

  // Chosen experts that are taken through gate and up together.
  struct Group {
    int64_t row_begin, row_end, panel_begin, panel_end;
    bool own_rows;  // whether rows of x are prepared for one of them alone
  };

  const Experts* experts;
  const float* x;
  float* y;
  int64_t T;
  std::vector<Chosen> chosen;
  std::vector<Input> inputs;
  std::vector<Group> groups;
  std::vector<int32_t> tokens;    // by row
  std::vector<float> weights;     // by row
  std::vector<int32_t> of_row;    // index into chosen
  std::vector<size_t> shared;     // forms that several experts take
  std::vector<int32_t> place;     // in `shared`, by form; -1: not there
  std::vector<Rows> prepared;     // the tokens' in the forms of `shared`, then each expert's
  std::vector<int64_t> next_row;  // by expert
  const Group* group;             // that is computed
  float* gate_up;                 // [rows of the group][2 W]

  void number_rows(const int32_t* choice, const float* weight, int64_t k) {
    const int64_t rows = T * k;
    const size_t count = experts->experts_.size();
    chosen.clear();
    tokens.resize(rows);
    weights.resize(rows);
    of_row.resize(rows);
    next_row.assign(count, 0);
    for (int64_t i = 0; i < rows; ++i) ++next_row[choice[i]];
    int64_t begin = 0;
    for (size_t e = 0; e < count; ++e) {
      const int64_t end = begin + next_row[e];
      next_row[e] = begin;
      if (begin == end) continue;
      std::fill(of_row.begin() + begin, of_row.begin() + end, static_cast<int32_t>(chosen.size()));
      chosen.push_back({&experts->experts_[e], begin, end, 0, 0, end - begin == T});
      begin = end;
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = next_row[choice[i]]++;
      tokens[row] = static_cast<int32_t>(i / k);
      weights[row] = weight[i];
    }
  }

  // Which products there are, what is prepared, and where it lies. What is between x and `down`
  // lies where that of the group before lay.
  void lay_out() {
    const std::vector<Form>& forms = experts->forms_;
    const auto rows = static_cast<int64_t>(tokens.size());
    int64_t rows_between = std::min(kRowsBetween, rows);
    int64_t words = 0;
    shared.clear();
    place.assign(forms.size(), -1);
    for (const Chosen& one : chosen) {
      rows_between = std::max(rows_between, one.end - one.begin);
      for (const size_t form : one.expert->forms) {
        if (experts->takers_[form] < 2 || place[form] >= 0) continue;
        place[form] = static_cast<int32_t>(shared.size());
        shared.push_back(form);
        words += aligned(Rows::words(forms[form], T));
      }
    }
    words += rows * experts->down_words_ + rows_between * (experts->x_words_ + 2 * experts->w_);
    words += kWordsAligned * static_cast<int64_t>(chosen.size() * (experts->most_forms_ + 1) + 1);

    float* next = prepared_memory(words);
    const auto prepare = [&](float** memory, size_t form, int64_t count) {
      prepared.emplace_back(forms[form], count, *memory);
      *memory += aligned(Rows::words(forms[form], count));
    };
    prepared.clear();
    for (const size_t form : shared) prepare(&next, form, T);
    for (Chosen& one : chosen) {
      one.gated = prepared.size();
      prepare(&next, one.expert->down_form, one.end - one.begin);
    }
    gate_up = next;
    next += aligned(rows_between * 2 * experts->w_);
    float* own = next;
    inputs.clear();
    groups.clear();
    for (Chosen& one : chosen) {
      if (groups.empty() || one.end - groups.back().row_begin > kRowsBetween) {
        const int64_t panel = groups.empty() ? 0 : groups.back().panel_end;
        groups.push_back({one.begin, one.end, panel, panel, false});
        own = next;
      }
      Group& group = groups.back();
      group.row_end = one.end;
      one.x = prepared.size();
      for (const size_t form : one.expert->forms) {
        if (place[form] >= 0 && one.all) {
          prepared.push_back(prepared[place[form]]);
        } else {
          prepare(&own, form, one.end - one.begin);
          group.own_rows = true;
        }
      }
      for (const Bound::Input& input : one.expert->inputs) {
        inputs.push_back({&input, &one, group.panel_end});
        group.panel_end += input.bound.product->weight->panels();
      }
    }
  }

  static void prepare_shared(void* context, int64_t begin, int64_t end) {
    const Pass& pass = *static_cast<Pass*>(context);
    for (int64_t t = begin; t < end; ++t) {
      for (size_t i = 0; i < pass.shared.size(); ++i) {
        pass.prepared[i].set(t, pass.x + t * pass.experts->h_);
      }
    }
  }

  static void prepare_inputs(void* context, int64_t begin, int64_t end) {
    const Pass& pass = *static_cast<Pass*>(context);
    const int64_t first = pass.group->row_begin;
    for (int64_t row = first + begin; row < first + end; ++row) {
      const Chosen& chosen = pass.chosen[pass.of_row[row]];
      const int64_t token = pass.tokens[row], own = row - chosen.begin;
      for (size_t i = 0; i < chosen.expert->forms.size(); ++i) {
        const Rows& its = pass.prepared[chosen.x + i];
        const int32_t place = pass.place[chosen.expert->forms[i]];
        if (place < 0) {
          its.set(own, pass.x + token * pass.experts->h_);
        } else if (!chosen.all) {
          its.copy(own, pass.prepared[place], token);
        }
      }
    }
  }

  static void multiply_inputs(void* context, int64_t begin, int64_t end) {
    const Pass& pass = *static_cast<Pass*>(context);
    const int64_t columns = 2 * pass.experts->w_;
    begin += pass.group->panel_begin;
    end += pass.group->panel_begin;
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
      float* const out = pass.gate_up + (chosen.begin - pass.group->row_begin) * columns;
      multiply(bound, pass.prepared[chosen.x + input->input->form], chosen, panel, next,
               {out + input->input->column + panel * kPanelRows, columns, false});
    }
  }

  static void prepare_downs(void* context, int64_t begin, int64_t end) {
    const Pass& pass = *static_cast<Pass*>(context);
    const int64_t W = pass.experts->w_;
    for (int64_t m = begin; m < end; ++m) {
      const int64_t row = pass.group->row_begin + m;
      const Chosen& chosen = pass.chosen[pass.of_row[row]];
      const float* const gate = pass.gate_up + m * 2 * W;
      const RowSource source = {RowSource::Kind::gated, gate, gate + W, 0, 0,
                                pass.experts->gating_};
      pass.prepared[chosen.gated].set(row - chosen.begin, row_of(source, W, 0));
    }
  }

  // Panels of y: each expert's results are added where they belong, one expert after the other.
  static void multiply_downs(void* context, int64_t begin, int64_t end) {
    const Pass& pass = *static_cast<Pass*>(context);
    const int64_t H = pass.experts->h_;
    for (const Chosen& chosen : pass.chosen) {
      const BoundProduct& down = chosen.expert->down;
      const bool last = &chosen == &pass.chosen.back();
      const Bound& following = last ? *pass.chosen[0].expert : *(&chosen + 1)->expert;
      const int64_t its_panel = last ? std::min(end, panels_of(H) - 1) : begin;
      for (int64_t panel = begin; panel < end; ++panel) {
        const uint32_t* const next = panel + 1 < end
                                         ? down.product->weight->words(panel + 1)
                                         : following.down.product->weight->words(its_panel);
        multiply(down, pass.prepared[chosen.gated], chosen, panel, next,
                 {pass.y + panel * kPanelRows, H, true, pass.tokens.data() + chosen.begin,
                  pass.weights.data() + chosen.begin});
      }
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
  thread_local Pass pass;  // what it has allocated is used again
  pass.experts = this;
  pass.x = x;
  pass.y = y;
  pass.T = T;
  pass.number_rows(chosen, weights, k);
  pass.lay_out();
  for (const Pass::Group& group : pass.groups) {
    pass.group = &group;
    const bool first = &group == &pass.groups.front(), last = &group == &pass.groups.back();
    const int64_t rows = group.row_end - group.row_begin;
    const Stage stages[] = {
        {first && !pass.shared.empty() ? T : 0, Pass::prepare_shared},
        {group.own_rows ? rows : 0, Pass::prepare_inputs},
        {group.panel_end - group.panel_begin, Pass::multiply_inputs},
        {rows, Pass::prepare_downs},
        {last ? panels_of(h_) : 0, Pass::multiply_downs},
    };
    parallel_stages(stages, 5, &pass);
  }
}

}  // namespace fewbits
