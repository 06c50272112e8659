// Which instruction set's kernels this process uses, decided once.

#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace moe_ext::cpu {

#define MOE_DECLARE(isa)                   \
  extern const Kernels<float> isa##_float; \
  extern const Kernels<double> isa##_double;
MOE_DECLARE(baseline)
#if defined(__x86_64__)
MOE_DECLARE(avx512)
MOE_DECLARE(avx2)
#endif

namespace {

// MOE_EXT_CPU=baseline|avx2|avx512 lowers the choice, so that one machine can test all.
Isa choose() {
  Isa best = Isa::baseline;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::avx2;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    best = Isa::avx512;
  }
  const char* wanted = std::getenv("MOE_EXT_CPU");
  if (wanted && !std::strcmp(wanted, "baseline")) best = Isa::baseline;
  if (wanted && !std::strcmp(wanted, "avx2") && best == Isa::avx512) best = Isa::avx2;
#endif
  return best;
}

const Isa chosen = choose();

}  // namespace

Isa instruction_set() { return chosen; }

#if defined(__x86_64__)
#define MOE_PICK(type) \
  chosen == Isa::avx512 ? avx512_##type : chosen == Isa::avx2 ? avx2_##type : baseline_##type
#else
#define MOE_PICK(type) baseline_##type
#endif

template <>
const Kernels<float>& kernels<float>() {
  return MOE_PICK(float);
}
template <>
const Kernels<double>& kernels<double>() {
  return MOE_PICK(double);
}

}  // namespace moe_ext::cpu
