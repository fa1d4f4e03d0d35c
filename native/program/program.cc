#include "program/program.h"

#include <string.h>

#include <algorithm>
#include <chrono>
#include <utility>

namespace fewbits {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kLine = 16;  // numbers in a cache line
constexpr auto kPause = std::chrono::milliseconds(50);

}  // namespace

struct Program::Frame {
  const Program& program;
  const Arguments& arguments;
  const Shared& shared;
  const Step* step;
  int64_t T;  // rows now
  float* narrowed;

  Frame(const Program& p, const Arguments& a, const Shared& s)
      : program(p),
        arguments(a),
        shared(s),
        step(a.step),
        T(step->T),
        narrowed(s.memory + T * p.widths_.all) {}

  float* at(Value value) const {
    if (value < 0) return nullptr;
    if (value < program.inputs_) return arguments.inputs[value];
    const Made& made = program.made_[value - program.inputs_];
    if (made.narrowed) return narrowed + T * made.offset;
    return shared.memory + arguments.step->T * made.offset;
  }

  RowSource source(const Source& source) const {
    const bool gated = source.kind == RowSource::Kind::gated;
    return {source.kind, at(source.x),  gated ? at(source.up) : source.weight,
            source.eps,  source.offset, source.gating};
  }
};

Program::Value Program::value(int64_t width) {
  made_.push_back({width, 0, steps_.size(), steps_.size(), narrowed_});
  return inputs_ + static_cast<int>(made_.size()) - 1;
}

void Program::use(std::initializer_list<Value> values) {
  for (const Value value : values) {
    if (value >= inputs_) made_[value - inputs_].last = steps_.size();
  }
}

void Program::use(const Source& source) {
  use({source.x});
  if (source.kind == RowSource::Kind::gated) use({source.up});
}

void Program::multiply(std::shared_ptr<const Gemm> gemm, Source x, std::vector<Value> y, bool add) {
  use(x);
  for (const Value one : y) use({one});
  append([gemm = std::move(gemm), x, y = std::move(y), add](Frame& frame) {
    std::vector<float*> out;
    for (const Value one : y) out.push_back(frame.at(one));
    gemm->run(frame.source(x), frame.T, out.data(), add);
  });
}

void Program::compute(Source x, int64_t width, Value y) {
  use(x);
  use({y});
  append([x, width, y](Frame& frame) {
    const RowSource source = frame.source(x);
    if (x.kind == RowSource::Kind::gated) {
      gated(source.x, source.other, frame.at(y), frame.T, width, x.gating);
    } else {
      rms_norm(source.x, source.other, frame.at(y), frame.T, width, x.eps, x.offset);
    }
  });
}

void Program::rope_and_append(AttentionSpec spec, Value q, Value k, Value v, int cache,
                              int rotation) {
  use({q, k, v});
  append([=](Frame& frame) {
    const Shared& given = frame.shared;
    fewbits::rope_and_append({spec, *given.caches[cache], *frame.step, given.rotations[rotation],
                              frame.at(q), frame.at(k), frame.at(v)});
  });
}

void Program::attend(AttentionSpec spec, Value q, Value out, int cache) {
  use({q, out});
  append([=](Frame& frame) {
    fewbits::attend({spec, *frame.shared.caches[cache], *frame.step, frame.at(q), frame.at(out)});
  });
}

void Program::scale_by_sigmoid(Value x, Value gates, int64_t heads, int64_t width) {
  use({x, gates});
  append([=](Frame& frame) {
    fewbits::scale_by_sigmoid(frame.at(x), frame.at(gates), frame.T, heads, width);
  });
}

void Program::add(Value x, Value to, int64_t width) {
  use({x, to});
  append([=](Frame& frame) {
    const float* const from = frame.at(x);
    float* const sum = frame.at(to);
    for (int64_t i = 0; i < frame.T * width; ++i) sum[i] += from[i];
  });
}

