// fewbits._native: norms, the gated activation, embedding rows and the likeliest token.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "bind_gating.h"
#include "elementwise/elementwise.h"

namespace nb = nanobind;

namespace {

using fewbits::EmbeddingKind;
using Codes = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Groups = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void require(bool condition, const std::string& sentence) {
  if (!condition) throw std::invalid_argument(sentence);
}

void rms_norm(uintptr_t x, uintptr_t weight, uintptr_t y, int64_t T, int64_t H, float eps,
              float offset) {
  require(T >= 0 && H > 0, "rms_norm takes rows of at least one element");
  fewbits::rms_norm(at<const float>(x), at<const float>(weight), at<float>(y), T, H, eps, offset);
}

void gated(uintptr_t gate, uintptr_t up, uintptr_t y, int64_t T, int64_t I,
           const std::string& activation, float limit) {
  require(T >= 0 && I >= 0, "sizes can't be negative");
  fewbits::gated(at<const float>(gate), at<const float>(up), at<float>(y), T, I,
                 gating_of(activation, limit));
}

void scale_by_sigmoid(uintptr_t x, uintptr_t gate, int64_t T, int64_t heads, int64_t width) {
  require(T >= 0 && heads >= 0 && width >= 0, "sizes can't be negative");
  fewbits::scale_by_sigmoid(at<float>(x), at<const float>(gate), T, heads, width);
}

void argmax(uintptr_t x, int64_t R, int64_t V, uintptr_t columns) {
  require(R >= 0 && V > 0, "argmax takes rows of at least one element");
  fewbits::argmax(at<const float>(x), R, V, at<int64_t>(columns));
}

int index_of(const std::string& kind) {
  constexpr const char* kKinds[] = {"int4", "int8", "fp4", "fp8", "bf16", "f16", "f32"};
  int index = 0;
  while (index < 7 && kind != kKinds[index]) ++index;
  require(index < 7, "an embedding's kind is int4, int8, fp4, fp8, bf16, f16 or f32, not " + kind);
  return index;
}

// References its arrays (the codes may be a memory map) and keeps them alive.
class Embedding {
 public:
  Embedding(const std::string& kind, Codes codes, int64_t K, std::optional<Groups> scale,
            std::optional<Groups> zero, int64_t group_size)
      : codes_(codes), scale_(scale), zero_(zero) {
    const int index = index_of(kind);
    table_.kind = static_cast<EmbeddingKind>(index);
    const bool integers = kind == "int4" || kind == "int8",
               nibbles = kind == "int4" || kind == "fp4";
    const bool bytes = nibbles || kind == "int8" || kind == "fp8";
    const nb::dlpack::dtype wanted = bytes           ? nb::dtype<uint8_t>()
                                     : kind == "f32" ? nb::dtype<float>()
                                                     : nb::dtype<uint16_t>();
    require(codes.dtype() == wanted, "codes of kind " + kind + " are an array of " +
                                         (bytes           ? "uint8"
                                          : kind == "f32" ? "float32"
                                                          : "uint16"));
    const int64_t rows = static_cast<int64_t>(codes.shape(0));
    const int64_t columns = nibbles ? (K + 1) / 2 : K;
    require(K > 0 && static_cast<int64_t>(codes.shape(1)) == columns,
            "codes have " + std::to_string(codes.shape(1)) + " columns where " +
                std::to_string(columns) + " are expected");
    require(scale.has_value() || !integers, "integer codes need scales");
    require(integers || !zero, "only integer codes have zero points");
    if (scale) {
      require(group_size > 0, "the group size must be positive");
      const int64_t groups = (K + group_size - 1) / group_size;
      const auto fits = [&](const Groups& array) {
        return static_cast<int64_t>(array.shape(0)) == rows &&
               static_cast<int64_t>(array.shape(1)) == groups;
      };
      const std::string shape =
          " of shape [" + std::to_string(rows) + ", " + std::to_string(groups) + "]";
      require(fits(*scale), "the scales must be an array" + shape);
      require(!zero || fits(*zero), "the zero points must be an array" + shape);
    }
    table_.codes = static_cast<const uint8_t*>(codes.data());
    table_.rows = rows;
    table_.K = K;
    table_.scale = scale ? scale->data() : nullptr;
    table_.zero = zero ? zero->data() : nullptr;
    table_.group_size = group_size;
  }

  void rows(uintptr_t ids, int64_t T, uintptr_t y) const {
    const int64_t* wanted = at<const int64_t>(ids);
    for (int64_t t = 0; t < T; ++t) fewbits::check_id(table_, wanted[t]);
    fewbits::gather_rows(table_, wanted, T, at<float>(y));
  }

  const fewbits::EmbeddingTable& table() const { return table_; }
  int64_t row_count() const { return table_.rows; }
  int64_t K() const { return table_.K; }

 private:
  Codes codes_;
  std::optional<Groups> scale_, zero_;
  fewbits::EmbeddingTable table_;
};

}  // namespace

void bind_elementwise(nb::module_& module) {
  using nb::arg;
  const auto unlocked = nb::call_guard<nb::gil_scoped_release>();
  module.def("rms_norm", &rms_norm, arg("x"), arg("weight"), arg("y"), arg("T"), arg("H"),
             arg("eps"), arg("offset"), unlocked,
             "y = x / sqrt(mean(x^2) + eps) * (weight + offset) for rows [T, H] of float32.");
  module.def(
      "gated", &gated, arg("gate"), arg("up"), arg("y"), arg("T"), arg("I"),
      arg("activation") = "silu", arg("limit") = 0.0f, unlocked,
      "y = activation(gate) * up, [T, I] of float32, as fewbits.kernels.ops.Activation says.");
  module.def("scale_by_sigmoid", &scale_by_sigmoid, arg("x"), arg("gate"), arg("T"), arg("heads"),
             arg("width"), unlocked, "x[t, h, :] *= sigmoid(gate[t, h]), in place, of float32.");
  module.def("argmax", &argmax, arg("x"), arg("R"), arg("V"), arg("columns"), unlocked,
             "Where each row of float32 [R, V] is largest, or has its first NaN; int64 [R].");
  nb::class_<fewbits::EmbeddingTable>(module, "EmbeddingTable",
                                      "What an Embedding holds, which must outlive it.");
  nb::class_<Embedding>(module, "Embedding",
                        "Rows of an embedding, dequantized to float32 when they are asked for.")
      .def(nb::init<const std::string&, Codes, int64_t, std::optional<Groups>,
                    std::optional<Groups>, int64_t>(),
           arg("kind"), arg("codes"), arg("K"), arg("scale").none(), arg("zero").none(),
           arg("group_size"))
      .def("rows", &Embedding::rows, arg("ids"), arg("T"), arg("y"), unlocked,
           "Row ids[t] (int64 [T]) into y[t] (float32 [T, K]); both are addresses.")
      .def_prop_ro("table", &Embedding::table, nb::rv_policy::reference_internal)
      .def_prop_ro("N", &Embedding::row_count)
      .def_prop_ro("K", &Embedding::K);
}
