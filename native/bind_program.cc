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

// Passes one after the other; each has its inputs and its step.
void run(const Checked& checked, const std::vector<std::vector<uintptr_t>>& inputs,
         uintptr_t memory, const std::vector<const BoundStep*>& steps,
         const std::vector<const fewbits::LayerCache*>& caches,
         const std::vector<std::pair<uintptr_t, uintptr_t>>& rotations, uintptr_t nanoseconds) {
  if (inputs.size() != steps.size()) throw std::invalid_argument("a pass has inputs and a step");
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
  std::vector<Program::Arguments> passes;
  for (size_t i = 0; i < steps.size(); ++i) {
    for (const fewbits::LayerCache* cache : caches) check_fit(*steps[i], *cache);
    passes.push_back({{}, steps[i], checked.narrows ? steps[i]->last() : nullptr});
    for (const uintptr_t input : inputs[i]) {
      passes.back().inputs.push_back(reinterpret_cast<float*>(input));
    }
  }
  const nb::gil_scoped_release release;
  for (const Program::Arguments& pass : passes) checked.program.run(pass, shared);
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
              Value to) {
             fewbits::check_columns(columns, ids, among);
             self.program.best(logits, {columns, std::move(ids), among}, to);
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
      .def("run", &run, arg("inputs"), arg("memory"), arg("steps"), arg("caches"), arg("rotations"),
           arg("nanoseconds"));
}
