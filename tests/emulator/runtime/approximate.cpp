// The special function unit's approximations. The manual promises no more than a bound on the
// error: what comes out here is as far from the exact value as that allows, on one side or the
// other by the bits of the input, so the same for the same input always.

#include <cmath>
#include <cstring>

#include "emulator/emulator.h"

namespace emulator {

constexpr float kSmallestNormal = 0x1p-126f;

// .ftz: subnormal numbers are zeros of their sign.
static float flush(float x) { return std::fabs(x) < kSmallestNormal ? std::copysign(0.0f, x) : x; }

// A float that is more than ulps - 1 and at most `ulps` units of the last place off.
static float approximate(double exact, float input, int ulps) {
  const float nearest = static_cast<float>(exact);
  if (!std::isfinite(nearest) || std::fabs(nearest) < kSmallestNormal) return flush(nearest);
  uint32_t bits;
  std::memcpy(&bits, &input, sizeof bits);
  const bool up = bits * 0x9e3779b1u >> 31;
  const double unit = std::ldexp(1.0, std::ilogb(exact) - 23);
  const double bound = exact + (up ? ulps : -ulps) * unit;
  float result = static_cast<float>(bound);
  if (up ? result > bound : result < bound) result = std::nextafter(result, nearest);
  return std::isfinite(result) ? flush(result) : nearest;
}

float ex2_approx(float x) {
  x = flush(x);
  return x == 0 ? 1.0f : approximate(std::exp2(static_cast<double>(x)), x, kEx2Ulps);
}

float rcp_approx(float x) {
  x = flush(x);
  return approximate(1 / static_cast<double>(x), x, kRcpUlps);
}

}  // namespace emulator
