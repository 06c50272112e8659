// The experts' activations, on the way from an accumulator to memory: phi(g), with a gate times
// a clamped up, and their derivatives, of N elements at a time: which activation it is is asked
// once for them all. (Asked once a tile, it would have a copy of the epilogues compiled for each,
// which doubles the kernels and takes nvcc twice as long, for one branch in N elements.)
//
// Arithmetic is in the compute type. Of a result that is stored in 16 bits, ex2.approx and
// rcp.approx are precise enough: their errors, some 2^-21 of a value, vanish in the rounding.
// Wider results have e^x and the division as IEEE wants it.
#pragma once

#include "dtypes.cuh"
#include "grouped_ffn.h"
#include "ptx.cuh"

namespace moe_ext::cuda {

__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
__device__ __forceinline__ float erf_of(float x) { return erff(x); }
__device__ __forceinline__ double erf_of(double x) { return erf(x); }

// What activations are made of, for results that are stored as T.
template <class T>
struct Elementary {
  using C = Compute<T>;
  static constexpr bool kApproximate = sizeof(T) == 2;

  static __device__ __forceinline__ C exp(C x) {
    if constexpr (kApproximate) return ptx::ex2_approx(x * 1.44269504088896340736f);
    return exp_of(x);
  }
  static __device__ __forceinline__ C sigmoid(C x) {
    if constexpr (kApproximate) return ptx::rcp_approx(1.0f + exp(-x));
    return C(1) / (C(1) + exp(-x));
  }
};

// phi(g) and its derivative.
template <class C>
struct Phi {
  C value, slope;
};

template <class T, Activation kPhi>
__device__ __forceinline__ Phi<Compute<T>> phi(Compute<T> g, Compute<T> alpha) {
  using C = Compute<T>;
  using Functions = Elementary<T>;
  if constexpr (kPhi == Activation::silu) {
    const C s = Functions::sigmoid(g * alpha);
    return {g * s, s + g * s * (C(1) - s) * alpha};
  } else if constexpr (kPhi == Activation::gelu) {
    const C cdf = C(0.5) + C(0.5) * erf_of(g * C(0.70710678118654752440));
    return {g * cdf, cdf + g * Functions::exp(g * g * C(-0.5)) * C(0.39894228040143267794)};
  } else if constexpr (kPhi == Activation::gelu_tanh) {
    // 0.5 (1 + tanh(u)) = sigmoid(2u)
    const C scale = C(2 * 0.79788456080286535588), cubic = C(0.044715);
    const C s = Functions::sigmoid(g * scale * (C(1) + g * g * cubic));
    return {g * s, s + g * s * (C(1) - s) * scale * (C(1) + g * g * (3 * cubic))};
  } else {  // Comparisons are written so that NaN passes through.
    const C positive = g < C(0) ? C(0) : g;
    if constexpr (kPhi == Activation::relu) return {positive, g > C(0) ? C(1) : C(0)};
    return {positive * positive, C(2) * positive};
  }
}

// Calls body with a constant for `phi`.
template <class Body>
__device__ __forceinline__ void with_phi(Activation phi, Body body) {
  if (phi == Activation::silu) {
    body(std::integral_constant<Activation, Activation::silu>());
  } else if (phi == Activation::gelu) {
    body(std::integral_constant<Activation, Activation::gelu>());
  } else if (phi == Activation::gelu_tanh) {
    body(std::integral_constant<Activation, Activation::gelu_tanh>());
  } else if (phi == Activation::relu) {
    body(std::integral_constant<Activation, Activation::relu>());
  } else {
    body(std::integral_constant<Activation, Activation::relu2>());
  }
}

// An activation, gated or not, with its numbers in the compute type. Without a gate, `u` is not
// looked at.
template <class T, bool kGated>
class Activated {
  using C = Compute<T>;

 public:
  __device__ __forceinline__ explicit Activated(const ActivationSpec& spec)
      : phi_(spec.phi),
        limit_(static_cast<C>(spec.limit)),
        alpha_(static_cast<C>(spec.alpha)),
        up_offset_(static_cast<C>(spec.up_offset)) {}

  template <int N>
  __device__ __forceinline__ void apply(const C (&g)[N], const C (&u)[N], C (&value)[N]) const {
    with_phi(phi_, [&](auto kind) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        value[j] = phi<T, decltype(kind)::value>(kGated ? clamp_gate(g[j]) : g[j], alpha_).value;
      }
    });
    if constexpr (kGated) {
#pragma unroll
      for (int j = 0; j < N; ++j) value[j] = value[j] * (clamp_up(u[j]) + up_offset_);
    }
  }

  // g and u become the derivatives by them.
  template <int N>
  __device__ __forceinline__ void differentiate(C (&g)[N], C (&u)[N], C (&value)[N]) const {
    Phi<C> f[N];
    with_phi(phi_, [&](auto kind) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        f[j] = phi<T, decltype(kind)::value>(kGated ? clamp_gate(g[j]) : g[j], alpha_);
      }
    });
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if constexpr (kGated) {
        const C factor = clamp_up(u[j]) + up_offset_;
        value[j] = f[j].value * factor;
        g[j] = g[j] > limit_ ? C(0) : f[j].slope * factor;
        u[j] = u[j] > limit_ || u[j] < -limit_ ? C(0) : f[j].value;
      } else {
        value[j] = f[j].value, g[j] = f[j].slope;
      }
    }
  }

 private:
  __device__ __forceinline__ C clamp_gate(C g) const { return g > limit_ ? limit_ : g; }
  __device__ __forceinline__ C clamp_up(C u) const {
    return u > limit_ ? limit_ : u < -limit_ ? -limit_ : u;
  }

  Activation phi_;
  C limit_, alpha_, up_offset_;
};

}  // namespace moe_ext::cuda
