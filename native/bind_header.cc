// fewbits._native: headers of safetensors files as Python objects.
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>

#include "header.h"

namespace nb = nanobind;

namespace {

nb::object checked(PyObject* made) {
  if (!made) throw nb::python_error();
  return nb::steal(made);
}

nb::object text_of(std::string_view text) {
  return checked(PyUnicode_FromStringAndSize(text.data(), static_cast<Py_ssize_t>(text.size())));
}

// An instance of a subclass of tuple, made as tuple.__new__ makes it and in a third of the time.
template <size_t size>
nb::object tuple_of(PyTypeObject* type, allocfunc allocate, const nb::object (&fields)[size]) {
  nb::object made = checked(allocate(type, size));
  for (size_t i = 0; i < size; ++i) {
    PyTuple_SetItem(made.ptr(), static_cast<Py_ssize_t>(i), nb::object(fields[i]).release().ptr());
  }
  return made;
}

nb::object read_header(nb::bytes text, const fewbits::DtypeBits& bits, nb::type_object info,
                       int64_t file, int64_t start) {
  auto* const type = reinterpret_cast<PyTypeObject*>(info.ptr());
  if (!PyType_IsSubtype(type, &PyTuple_Type)) throw nb::type_error("info must be a tuple");
  const auto allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
  const auto header = fewbits::read_header({text.c_str(), text.size()}, bits);
  if (!header) return nb::none();

  struct Kind {
    nb::object dtype, shape, nbytes;
  };
  std::vector<Kind> kinds;
  for (const fewbits::TensorKind& kind : header->kinds) {
    nb::list shape;
    for (const int64_t size : kind.shape) shape.append(size);
    kinds.push_back({text_of(kind.dtype), nb::tuple(shape), nb::int_(kind.nbytes)});
  }
  const nb::int_ number(file);
  nb::dict tensors;
  for (const fewbits::HeaderTensor& tensor : header->tensors) {
    const Kind& kind = kinds[tensor.kind];
    tensors[text_of(tensor.name)] =
        tuple_of(type, allocate,
                 {kind.dtype, kind.shape, number, nb::int_(start + tensor.begin), kind.nbytes});
  }
  if (tensors.size() != header->tensors.size()) return nb::none();  // a name stands twice
  return nb::make_tuple(tensors, start + header->nbytes);
}

}  // namespace

void bind_header(nb::module_& module) {
  using nb::arg;
  module.def("read_header", &read_header, arg("text"), arg("bits"), arg("info"), arg("file"),
             arg("start"));
}
