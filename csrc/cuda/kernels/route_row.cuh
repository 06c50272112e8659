// One token's logits in the hands of a team of lanes, and what they become: scores, sums,
// the weights of the chosen experts. Shared by topk_route, its backward (which recomputes
// the row instead of keeping it) and accumulate_stats.
//
// A team is 4 to 32 lanes of a warp. Each lane holds the same number of experts in
// registers, four neighbours at a time, so that a row comes in 16-byte loads:
//
//   lane      0          1          ..   kLanes - 1        0                  ..
//   experts   0 1 2 3    4 5 6 7    ..   .. 4 kLanes - 1   4 kLanes ..        ..
//   slots     0 1 2 3    0 1 2 3         0 1 2 3           4 5 6 7
//
// Slots past E hold -inf. Rows that no registers can hold lie in a workspace instead
// (kPerLane = 0), where expert e is lane e % 32's: the same code, only slower.
//
// Everything a team computes depends on its own token alone, in an order fixed by E: sums
// go over a lane's slots, then over the lanes as a butterfly, which gives all of them the
// same bits.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "../../routing.h"
#include "dtypes.cuh"

namespace moe_ext::cuda {

// ---- numbers ------------------------------------------------------------------------

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }

template <class A>
__device__ __forceinline__ A logistic(A x) {
  const A e = exponential(x < A(0) ? x : -x);  // cannot overflow
  return (x < A(0) ? e : A(1)) / (A(1) + e);
}

// The larger of two; a NaN stays once it is there.
template <class A>
__device__ __forceinline__ A larger(A a, A b) {
  return b > a || b != b ? b : a;
}

// ---- ids ----------------------------------------------------------------------------

constexpr int32_t kLargestId = std::numeric_limits<int32_t>::max();

// Expert ids, int32 or int64, as they were given: anything outside of 0..E-1 is a sentinel.
struct ExpertIds {
  const void* data;
  bool is_int64;

  // A sentinel comes back as E or more, within int32.
  __device__ __forceinline__ int32_t at(int64_t index, int32_t num_experts) const {
    const int64_t id = is_int64 ? static_cast<const int64_t*>(data)[index]
                                : static_cast<const int32_t*>(data)[index];
    return id < 0 ? num_experts : static_cast<int32_t>(id < kLargestId ? id : kLargestId);
  }
};

// ---- teams --------------------------------------------------------------------------

template <int kLanes_, int kPerLane_>
struct Team {
  static constexpr int kLanes = kLanes_, kPerLane = kPerLane_;
  static constexpr bool kInRegisters = kPerLane > 0;
  static_assert(kInRegisters ? kPerLane % 4 == 0 : kLanes == kWarpSize);

  int lane, num_experts;

  __device__ __forceinline__ int slots() const {
    return kInRegisters ? kPerLane : (num_experts + kLanes - 1) / kLanes;
  }
  __device__ __forceinline__ int expert(int slot) const {
    return kInRegisters ? slot / 4 * (4 * kLanes) + lane * 4 + slot % 4 : slot * kLanes + lane;
  }

  template <class A>
  __device__ __forceinline__ A sum(A x) const {
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2)
      x += __shfl_xor_sync(kFullWarp, x, distance);
    return x;
  }
  template <class A>
  __device__ __forceinline__ A max(A x) const {
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2)
      x = larger(x, __shfl_xor_sync(kFullWarp, x, distance));
    return x;
  }
};

// A lane's part of a row: slot by slot in registers, or in the workspace.
template <class X, int kPerLane>
struct Slots {
  X x[kPerLane];
  __device__ __forceinline__ explicit Slots(X*, int) {}
  __device__ __forceinline__ X& operator[](int slot) { return x[slot]; }
};
template <class X>
struct Slots<X, 0> {
  X* x;
  __device__ __forceinline__ explicit Slots(X* row, int lane) : x(row + lane) {}
  __device__ __forceinline__ X& operator[](int slot) { return x[slot * kWarpSize]; }
};

// ---- a token's logits -----------------------------------------------------------------

template <class T, class Team, class Values>
__device__ __forceinline__ void read_row_as(const Team& team, const T* row, bool present,
                                            Values& value) {
  using A = Compute<T>;
  if constexpr (Team::kInRegisters) {
#pragma unroll
    for (int slot = 0; slot < Team::kPerLane; slot += 4) {
      const int e = team.expert(slot), left = team.num_experts - e;
      A four[4];
      load_neighbours<T, 4>(four, row + e, present ? left : 0);
#pragma unroll
      for (int i = 0; i < 4; ++i) value[slot + i] = i < left ? four[i] : -kInfinity<A>;
    }
  } else {
    for (int slot = 0; slot < team.slots(); ++slot) {
      const int e = team.expert(slot);
      value[slot] = e >= team.num_experts ? -kInfinity<A> : present ? to_compute(row[e]) : A(0);
    }
  }
}

// value = the row that begins at logits[begin]. Of a token that is not present nothing is
// read: it may hold anything, NaN too.
template <class A, class Team, class Values>
__device__ __forceinline__ void read_row(const Team& team, const void* logits, Dtype dtype,
                                         int64_t begin, bool present, Values& value) {
  if constexpr (sizeof(A) == 8) {
    read_row_as(team, static_cast<const double*>(logits) + begin, present, value);
  } else if (dtype == Dtype::f32) {
    read_row_as(team, static_cast<const float*>(logits) + begin, present, value);
  } else if (dtype == Dtype::bf16) {
    read_row_as(team, static_cast<const bf16*>(logits) + begin, present, value);
  } else {
    read_row_as(team, static_cast<const f16*>(logits) + begin, present, value);
  }
}

