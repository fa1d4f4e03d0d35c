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
  int64_t T;

  float* at(Value value) const {
    if (value < 0) return nullptr;
    if (value < program.inputs_) return arguments.inputs[value];
    return arguments.memory + T * program.made_[value - program.inputs_].offset;
  }

  RowSource source(const Source& source) const {
    const bool gated = source.kind == RowSource::Kind::gated;
    return {source.kind, at(source.x),  gated ? at(source.up) : source.weight,
            source.eps,  source.offset, source.gating};
  }
};

Program::Value Program::value(int64_t width) {
  made_.push_back({width, 0, steps_.size(), steps_.size()});
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
  append([gemm = std::move(gemm), x, y = std::move(y), add](const Frame& frame) {
    std::vector<float*> out;
    for (const Value one : y) out.push_back(frame.at(one));
    gemm->run(frame.source(x), frame.T, out.data(), add);
  });
}

void Program::compute(Source x, int64_t width, Value y) {
  use(x);
  use({y});
  append([x, width, y](const Frame& frame) {
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
  append([=](const Frame& frame) {
    const Arguments& given = frame.arguments;
    fewbits::rope_and_append({spec, *given.caches[cache], *given.step, given.rotations[rotation],
                              frame.at(q), frame.at(k), frame.at(v)});
  });
}

void Program::attend(AttentionSpec spec, Value q, Value out, int cache) {
  use({q, out});
  append([=](const Frame& frame) {
    const Arguments& given = frame.arguments;
    fewbits::attend({spec, *given.caches[cache], *given.step, frame.at(q), frame.at(out)});
  });
}

void Program::scale_by_sigmoid(Value x, Value gates, int64_t heads, int64_t width) {
  use({x, gates});
  append([=](const Frame& frame) {
    fewbits::scale_by_sigmoid(frame.at(x), frame.at(gates), frame.T, heads, width);
  });
}

void Program::add(Value x, Value to, int64_t width) {
  use({x, to});
  append([=](const Frame& frame) {
    const float* const from = frame.at(x);
    float* const sum = frame.at(to);
    for (int64_t i = 0; i < frame.T * width; ++i) sum[i] += from[i];
  });
}

void Program::copy(Value x, Value y, Columns columns) {
  use({x, y});
  append([=](const Frame& frame) {
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
  append([=](const Frame& frame) {
    auto* const numbers = reinterpret_cast<int32_t*>(frame.at(chosen));
    fewbits::route(routing, frame.at(logits), frame.T, numbers, frame.at(weights));
  });
}

void Program::experts(std::shared_ptr<const Experts> experts, Value x, Value chosen, Value weights,
                      int64_t k, Value y) {
  use({x, chosen, weights, y});
  append([=](const Frame& frame) {
    const auto* const numbers = reinterpret_cast<const int32_t*>(frame.at(chosen));
    experts->run(frame.at(x), numbers, frame.at(weights), frame.T, k, frame.at(y));
  });
}

int64_t Program::width() {
  int64_t all = 0;
  std::vector<const Made*> alive;  // by offset
  for (Made& made : made_) {
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

void Program::run(const Arguments& arguments) const {
  const Frame frame{*this, arguments, arguments.step->T};
  auto begin = Clock::now(), pause = begin + kPause;
  for (size_t i = 0; i < steps_.size(); ++i) {
    steps_[i](frame);
    const auto end = Clock::now();
    if (arguments.nanoseconds) {
      arguments.nanoseconds[i] += std::chrono::nanoseconds(end - begin).count();
    }
    begin = end;
    if (end < pause) continue;
    arguments.pause();
    pause = end + kPause;
  }
}

}  // namespace fewbits
