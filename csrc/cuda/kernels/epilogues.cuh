// What becomes of a RowsGemm's accumulators, in registers: a kernel that has computed N
// neighbouring columns of one row calls the function of the epilogue's kind.
//
//   epilogue_store      out[r][n] = acc + bias[n]
//   epilogue_activate   h = acc + bias (kept if asked for), out[r][i] = act(h)
//   epilogue_backward   acc is dA[r][i] = <dy, W_down column i>, before the routing weight w:
//                       A is recomputed from the kept h; dh[r] = w dA act'(h),
//                       out[r][i] = w A; returns <dA, A> over its columns, the row's part
//                       of the router's gradient
//
// What an activation is, whether there is a bias and how gate and up lie in a row of 2I are
// run-time branches: they cost nothing beside the products, and every further template
// would be compiled for every tile. N is what a kernel's layout of accumulators gives: 1,
// 2 (mma.sync), 4, 8; columns past the end are neither read nor written. Aligned packs move
// in one instruction, others element by element.
//
// Arithmetic is in the compute type (float32, or float64); a value is rounded once, when it
// is stored. Every element depends on its own row only.
#pragma once

#include "dtypes.cuh"
#include "grouped_ffn.h"
#include "ptx.cuh"

namespace moe_ext::cuda {

// ---- activations -----------------------------------------------------------------

__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
__device__ __forceinline__ float erf_of(float x) { return erff(x); }
__device__ __forceinline__ double erf_of(double x) { return erf(x); }

// What activations are made of, for results that are stored as T. Rounding to 16 bits hides the
// error of the special function unit, some 2^-21 of a value; wider results have e^x and the
// division as IEEE wants it.
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

template <class T>
__device__ __forceinline__ Phi<Compute<T>> phi(Activation kind, Compute<T> g, Compute<T> alpha) {
  using C = Compute<T>;
  using Functions = Elementary<T>;
  switch (kind) {
    case Activation::silu: {
      const C s = Functions::sigmoid(g * alpha);
      return {g * s, s + g * s * (C(1) - s) * alpha};
    }
    case Activation::gelu: {
      const C cdf = C(0.5) + C(0.5) * erf_of(g * C(0.70710678118654752440));
      return {g * cdf, cdf + g * Functions::exp(g * g * C(-0.5)) * C(0.39894228040143267794)};
    }
    case Activation::gelu_tanh: {
      // 0.5 (1 + tanh(u)) = sigmoid(2u)
      const C scale = C(2 * 0.79788456080286535588), cubic = C(0.044715);
      const C s = Functions::sigmoid(g * scale * (C(1) + g * g * cubic));
      return {g * s, s + g * s * (C(1) - s) * scale * (C(1) + g * g * (3 * cubic))};
    }
    default: {  // Comparisons are written so that NaN passes through.
      const C positive = g < C(0) ? C(0) : g;
      if (kind == Activation::relu) return {positive, g > C(0) ? C(1) : C(0)};
      return {positive * positive, C(2) * positive};
    }
  }
}

// An activation of results that are stored as T, with its numbers in the compute type.
template <class T>
struct Gate {
  using C = Compute<T>;
  Activation kind;
  C limit, alpha, up_offset;

  __device__ __forceinline__ explicit Gate(const ActivationSpec& spec)
      : kind(spec.phi),
        limit(static_cast<C>(spec.limit)),
        alpha(static_cast<C>(spec.alpha)),
        up_offset(static_cast<C>(spec.up_offset)) {}

  __device__ __forceinline__ C clamp_gate(C g) const { return g > limit ? limit : g; }
  __device__ __forceinline__ C clamp_up(C u) const {
    return u > limit ? limit : u < -limit ? -limit : u;
  }

  __device__ __forceinline__ C value(C g, C u) const {
    return phi<T>(kind, clamp_gate(g), alpha).value * (clamp_up(u) + up_offset);
  }

  struct Derivatives {
    C value, gate, up;
  };
  __device__ __forceinline__ Derivatives derivatives(C g, C u) const {
    const Phi<C> f = phi<T>(kind, clamp_gate(g), alpha);
    const C factor = clamp_up(u) + up_offset;
    return {f.value * factor, g > limit ? C(0) : f.slope * factor,
            u > limit || u < -limit ? C(0) : f.value};
  }
};

// ---- rows of preactivations --------------------------------------------------------

// N gate and N up values, from column i on, of a row that lies as `at` says.
template <class T, int N>
__device__ __forceinline__ void load_pairs(Compute<T> (&gate)[N], Compute<T> (&up)[N], const T* row,
                                           const GateColumns& at, int64_t i, int count) {
  // Both halves' loads, then both halves' values: they travel together.
  Neighbours<T, N> low, high;
  const bool interleaved = at.step != 1;
  const T* first = row + (interleaved ? 2 * i : at.gate + i);
  const T* second = interleaved ? first + N : row + at.up + i;
  with_packs(count == N && in_packs<T, N>(first, second - first, N), [&](auto whole) {
    low.load(whole, first, interleaved ? 2 * count : count);
    high.load(whole, second, interleaved ? 2 * count - N : count);
  });
  Compute<T> both[2][N];
  low.values(both[0]);
  high.values(both[1]);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    gate[j] = interleaved ? both[2 * j / N][2 * j % N] : both[0][j];
    up[j] = interleaved ? both[(2 * j + 1) / N][(2 * j + 1) % N] : both[1][j];
  }
}

// The same without a gate.
template <class T, int N>
__device__ __forceinline__ void load_columns(Compute<T> (&value)[N], const T* from, int count) {
  Neighbours<T, N> loaded;
  with_packs(count == N && in_packs<T, N>(from, 0, 0),
             [&](auto whole) { loaded.load(whole, from, count); });
  loaded.values(value);
}

