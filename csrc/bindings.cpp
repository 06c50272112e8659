// The Python module moe_ext._C. Loading it registers the ops (schema.cpp and the
// stages' files); the module itself holds only what the library was built with.

#include <pybind11/pybind11.h>

namespace moe_ext {
extern const char build_info[];  // build_info.cpp
}

PYBIND11_MODULE(_C, m) { m.attr("build_info") = pybind11::str(moe_ext::build_info); }
