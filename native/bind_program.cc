// fewbits._native: blocks of a model as one call. What is checked is what doesn't need the arrays.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bind_attention.h"
#include "bind_gating.h"
#include "program/program.h"

namespace nb = nanobind;

namespace {

using fewbits::Program;
using Value = Program::Value;
using Kind = fewbits::RowSource::Kind;

// A program, and which cache each of its attentions appends to.
struct Checked {
  Program program;
  std::vector<std::pair<fewbits::AttentionSpec, int>> attentions;
  int caches = 0, rotations = 0;
  bool narrows = false;

  explicit Checked(int inputs) : program(inputs) {}
};

const float* floats(uintptr_t address) { return reinterpret_cast<const float*>(address); }

Program::Source plain(Value x) { return {Kind::plain, x, -1, nullptr, 0, 0, {}}; }

Program::Source normed(Value x, uintptr_t weight, float eps, float offset) {
  return {Kind::rms_norm, x, -1, floats(weight), eps, offset, {}};
}

Program::Source gated(Value gate, Value up, const std::string& activation, float limit) {
  return {Kind::gated, gate, up, nullptr, 0, 0, gating_of(activation, limit)};
}

// Ctrl-C and the like end a pass that takes long.
void handle_signals() {
  const nb::gil_scoped_acquire acquired;
  if (PyErr_CheckSignals() != 0) throw nb::python_error();
}

using Rotations = std::vector<std::pair<uintptr_t, uintptr_t>>;

Program::Shared shared_by_passes(const Checked& checked, uintptr_t memory,
                                 const std::vector<const fewbits::LayerCache*>& caches,
                                 const Rotations& rotations, uintptr_t nanoseconds) {
  if (static_cast<int>(caches.size()) < checked.caches ||
      static_cast<int>(rotations.size()) < checked.rotations) {
    throw std::invalid_argument("the program has more caches or rotations");
  }
  for (const auto& [spec, cache] : checked.attentions) check_fit(spec, *caches[cache]);
  Program::Shared shared = {reinterpret_cast<float*>(memory),
                            caches,
                            {},
                            reinterpret_cast<int64_t*>(nanoseconds),
                            handle_signals};
  for (const auto& [cos, sin] : rotations) shared.rotations.push_back({floats(cos), floats(sin)});
  return shared;
}

Program::Arguments pass_of(const Checked& checked, const Program::Shared& shared,
                           const BoundStep& step) {
  for (const fewbits::LayerCache* cache : shared.caches) check_fit(step, *cache);
  return {{}, &step, checked.narrows ? step.last() : nullptr};
}

void run(const Checked& checked, const std::vector<uintptr_t>& inputs, uintptr_t memory,
         const BoundStep& step, const std::vector<const fewbits::LayerCache*>& caches,
         const Rotations& rotations, uintptr_t nanoseconds) {
  const Program::Shared shared = shared_by_passes(checked, memory, caches, rotations, nanoseconds);
  Program::Arguments pass = pass_of(checked, shared, step);
  for (const uintptr_t input : inputs) pass.inputs.push_back(reinterpret_cast<float*>(input));
  const nb::gil_scoped_release release;
  checked.program.run(pass, shared);
}

// A pass of another program, and of this one passes ahead of its step, of so many rows each, whose
// inputs lie so many bytes further on with each pass. They end behind one whose input `chances`,
// float32 [T], is nowhere `least` or more. Returns how many there were.
size_t chain(const Checked& checked, const Checked& first, const std::vector<uintptr_t>& its,
             const std::vector<std::pair<uintptr_t, int64_t>>& inputs, uintptr_t memory,
             const BoundStep& step, const std::vector<int>& rows, int page_size,
             const std::vector<const fewbits::LayerCache*>& caches, const Rotations& rotations,
             uintptr_t nanoseconds, uintptr_t its_nanoseconds, size_t chances, float least) {
  const auto shared = shared_by_passes(checked, memory, caches, rotations, nanoseconds);
  const auto of_first = shared_by_passes(first, memory, caches, rotations, its_nanoseconds);
  Program::Arguments beginning = pass_of(first, of_first, step);
  for (const uintptr_t input : its) {
    beginning.inputs.push_back(reinterpret_cast<float*>(input));
  }
  const std::vector<BoundStep> steps = step.ahead(rows, page_size);
  std::vector<Program::Arguments> passes;
  for (const BoundStep& one : steps) {
    const auto number = static_cast<int64_t>(passes.size());
    passes.push_back(pass_of(checked, shared, one));
    for (const auto& [address, stride] : inputs) {
      passes.back().inputs.push_back(reinterpret_cast<float*>(address + number * stride));
    }
  }
  const auto sure = [&](const Program::Arguments& pass) {
    if (least <= 0) return true;
    const float* const found = pass.inputs.at(chances);
    const int64_t T = pass.last ? pass.last->step.T : pass.step->T;
    return std::any_of(found, found + T, [&](float one) { return one >= least; });
  };
  const nb::gil_scoped_release release;
  first.program.run(beginning, of_first);
  size_t done = 0;
  bool further = sure(beginning);
  while (further && done < passes.size()) {
    checked.program.run(passes[done], shared);
    further = sure(passes[done++]);
  }
  return 1 + done;
}

}  // namespace

