// Which instruction set's kernels this process uses, decided once.

#include <cstdlib>
#include <stdexcept>

#include "kernels.h"

namespace moe_ext::cpu {

extern const Table baseline_table;
#if defined(__x86_64__)
extern const Table avx2_table, avx512_table;
extern const Kernels<bf16> avx512_bf16_products;
#endif

namespace {

struct Choice {
  const char* name;
  Isa isa;
  bool runs, wins;  // whether it exists here, and is taken unasked
};

// The best one last.
std::vector<Choice> choices() {
  std::vector<Choice> all = {{"baseline", Isa::baseline, true, true}};
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  all.push_back({"avx2", Isa::avx2, avx2, true});
  all.push_back({"avx512", Isa::avx512, avx512, true});
  // Intel's cores begin one such product every other cycle, which is half as many
  // multiplications as they do in float32 (86 and 177 GF/s on one core, Emerald Rapids).
  all.push_back({"avx512_bf16", Isa::avx512_bf16, bf16, !__builtin_cpu_is("intel")});
#endif
  return all;
}

std::string joined(const std::vector<std::string>& names) {
  std::string all;
  for (const std::string& name : names) all += (all.empty() ? "" : ", ") + name;
  return all;
}

// MOE_EXT_CPU=<name> takes another one, so that one machine can test all that it has.
Isa choose() {
  const char* wanted = std::getenv("MOE_EXT_CPU");
  Isa best = Isa::baseline;
  for (const Choice& choice : choices()) {
    if (!choice.runs) continue;
    if (wanted && wanted == std::string(choice.name)) return choice.isa;
    if (choice.wins) best = choice.isa;
  }
  if (wanted && *wanted) {
    throw std::invalid_argument("MOE_EXT_CPU must be one of this processor's instruction sets (" +
                                joined(instruction_sets()) + "), got " + wanted);
  }
  return best;
}

}  // namespace

const char* name_of(Isa isa) {
  for (const Choice& choice : choices()) {
    if (choice.isa == isa) return choice.name;
  }
  return nullptr;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Choice& choice : choices()) {
    if (choice.runs) names.push_back(choice.name);
  }
  return names;
}

Isa instruction_set() {
  static const Isa chosen = choose();
  return chosen;
}

namespace {

const Table& table() {
#if defined(__x86_64__)
  // avx512_bf16 is avx512 with other products of bf16.
  if (instruction_set() >= Isa::avx512) return avx512_table;
  if (instruction_set() == Isa::avx2) return avx2_table;
#endif
  return baseline_table;
}

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
  return table().f32;
}
template <>
const Kernels<double>& kernels<double>() {
  return table().f64;
}
#if defined(__x86_64__)
template <>
const Kernels<bf16>& kernels<bf16>() {
  return avx512_bf16_products;
}
#endif
template <>
const RowKernels<float>& row_kernels<float>() {
  return table().rows_f32;
}
template <>
const RowKernels<double>& row_kernels<double>() {
  return table().rows_f64;
}

}  // namespace moe_ext::cpu
