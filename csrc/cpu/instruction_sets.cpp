// cpu_instruction_sets: what the loops of csrc/cpu can be run on here, the one in use first; an
// error where MOE_EXT_CPU names another. Its schema is not in schema.cpp, which the CUDA sources
// are also built with alone.

#include <torch/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "cpu/kernels/kernels.h"

namespace moe_ext::cpu {
namespace {

std::vector<std::string> cpu_instruction_sets() {
  std::vector<std::string> names = instruction_sets();
  const auto used = std::find(names.begin(), names.end(), name_of(instruction_set()));
  std::rotate(names.begin(), used, used + 1);
  return names;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(moe_ext, m) {
  m.def("cpu_instruction_sets() -> str[]", &cpu_instruction_sets);
}

}  // namespace moe_ext::cpu