void bind_program(nb::module_& module) {
  using nb::arg;
  nb::class_<Program::Source>(module, "Source")
      .def_static("plain", &plain, arg("x"))
      .def_static("normed", &normed, arg("x"), arg("weight"), arg("eps"), arg("offset"))
      .def_static("gated", &gated, arg("gate"), arg("up"), arg("activation"), arg("limit"));
  nb::class_<Checked>(module, "Program")
      .def(nb::init<int>(), arg("inputs"))
      .def("value", [](Checked& self, int64_t width) { return self.program.value(width); })
      .def("multiply",
           [](Checked& self, std::shared_ptr<fewbits::Gemm> gemm, const Program::Source& x,
              std::vector<Value> y,
              bool add) { self.program.multiply(std::move(gemm), x, std::move(y), add); })
      .def("compute", [](Checked& self, const Program::Source& x, int64_t width,
                         Value y) { self.program.compute(x, width, y); })
      .def("rope_and_append",
           [](Checked& self, const fewbits::AttentionSpec& spec, Value q, Value k, Value v,
              int cache, int rotation) {
             self.attentions.emplace_back(spec, cache);
             self.caches = std::max(self.caches, cache + 1);
             self.rotations = std::max(self.rotations, rotation + 1);
             self.program.rope_and_append(spec, q, k, v, cache, rotation);
           })
      .def("attend",
           [](Checked& self, const fewbits::AttentionSpec& spec, Value q, Value out, int cache) {
             self.caches = std::max(self.caches, cache + 1);
             self.program.attend(spec, q, out, cache);
           })
      .def("scale_by_sigmoid",
           [](Checked& self, Value x, Value gates, int64_t heads, int64_t width) {
             self.program.scale_by_sigmoid(x, gates, heads, width);
           })
      .def("add",
           [](Checked& self, Value x, Value to, int64_t width) { self.program.add(x, to, width); })
      .def("copy",
           [](Checked& self, Value x, Value y, int64_t heads, int64_t width, int64_t begin,
              int64_t count, int64_t y_width, int64_t place) {
             self.program.copy(x, y, {heads, width, begin, count, y_width, place});
           })
      .def("route", [](Checked& self, const fewbits::Routing& routing, Value logits, Value chosen,
                       Value weights) { self.program.route(routing, logits, chosen, weights); })
      .def("experts",
           [](Checked& self, std::shared_ptr<fewbits::Experts> experts, Value x, Value chosen,
              Value weights, int64_t k,
              Value y) { self.program.experts(std::move(experts), x, chosen, weights, k, y); })
      .def("embed", [](Checked& self, const fewbits::EmbeddingTable& table, Value tokens,
                       Value y) { self.program.embed(table, tokens, y); })
      .def("best",
           [](Checked& self, Value logits, int64_t columns, std::vector<int64_t> ids, bool among,
              Value to, Value before, Value after) {
             fewbits::check_columns(columns, ids, among);
             self.program.best(logits, {columns, std::move(ids), among}, to, before, after);
           })
      .def("narrow",
           [](Checked& self, const std::vector<Value>& values, const std::vector<int64_t>& widths) {
             self.narrows = true;
             self.program.narrow(values, widths);
           })
      .def_prop_ro("steps", [](const Checked& self) { return self.program.steps(); })
      .def("widths",
           [](Checked& self) {
             const Program::Widths widths = self.program.widths();
             return std::pair(widths.all, widths.last);
           })
      .def("run", &run, arg("inputs"), arg("memory"), arg("step"), arg("caches"), arg("rotations"),
           arg("nanoseconds"))
      .def("chain", &chain, arg("first"), arg("its"), arg("inputs"), arg("memory"), arg("step"),
           arg("rows"), arg("page_size"), arg("caches"), arg("rotations"), arg("nanoseconds"),
           arg("its_nanoseconds"), arg("chances"), arg("least"));
}