template <class T, int N>
__device__ __forceinline__ void store_pairs(T* row, const Compute<T> (&gate)[N],
                                            const Compute<T> (&up)[N], const GateColumns& at,
                                            int64_t i, int count) {
  if (at.step == 1) {
    store_neighbours<T, N>(row + at.gate + i, gate, count);
    store_neighbours<T, N>(row + at.up + i, up, count);
  } else {
    Compute<T> both[2 * N];
#pragma unroll
    for (int j = 0; j < N; ++j) both[2 * j] = gate[j], both[2 * j + 1] = up[j];
    store_neighbours<T, 2 * N>(row + 2 * i, both, 2 * count);
  }
}

// The routing weight of a row: 1 where the rows are wanted for themselves, 0 where the row is no
// assignment's. `e` is an Epilogue or a BiasGradient.
template <class C, class Weighted>
__device__ __forceinline__ C row_weight(const Weighted& e, int64_t row) {
  if (!e.weights) return C(1);
  const int32_t assignment = e.row_assignment[row];
  const bool has_one = assignment >= 0 && assignment < e.assignments;
  return has_one ? load_as<C>(e.weights, e.weights_dtype, assignment) : C(0);
}

// ---- the epilogues -----------------------------------------------------------------
//
// `acc` (or `gate` and `up`) are columns column..column+N-1 of row `row` of expert
// `expert`; the row holds something; column < e.columns.

template <class T, int N>
__device__ __forceinline__ int columns_left(const Epilogue& e, int64_t column) {
  return e.columns - column < N ? static_cast<int>(e.columns - column) : N;
}

template <class T, int N>
__device__ __forceinline__ void epilogue_store(const Epilogue& e, int expert, int64_t row,
                                               int64_t column, const Compute<T> (&acc)[N]) {
  const int count = columns_left<T, N>(e, column);
  Compute<T> value[N] = {};
  if (e.bias) {
    const T* bias = static_cast<const T*>(e.bias) + expert * e.columns;
    load_columns<T, N>(value, bias + column, count);
  }
#pragma unroll
  for (int j = 0; j < N; ++j) value[j] += acc[j];
  store_neighbours<T, N>(static_cast<T*>(e.out) + row * e.out_stride + column, value, count);
}

// Without a gate, `up` is not looked at.
template <class T, int N>
__device__ __forceinline__ void epilogue_activate(const Epilogue& e, int expert, int64_t row,
                                                  int64_t column, const Compute<T> (&gate)[N],
                                                  const Compute<T> (&up)[N]) {
  using C = Compute<T>;
  const int count = columns_left<T, N>(e, column);
  const bool gated = e.activation.gated;
  const int64_t width = gated ? 2 * e.columns : e.columns;
  const Gate<T> act(e.activation);
  C g[N] = {}, u[N] = {}, a[N];
  if (e.bias) {
    const T* bias = static_cast<const T*>(e.bias) + expert * width;
    if (gated) {
      load_pairs<T, N>(g, u, bias, e.at, column, count);
    } else {
      load_columns<T, N>(g, bias + column, count);
    }
  }
#pragma unroll
  for (int j = 0; j < N; ++j) {
    g[j] += gate[j];
    if (gated) u[j] += up[j];
    a[j] = gated ? act.value(g[j], u[j]) : phi<T>(act.kind, g[j], act.alpha).value;
  }
  if (e.kept) {
    T* kept = static_cast<T*>(e.kept) + row * width;
    if (gated) {
      store_pairs<T, N>(kept, g, u, e.at, column, count);
    } else {
      store_neighbours<T, N>(kept + column, g, count);
    }
  }
  store_neighbours<T, N>(static_cast<T*>(e.out) + row * e.out_stride + column, a, count);
}

// Returns the sum over its columns of dA * A: to be added over the row's columns in a fixed
// order, and written to score_parts[tile * R + row].
template <class T, int N>
__device__ __forceinline__ Compute<T> epilogue_backward(const Epilogue& e, int64_t row,
                                                        int64_t column, const Compute<T> (&da)[N]) {
  using C = Compute<T>;
  const int count = columns_left<T, N>(e, column);
  const bool gated = e.activation.gated;
  const int64_t width = gated ? 2 * e.columns : e.columns;
  const Gate<T> act(e.activation);
  const T* kept = static_cast<const T*>(e.kept) + row * width;
  const C w = row_weight<C>(e, row);
  C g[N], u[N], a[N], score = C(0);
  if (gated) {
    load_pairs<T, N>(g, u, kept, e.at, column, count);
  } else {
    load_columns<T, N>(g, kept + column, count);
  }
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const C upstream = w * da[j];
    if (gated) {
      const typename Gate<T>::Derivatives d = act.derivatives(g[j], u[j]);
      a[j] = d.value, g[j] = upstream * d.gate, u[j] = upstream * d.up;
    } else {
      const Phi<C> f = phi<T>(act.kind, g[j], act.alpha);
      a[j] = f.value, g[j] = upstream * f.slope;
    }
    if (j < count) score += da[j] * a[j];
    a[j] *= w;
  }
  if (e.dh) {
    T* dh = static_cast<T*>(e.dh) + row * width;
    if (gated) {
      store_pairs<T, N>(dh, g, u, e.at, column, count);
    } else {
      store_neighbours<T, N>(dh + column, g, count);
    }
  }
  if (e.out) {
    store_neighbours<T, N>(static_cast<T*>(e.out) + row * e.out_stride + column, a, count);
  }
  return score;
}

}  // namespace moe_ext::cuda