template <class T, class Team, class Values>
__device__ __forceinline__ void write_row_as(const Team& team, T* row, bool present,
                                             Values& value) {
  using A = Compute<T>;
  if constexpr (Team::kInRegisters) {
#pragma unroll
    for (int slot = 0; slot < Team::kPerLane; slot += 4) {
      const int e = team.expert(slot);
      A four[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) four[i] = present ? value[slot + i] : A(0);
      store_neighbours<T, 4>(row + e, four, team.num_experts - e);
    }
  } else {
    for (int slot = 0; slot < team.slots(); ++slot) {
      const int e = team.expert(slot);
      if (e < team.num_experts) round_to(row[e], present ? value[slot] : A(0));
    }
  }
}

// The row that begins at logits[begin] = value, or zeros.
template <class A, class Team, class Values>
__device__ __forceinline__ void write_row(const Team& team, void* logits, Dtype dtype,
                                          int64_t begin, bool present, Values& value) {
  if constexpr (sizeof(A) == 8) {
    write_row_as(team, static_cast<double*>(logits) + begin, present, value);
  } else if (dtype == Dtype::f32) {
    write_row_as(team, static_cast<float*>(logits) + begin, present, value);
  } else if (dtype == Dtype::bf16) {
    write_row_as(team, static_cast<bf16*>(logits) + begin, present, value);
  } else {
    write_row_as(team, static_cast<f16*>(logits) + begin, present, value);
  }
}

// What a row's logits amount to.
template <class A>
struct Row {
  bool is_sigmoid;
  A max;          // of the logits; NaN if one of them is
  A exp_share;    // 1 / sum of exp(logit - max)
  A score_share;  // 1 / sum of the scores
  A logsumexp;

  __device__ __forceinline__ A softmax(A logit) const {
    return exponential(logit - max) * exp_share;
  }
  __device__ __forceinline__ A score(A logit) const {
    return is_sigmoid ? logistic(logit) : softmax(logit);
  }
};

// Turns logits into scores, in place.
template <class A, class Team, class Values>
__device__ __forceinline__ Row<A> score_row(const Team& team, ScoreFunction function,
                                            Values& value) {
  Row<A> row;
  row.is_sigmoid = function == kSigmoid;
  A max = -kInfinity<A>;
#pragma unroll
  for (int slot = 0; slot < team.slots(); ++slot) max = larger(max, value[slot]);
  row.max = max = team.max(max);
  A exp_sum = 0, score_sum = 0;
#pragma unroll
  for (int slot = 0; slot < team.slots(); ++slot) {
    const A e = exponential(value[slot] - max);
    exp_sum += e;
    if (row.is_sigmoid) score_sum += value[slot] = logistic(value[slot]);
    if (!row.is_sigmoid) value[slot] = e;
  }
  exp_sum = team.sum(exp_sum);
  row.exp_share = A(1) / exp_sum;
  row.score_share = 1;
  if (row.is_sigmoid) {
    row.score_share = A(1) / team.sum(score_sum);
  } else {
#pragma unroll
    for (int slot = 0; slot < team.slots(); ++slot) value[slot] *= row.exp_share;
  }
  const bool is_infinite = max == kInfinity<A> || max == -kInfinity<A>;
  row.logsumexp = is_infinite ? max : max + logarithm(exp_sum);
  return row;
}

// ---- the chosen experts -----------------------------------------------------------------

// The K choices of a token and their weights, choice j in the hands of lane j % kLanes. A
// lane keeps its first choice; the others, which exist where K is larger than the team, it
// reads again.
template <class A, class Team>
struct Chosen {
  const Team& team;
  const RouteOptions& options;
  const Row<A>& row;
  const void* logits;  // the tokens', as `read_row` takes them
  Dtype dtype;
  int64_t logits_begin;
  ExpertIds ids;
  int64_t ids_begin;
  int32_t first;  // the lane's first choice
  int top_k;      // K, or 0 for a token that is not present
  A max = 0;      // of the chosen logits, for softmax_topk
  A total = 1;    // what the weights are divided by

  __device__ __forceinline__ int32_t id(int j) const {
    return j == team.lane ? first : ids.at(ids_begin + j, team.num_experts);
  }
  __device__ __forceinline__ A logit(int32_t id) const {
    return load_as<A>(logits, dtype, logits_begin + id);
  }
  // What an expert counts before the weights are normalised.
  __device__ __forceinline__ A share(int32_t id) const {
    if (id >= team.num_experts) return 0;
    return options.score_function == kSoftmaxTopk ? exponential(logit(id) - max)
                                                  : row.score(logit(id));
  }
  // Its weight before routed_scaling_factor.
  __device__ __forceinline__ A weight(int32_t id) const {
    return id < team.num_experts ? share(id) / total : A(0);
  }

  // Finds max and total; the whole warp calls it together.
  __device__ __forceinline__ void normalise() {
    total = 1;
    max = -kInfinity<A>;
    if (options.score_function == kSoftmaxTopk) {
      for (int j = team.lane; j < top_k; j += Team::kLanes)
        if (id(j) < team.num_experts) max = larger(max, logit(id(j)));
      max = team.max(max);
    } else if (!options.norm_topk_prob) {
      return;
    }
    A sum = 0;
    for (int j = team.lane; j < top_k; j += Team::kLanes) sum += share(id(j));
    total = team.sum(sum) + (options.score_function == kSoftmaxTopk ? A(0) : A(1e-20));
  }
};

}  // namespace moe_ext::cuda
