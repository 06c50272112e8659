// The Python module moe_ext._C. Loading it registers the ops (schema.cpp and the
// stages' files); the module itself holds only what the library was built with.
// moe_ext/_load.py reads that string from the file before it dares to load it.

#include <pybind11/pybind11.h>

#include "build_info.h"

namespace {

const char build_info[] = "moe_ext build info: " MOE_EXT_BUILD_INFO;

}  // namespace

PYBIND11_MODULE(_C, m) { m.attr("build_info") = build_info; }
