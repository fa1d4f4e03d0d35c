// Blocks of a model as one call: a list of steps on values, written once and run with every pass.
//
// A value is float32 [T, width], or int32 of that size: one of the inputs, which are the caller's,
// or what a step makes, which lies in memory that the caller lends for a call. What isn't needed
// any more makes room for what comes later. Every step uses the pool as its own call would.
//
// From a step on, `narrow`, only the rows go on whose results are wanted: values have as many then.
#pragma once

#include <stdint.h>

#include <functional>
#include <memory>
#include <vector>

#include "attention/attention.h"
#include "elementwise/elementwise.h"
#include "experts/experts.h"
#include "experts/route.h"
#include "gemm/gemm.h"

namespace fewbits {

class Program {
 public:
  using Value = int;

  // Rows of x, or what a norm or an activation makes of it: RowSource of values.
  struct Source {
    RowSource::Kind kind;
    Value x;
    Value up;             // gated
    const float* weight;  // rms_norm
    float eps, offset;    // rms_norm
    Gating gating;
  };

  // Values 0, 1, ... are the inputs.
  explicit Program(int inputs) : inputs_(inputs) {}

  // A value that the next step makes, or is one of those that make it.
  Value value(int64_t width);

  // The steps. Objects and vectors that are passed by pointer must outlive the program.
  void multiply(std::shared_ptr<const Gemm> gemm, Source x, std::vector<Value> y, bool add);
  void compute(Source x, int64_t width, Value y);
  // `cache`, `rotation`: which of the call's. v is -1 for latents.
  void rope_and_append(AttentionSpec spec, Value q, Value k, Value v, int cache, int rotation);
  void attend(AttentionSpec spec, Value q, Value out, int cache);
  void scale_by_sigmoid(Value x, Value gates, int64_t heads, int64_t width);
  void add(Value x, Value to, int64_t width);
  // Channels [begin, begin + count) of each of the `heads` parts of a row of x, of `width` numbers,
  // go to those of y from `place` on.
  struct Columns {
    int64_t heads, width, begin, count, y_width, place;
  };
  void copy(Value x, Value y, Columns columns);
  void route(Routing routing, Value logits, Value chosen, Value weights);
  void experts(std::shared_ptr<const Experts> experts, Value x, Value chosen, Value weights,
               int64_t k, Value y);
  // Rows of a table. Tokens are an input of int64 [T]. Running throws std::invalid_argument where
  // one isn't in the table.
  void embed(EmbeddingTable table, Value tokens, Value y);
  // best_tokens: to an input of int64 [T], and from and to one of float32 [T].
  struct Tokens {
    int64_t columns;
    std::vector<int64_t> ids;
    bool among;
  };
  void best(Value logits, Tokens tokens, Value to, Value before, Value after);
  // Closes the wanted rows of the values up, in place. Once; no later step may use other values.
  void narrow(const std::vector<Value>& values, const std::vector<int64_t>& widths);

  size_t steps() const { return steps_.size(); }

  // Numbers of memory that a row takes, before `narrow` and from there on. No step may follow.
  struct Widths {
    int64_t all, last;
  };
  Widths widths();

  struct Arguments {
    std::vector<float*> inputs;
    const Step* step;
    const LastRows* last;  // or null: all
  };
  // What passes that follow each other share.
  struct Shared {
    float* memory;  // [T][widths().all], and behind that [T of the last rows][widths().last]
    std::vector<const LayerCache*> caches;
    std::vector<Rotation> rotations;
    int64_t* nanoseconds;         // [steps()] or null: what each took is added
    std::function<void()> pause;  // called between steps some times a second; may throw
  };
  void run(const Arguments& arguments, const Shared& shared) const;

 private:
  struct Frame;
  struct Made {
    int64_t width, offset;
    size_t first, last;  // steps
    bool narrowed;
  };

  void use(std::initializer_list<Value> values);
  void use(const Source& source);
  void append(std::function<void(Frame&)> step) { steps_.push_back(std::move(step)); }
  int64_t place(bool narrowed);

  int inputs_;
  bool narrowed_ = false;
  Widths widths_{0, 0};
  std::vector<Made> made_;
  std::vector<std::function<void(Frame&)>> steps_;
};

}  // namespace fewbits
