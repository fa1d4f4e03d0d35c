// fewbits._native: routing. Arrays come as addresses, which the caller keeps alive.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>

#include "bind_gating.h"
#include "experts/experts.h"
#include "experts/route.h"

namespace nb = nanobind;

namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using fewbits::Routing;

void make_routing(Routing* self, int64_t experts, int64_t top_k, const std::string& score,
                  bool normalize, double epsilon, double scale, int64_t groups, int64_t kept_groups,
                  int64_t group_best, uintptr_t bias) {
  if (top_k < 1 || top_k > experts) {
    throw std::invalid_argument("of " + std::to_string(experts) + " experts " +
                                std::to_string(top_k) + " can't be chosen");
  }
  if (groups < 1 || experts % groups || kept_groups < 1 || kept_groups > groups || group_best < 1 ||
      group_best > experts / groups || top_k > experts / groups * kept_groups) {
    throw std::invalid_argument(std::to_string(experts) + " experts can't be chosen from " +
                                std::to_string(kept_groups) + " of " + std::to_string(groups) +
                                " groups by their best " + std::to_string(group_best));
  }
  if (score != "softmax" && score != "sigmoid") {
    throw std::invalid_argument("a score is softmax or sigmoid, not " + score);
  }
  new (self) Routing{experts,
                     top_k,
                     score == "softmax" ? fewbits::Score::softmax : fewbits::Score::sigmoid,
                     normalize,
                     epsilon,
                     scale,
                     at<const float>(bias),
                     groups,
                     kept_groups,
                     group_best};
}

void route(const Routing& routing, uintptr_t logits, int64_t T, uintptr_t chosen,
           uintptr_t weights) {
  if (T < 0) throw std::invalid_argument("the number of tokens can't be negative");
  fewbits::route(routing, at<const float>(logits), T, at<int32_t>(chosen), at<float>(weights));
}

using fewbits::Expert;
using fewbits::Experts;
using fewbits::Product;
using Products = std::pair<std::vector<std::shared_ptr<Product>>, std::shared_ptr<Product>>;

void make_experts(Experts* self, const std::vector<Products>& given, const std::string& activation,
                  float limit) {
  std::vector<Expert> experts;
  for (const auto& [inputs, down] : given) {
    experts.push_back({{inputs.begin(), inputs.end()}, down});
  }
  new (self) Experts(std::move(experts), gating_of(activation, limit));
}

void run(const Experts& experts, uintptr_t x, uintptr_t chosen, uintptr_t weights, int64_t T,
         int64_t k, uintptr_t y) {
  if (T < 0 || k < 0) throw std::invalid_argument("there are T >= 0 rows of k >= 0 experts");
  experts.run(at<const float>(x), at<const int32_t>(chosen), at<const float>(weights), T, k,
              at<float>(y));
}

}  // namespace

void bind_experts(nb::module_& module) {
  using nb::arg;
  nb::class_<Experts>(module, "Experts")
      .def("__init__", &make_experts, arg("experts"), arg("activation"), arg("limit"))
      .def("run", &run, arg("x"), arg("chosen"), arg("weights"), arg("T"), arg("k"), arg("y"),
           nb::call_guard<nb::gil_scoped_release>());
  nb::class_<Routing>(module, "Routing")
      .def("__init__", &make_routing, arg("experts"), arg("top_k"), arg("score"), arg("normalize"),
           arg("epsilon"), arg("scale"), arg("groups"), arg("kept_groups"), arg("group_best"),
           arg("bias"))
      .def("route", &route, arg("logits"), arg("T"), arg("chosen"), arg("weights"),
           nb::call_guard<nb::gil_scoped_release>());
}
