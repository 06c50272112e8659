// cpu_instruction_sets: what the loops of csrc/cpu can be run on here.

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

TORCH_LIBRARY_IMPL(moe_ext, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_sets", &cpu_instruction_sets);
}

}  // namespace moe_ext::cpu
