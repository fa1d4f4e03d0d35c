// The Python module fewbits._native.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "bind_gating.h"
#include "cpu.h"
#include "gemm/gemm.h"
#include "memory.h"
#include "rates/rates.h"
#include "threads.h"

namespace nb = nanobind;

// Each kernel family binds its own functions, and so does the reader of headers.
void bind_attention(nb::module_& m);
void bind_elementwise(nb::module_& m);
void bind_experts(nb::module_& m);
void bind_header(nb::module_& m);
void bind_program(nb::module_& m);

namespace {

using fewbits::Gemm;
using fewbits::PackedWeight;
using fewbits::Product;
using fewbits::ScaleKind;
using fewbits::WeightKind;
using Array = nb::ndarray<nb::ro, nb::device::cpu>;

nb::dict cpu_features() {
  const fewbits::CpuFeatures& f = fewbits::cpu_features();
  nb::dict d;
  d["avx2"] = f.avx2;
  d["fma"] = f.fma;
  d["f16c"] = f.f16c;
  d["avx_vnni"] = f.avx_vnni;
  d["avx512f"] = f.avx512f;
  d["avx512bw"] = f.avx512bw;
  d["avx512vl"] = f.avx512vl;
  d["avx512dq"] = f.avx512dq;
  d["avx512_vbmi"] = f.avx512_vbmi;
  d["avx512_vnni"] = f.avx512_vnni;
  d["avx512_bf16"] = f.avx512_bf16;
  return d;
}

std::vector<std::string> supported_tiers() {
  std::vector<std::string> names;
  for (const fewbits::Tier tier : fewbits::supported_tiers()) names.emplace_back(name(tier));
  return names;
}

void set_thread_count(int count) {
  if (count < 1) throw nb::value_error("the number of threads must be at least 1");
  const nb::gil_scoped_release release;
  fewbits::set_thread_count(count);
}

// NumPy's own array.ctypes.data takes five times as long.
uintptr_t address(const nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>& array) {
  return reinterpret_cast<uintptr_t>(array.data());
}

// An array's memory goes back to the pool, whose calls the GIL keeps apart, when its last user lets
// go.
nb::ndarray<nb::numpy, float, nb::ndim<2>> pooled(size_t rows, size_t columns) {
  static fewbits::BufferPool* const pool = new fewbits::BufferPool;  // outlives every array
  auto* const buffer = new fewbits::Buffer(pool->take(rows * columns * sizeof(float)));
  const nb::capsule owner(buffer, [](void* taken) noexcept {
    auto* const given = static_cast<fewbits::Buffer*>(taken);
    pool->give_back(std::move(*given));
    delete given;
  });
  return {buffer->as<float>(), {rows, columns}, owner};
}

// The data of a C-contiguous array of the given type and shape.
template <typename T>
const T* checked(const Array& array, const char* what, const char* type,
                 const std::vector<int64_t>& shape) {
  bool fits = array.dtype() == nb::dtype<T>() && array.ndim() == shape.size();
  int64_t stride = 1;
  for (size_t i = shape.size(); fits && i-- > 0;) {
    fits = static_cast<int64_t>(array.shape(i)) == shape[i] &&
           (shape[i] <= 1 || array.stride(i) == stride);
    stride *= shape[i];
  }
  if (!fits) {
    std::string text = std::string(what) + " must be a contiguous " + type + " array of shape [";
    for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    throw std::invalid_argument(text + "]");
  }
  return static_cast<const T*>(array.data());
}

void fill(PackedWeight& weight, int64_t row_begin, const Array& codes,
          const std::optional<Array>& scale, const std::optional<Array>& zero) {
  if (codes.ndim() != 2) throw std::invalid_argument("codes must have two dimensions");
  const int64_t rows = static_cast<int64_t>(codes.shape(0));
  const uint8_t* bytes = nullptr;
  switch (weight.kind()) {
    case WeightKind::int4:
    case WeightKind::int8:
    case WeightKind::fp4:
    case WeightKind::fp8:
      bytes = checked<uint8_t>(codes, "codes", "uint8", {rows, weight.code_row_bytes()});
      break;
    case WeightKind::bf16:
    case WeightKind::f16:
      bytes = reinterpret_cast<const uint8_t*>(
          checked<uint16_t>(codes, "codes", "uint16", {rows, weight.K()}));
      break;
    case WeightKind::f32:
      bytes = reinterpret_cast<const uint8_t*>(
          checked<float>(codes, "codes", "float32", {rows, weight.K()}));
      break;
  }
  const std::vector<int64_t> shape = {rows, weight.groups()};
  const void* scales = nullptr;
  if (scale) {
    switch (weight.scale()) {
      case ScaleKind::f32:
      case ScaleKind::none:
        scales = checked<float>(*scale, "scale", "float32", shape);
        break;
      case ScaleKind::bf16:
      case ScaleKind::f16:
        scales = checked<uint16_t>(*scale, "scale", "uint16", shape);
        break;
      case ScaleKind::e4m3:
      case ScaleKind::e8m0:
        scales = checked<uint8_t>(*scale, "scale", "uint8", shape);
        break;
    }
  }
  const int8_t* zeros = zero ? checked<int8_t>(*zero, "zero", "int8", shape) : nullptr;
  const nb::gil_scoped_release release;
  weight.fill(row_begin, rows, bytes, scales, zeros);
}

// A vector of any length as a copy; empty for None.
template <typename T>
std::vector<T> vector_of(const std::optional<Array>& array, const char* what, const char* type) {
  if (!array) return {};
  const int64_t length = array->ndim() == 1 ? static_cast<int64_t>(array->shape(0)) : 0;
  const T* data = checked<T>(*array, what, type, {length});
  if (length == 0) throw std::invalid_argument(std::string(what) + " can't be empty");
  return {data, data + length};
}

void make_product(Product* self, std::shared_ptr<PackedWeight> weight,
                  const std::optional<Array>& bias, const std::string& quantizer,
                  int64_t group_size, float scale, float zero, double global_scale,
                  const std::string& scale_rounding, double multiplier,
                  const std::optional<Array>& order, const std::optional<Array>& row_sums) {
  new (self) Product{std::move(weight),
                     vector_of<float>(bias, "a bias", "float32"),
                     {fewbits::quantizer(quantizer), group_size, scale, zero, global_scale,
                      fewbits::scale_rounding(scale_rounding)},
                     multiplier,
                     vector_of<int32_t>(order, "an order", "int32"),
                     vector_of<float>(row_sums, "row sums", "float32")};
}

void run(const Gemm& gemm, const fewbits::RowSource& x, int64_t M, const nb::sequence& y,
         bool add) {
  if (M < 0 || nb::len(y) != gemm.size()) {
    throw std::invalid_argument("a product takes M >= 0 rows and one address per result");
  }
  std::vector<float*> outputs;
  outputs.reserve(gemm.size());
  for (size_t i = 0; i < gemm.size(); ++i) {
    outputs.push_back(reinterpret_cast<float*>(nb::cast<uintptr_t>(y[i])));
  }
  const nb::gil_scoped_release release;
  gemm.run(x, M, outputs.data(), add);
}

const float* floats(uintptr_t address) { return reinterpret_cast<const float*>(address); }

void run_plain(const Gemm& gemm, uintptr_t x, int64_t M, const nb::sequence& y, bool add) {
  run(gemm, {fewbits::RowSource::Kind::plain, floats(x), nullptr}, M, y, add);
}

void run_norm(const Gemm& gemm, uintptr_t x, uintptr_t weight, float eps, float offset, int64_t M,
              const nb::sequence& y, bool add) {
  run(gemm, {fewbits::RowSource::Kind::rms_norm, floats(x), floats(weight), eps, offset}, M, y,
      add);
}

void run_gated(const Gemm& gemm, uintptr_t gate, uintptr_t up, const std::string& activation,
               float limit, int64_t M, const nb::sequence& y, bool add) {
  const fewbits::Gating gating = gating_of(activation, limit);
  run(gemm, {fewbits::RowSource::Kind::gated, floats(gate), floats(up), 0, 0, gating}, M, y, add);
}

}  // namespace

