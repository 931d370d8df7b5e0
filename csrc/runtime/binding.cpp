// The _runtime module: host-side classes for Python. The only compiled file tied to a Python version.
// Its Python signatures are in python/glm5/_runtime.pyi.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "runtime/packer.h"

namespace py = pybind11;
using glm5::runtime::Pack;
using glm5::runtime::SequencePacker;

namespace {

template <class T>
py::array_t<T> to_numpy(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

std::vector<Pack> pack(const SequencePacker& packer, const py::object& given) {
  const py::array lengths = py::module_::import("numpy").attr("asarray")(given);
  if (lengths.ndim() != 1)
    throw py::value_error("SequencePacker.pack: lengths has " + std::to_string(lengths.ndim()) +
                          " dimensions, want 1, [documents]");
  if (lengths.size() > 0 && lengths.dtype().kind() != 'i' && lengths.dtype().kind() != 'u')
    throw py::type_error("SequencePacker.pack: lengths has dtype " + std::string(py::str(lengths.dtype())) +
                         ", want an integer one");
  const auto values = py::array_t<int64_t, py::array::c_style | py::array::forcecast>(lengths);
  py::gil_scoped_release unlocked;
  return packer.pack(values.data(), values.size());
}

}  // namespace

PYBIND11_MODULE(_runtime, m) {
  m.doc() = "Host-side classes of glm5: sequence packing.";

  py::class_<Pack>(m, "Pack", "The documents that share one token budget, laid out one after the other.")
      .def_property_readonly(
          "documents", [](const Pack& p) { return to_numpy(p.documents); }, "int64 [documents]: document ids, ascending")
      .def_property_readonly(
          "cu_seqlens", [](const Pack& p) { return to_numpy(p.cu_seqlens); },
          "int32 [documents + 1]: where each document starts; the last entry is the token count")
      .def_property_readonly("num_tokens", &Pack::num_tokens, "tokens in all documents of the pack")
      .def(
          "positions", [](const Pack& p) { return to_numpy(p.positions()); },
          "int32 [num_tokens]: each token's place inside its document")
      .def(
          "ks", [](const Pack& p) { return to_numpy(p.ks()); },
          "int32 [num_tokens]: first key a token may attend to (its document's start), counted from the pack's start")
      .def(
          "ke", [](const Pack& p) { return to_numpy(p.ke()); },
          "int32 [num_tokens]: one past the last key a token may attend to (itself), counted from the pack's start")
      .def("__repr__", [](const Pack& p) {
        return "Pack(" + std::to_string(p.documents.size()) + " documents, " + std::to_string(p.num_tokens()) + " tokens)";
      });

  py::class_<SequencePacker>(m, "SequencePacker",
                             "Best-fit decreasing packing of documents into packs of at most `budget` tokens.\n\n"
                             "Raises ValueError when budget is not in [1, 2^31 - 1].")
      .def(py::init<int64_t>(), py::arg("budget"))
      .def_property_readonly("budget", &SequencePacker::budget, "tokens a pack may hold")
      .def("pack", &pack, py::arg("lengths"),
           "Packs documents of the given lengths (1-D, integer). Every document lands in exactly one pack; packs come in\n"
           "the order of their lowest document id. A pure function of (budget, lengths).\n\n"
           "Raises ValueError when a length is not in [1, budget] (cut longer documents first), TypeError when lengths\n"
           "are not integers.")
      .def("__repr__", [](const SequencePacker& p) { return "SequencePacker(budget=" + std::to_string(p.budget()) + ")"; });
}
