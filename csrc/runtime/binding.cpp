// The _runtime module: host-side classes for Python. The only compiled file tied to a Python version.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_runtime, m) {
  m.doc() = "Host-side classes of glm5: sequence packing.";
}