NB_MODULE(_native, m) {
  m.def("cpu_features", &cpu_features);
  m.def("supported_tiers", &supported_tiers);
  m.def("tier", [] { return std::string(fewbits::name(fewbits::tier())); });
  m.def("thread_count", &fewbits::thread_count);
  m.def("set_thread_count", &set_thread_count, nb::arg("count"));

  nb::class_<fewbits::ReadProbe>(m, "ReadProbe")
      .def(nb::init<size_t>(), nb::arg("bytes"))
      .def("rate", &fewbits::ReadProbe::rate, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("bytes", &fewbits::ReadProbe::bytes);
  m.def(
      "dot_rate", [](const std::string& name) { return fewbits::dot_rate(fewbits::dot(name)); },
      nb::arg("dot"), nb::call_guard<nb::gil_scoped_release>());

  m.def("address", &address, nb::arg("array").noconvert());

  m.def("pooled", &pooled, nb::arg("rows"), nb::arg("columns"));

  nb::class_<PackedWeight>(m, "PackedWeight")
      .def(
          "__init__",
          [](PackedWeight* self, const std::string& kind, int64_t N, int64_t K, int64_t group_size,
             const std::string& scale, bool shared, bool zero) {
            new (self) PackedWeight(fewbits::weight_kind(kind), N, K, group_size,
                                    fewbits::scale_kind(scale), shared, zero);
          },
          nb::arg("kind"), nb::arg("N"), nb::arg("K"), nb::arg("group_size"), nb::arg("scale"),
          nb::arg("shared"), nb::arg("zero"))
      .def("fill", &fill, nb::arg("row_begin"), nb::arg("codes").noconvert(),
           nb::arg("scale").noconvert().none(), nb::arg("zero").noconvert().none())
      .def_prop_ro("N", &PackedWeight::N)
      .def_prop_ro("K", &PackedWeight::K)
      .def_prop_ro("group_size", &PackedWeight::group_size)
      .def_prop_ro("nbytes", &PackedWeight::nbytes);

  nb::class_<Product>(m, "Product")
      .def("__init__", &make_product, nb::arg("weight"), nb::arg("bias").noconvert().none(),
           nb::arg("quantizer") = "none", nb::arg("group_size") = 0, nb::arg("scale") = 1.0f,
           nb::arg("zero") = 0.0f, nb::arg("global_scale") = 1.0,
           nb::arg("scale_rounding") = "even", nb::arg("multiplier") = 1.0,
           nb::arg("order").noconvert().none() = nb::none(),
           nb::arg("row_sums").noconvert().none() = nb::none());

  nb::class_<Gemm>(m, "Gemm")
      .def(
          "__init__",
          [](Gemm* self, const std::vector<std::shared_ptr<Product>>& products, bool apart) {
            new (self) Gemm({products.begin(), products.end()},
                            apart ? Gemm::Parts::apart : Gemm::Parts::shared);
          },
          nb::arg("products"), nb::arg("apart") = false)
      .def("run", &run_plain, nb::arg("x"), nb::arg("M"), nb::arg("y"), nb::arg("add"))
      .def("run_norm", &run_norm, nb::arg("x"), nb::arg("weight"), nb::arg("eps"),
           nb::arg("offset"), nb::arg("M"), nb::arg("y"), nb::arg("add"))
      .def("run_gated", &run_gated, nb::arg("gate"), nb::arg("up"), nb::arg("activation"),
           nb::arg("limit"), nb::arg("M"), nb::arg("y"), nb::arg("add"))
      .def_prop_ro("K", &Gemm::K);

  bind_attention(m);
  bind_elementwise(m);
  bind_experts(m);
  bind_header(m);
  bind_program(m);
}