void Program::copy(Value x, Value y, Columns columns) {
  use({x, y});
  append([=](Frame& frame) {
    const float* from = frame.at(x) + columns.begin;
    float* to = frame.at(y) + columns.place;
    for (int64_t i = 0; i < frame.T * columns.heads; ++i) {
      memcpy(to, from, columns.count * sizeof(float));
      from += columns.width;
      to += columns.y_width;
    }
  });
}

void Program::route(Routing routing, Value logits, Value chosen, Value weights) {
  use({logits, chosen, weights});
  append([=](Frame& frame) {
    auto* const numbers = reinterpret_cast<int32_t*>(frame.at(chosen));
    fewbits::route(routing, frame.at(logits), frame.T, numbers, frame.at(weights));
  });
}

void Program::experts(std::shared_ptr<const Experts> experts, Value x, Value chosen, Value weights,
                      int64_t k, Value y) {
  use({x, chosen, weights, y});
  append([=](Frame& frame) {
    const auto* const numbers = reinterpret_cast<const int32_t*>(frame.at(chosen));
    experts->run(frame.at(x), numbers, frame.at(weights), frame.T, k, frame.at(y));
  });
}

void Program::embed(EmbeddingTable table, Value tokens, Value y) {
  use({tokens, y});
  append([=](Frame& frame) {
    const auto* const ids = reinterpret_cast<const int64_t*>(frame.at(tokens));
    for (int64_t t = 0; t < frame.T; ++t) check_id(table, ids[t]);
    gather_rows(table, ids, frame.T, frame.at(y));
  });
}

void Program::best(Value logits, Tokens tokens, Value to, Value before, Value after) {
  use({logits, to, before, after});
  append([=, tokens = std::move(tokens)](Frame& frame) {
    auto* const found = reinterpret_cast<int64_t*>(frame.at(to));
    best_tokens(frame.at(logits), frame.T, tokens.columns, tokens.ids, tokens.among, found,
                frame.at(before), frame.at(after));
  });
}

void Program::narrow(const std::vector<Value>& values, const std::vector<int64_t>& widths) {
  for (const Value one : values) use({one});
  narrowed_ = true;
  append([values, widths](Frame& frame) {
    const LastRows* const last = frame.arguments.last;
    if (!last) return;
    for (size_t i = 0; i < values.size(); ++i) {
      float* const to = frame.at(values[i]);
      for (int64_t r = 0; r < last->step.T; ++r) {
        memmove(to + r * widths[i], to + last->rows[r] * widths[i], widths[i] * sizeof(float));
      }
    }
    frame.step = &last->step;
    frame.T = last->step.T;
  });
}

// Gives the values made before or after narrowing their places; returns what they take.
int64_t Program::place(bool narrowed) {
  int64_t all = 0;
  std::vector<const Made*> alive;  // by offset
  for (Made& made : made_) {
    if (made.narrowed != narrowed) continue;
    alive.erase(std::remove_if(alive.begin(), alive.end(),
                               [&](const Made* other) { return other->last < made.first; }),
                alive.end());
    const auto end = [](const Made* one) {
      return one->offset + (one->width + kLine - 1) / kLine * kLine;
    };
    auto after = alive.begin();
    made.offset = 0;
    while (after != alive.end() && (*after)->offset < made.offset + made.width) {
      made.offset = end(*after++);
    }
    alive.insert(after, &made);
    all = std::max(all, end(&made));
  }
  return all;
}

Program::Widths Program::widths() {
  widths_ = {place(false), place(true)};
  return widths_;
}

void Program::run(const Arguments& arguments, const Shared& shared) const {
  Frame frame(*this, arguments, shared);
  auto begin = Clock::now(), pause = begin + kPause;
  for (size_t i = 0; i < steps_.size(); ++i) {
    steps_[i](frame);
    const auto end = Clock::now();
    if (shared.nanoseconds) {
      shared.nanoseconds[i] += std::chrono::nanoseconds(end - begin).count();
    }
    begin = end;
    if (end < pause) continue;
    shared.pause();
    pause = end + kPause;
  }
}

}  // namespace fewbits
