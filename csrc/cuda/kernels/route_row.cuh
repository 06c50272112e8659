// A token's row of logits in the hands of a team of lanes: how it is held and loaded, what its
// scores are, what its chosen experts weigh. Shared by topk_route and its backward, which
// recomputes the row instead of keeping it; between score and weigh comes topk_choice.cuh.
//
// A team is 4, 16 or 32 neighbouring lanes of a warp. Each lane has as many experts as the
// others, in slots: value[slot] belongs to team.expert(slot), and slots past E hold -inf. What
// follows is written once, over slots; where these are, the two teams say:
//
//   RegisterTeam    up to 1,024 experts (float64: 512): in registers
//   WorkspaceTeam   beyond: in global memory, which the L1 mostly answers for
//
// Everything a team computes depends on its own token alone, in an order fixed by E: sums go
// over a lane's slots, then over the lanes as a butterfly, which gives all of them the same bits.
#pragma once

#include "dtypes.cuh"
#include "platform.cuh"
#include "scores.cuh"
#include "topk_route.h"

namespace moe_ext::cuda {

// ---- hold ---------------------------------------------------------------------------

// A lane has kPerLane experts, four neighbours at a time, so that a row comes in 16-byte loads:
//
//   lane      0          1          ..   kLanes - 1        0                  ..
//   experts   0 1 2 3    4 5 6 7    ..   .. 4 kLanes - 1   4 kLanes ..        ..
//   slots     0 1 2 3    0 1 2 3         0 1 2 3           4 5 6 7
//
// Registers have no addresses: loops over slots are unrolled, and only then is a slot's
// number known to the compiler.
template <int kLanes_, int kPerLane_>
struct RegisterTeam {
  static constexpr int kLanes = kLanes_, kPerLane = kPerLane_, kExperts = kLanes * kPerLane;
  static_assert(kPerLane % 4 == 0);

  template <class X>
  struct Slots {
    X x[kPerLane];
    __device__ __forceinline__ X& operator[](int slot) { return x[slot]; }
  };

  int lane, num_experts;

  __device__ __forceinline__ int slots() const { return kPerLane; }
  __device__ __forceinline__ int expert(int slot) const {
    return slot / 4 * (4 * kLanes) + lane * 4 + slot % 4;
  }

  template <class T>
  __device__ __forceinline__ void load(Slots<Compute<T>>& value, const T* row, bool present) const {
    constexpr int kFours = kPerLane / 4;
    Neighbours<T, 4> held[kFours];  // all of the lane's loads are under way before one is used
    with_packs(in_packs<T, 4>(row, 0, num_experts), [&](auto whole) {
#pragma unroll
      for (int i = 0; i < kFours; ++i) {
        const int e = expert(4 * i);
        held[i].load(whole, row + e, present ? num_experts - e : 0);
      }
    });
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      Compute<T> four[4];
      held[i].values(four);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int slot = 4 * i + j;
        value[slot] = expert(slot) < num_experts ? four[j] : -kInfinity<Compute<T>>;
      }
    }
  }

  template <class T>
  __device__ __forceinline__ void store(T* row, Slots<Compute<T>>& value, bool present) const {
#pragma unroll
    for (int slot = 0; slot < kPerLane; slot += 4) {
      const int e = expert(slot);
      Compute<T> four[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) four[i] = present ? value[slot + i] : Compute<T>(0);
      store_neighbours<T, 4>(row + e, four, num_experts - e);
    }
  }

  // value += x at the slot of expert `id`, in the one lane that has it.
  template <class A>
  __device__ __forceinline__ void add(Slots<A>& value, int32_t id, A x) const {
#pragma unroll
    for (int slot = 0; slot < kPerLane; ++slot)
      if (expert(slot) == id) value[slot] += x;
  }
};

// Expert e is lane e % 32's, in slot e / 32, so that a warp reads 32 neighbours at once.
struct WorkspaceTeam {
  static constexpr int kLanes = kWarpSize;

  template <class X>
  struct Slots {
    X* x;
    __device__ __forceinline__ X& operator[](int slot) const { return x[slot * kWarpSize]; }
  };
  // The lane's slots of a row in memory.
  template <class X>
  __device__ __forceinline__ Slots<X> slots_of(X* row) const {
    return {row + lane};
  }

  int lane, num_experts;

  __device__ __forceinline__ int slots() const { return (num_experts + kWarpSize - 1) / kWarpSize; }
  __device__ __forceinline__ int expert(int slot) const { return slot * kWarpSize + lane; }

  template <class T>
  __device__ __forceinline__ void load(Slots<Compute<T>>& value, const T* row, bool present) const {
    using A = Compute<T>;
    for (int slot = 0; slot < slots(); ++slot) {
      const int e = expert(slot);
      value[slot] = e >= num_experts ? -kInfinity<A> : present ? to_compute(row[e]) : A(0);
    }
  }

  template <class T>
  __device__ __forceinline__ void store(T* row, Slots<Compute<T>>& value, bool present) const {
    for (int slot = 0; slot < slots(); ++slot) {
      const int e = expert(slot);
      if (e < num_experts) round_to(row[e], present ? value[slot] : Compute<T>(0));
    }
  }

  template <class A>
  __device__ __forceinline__ void add(Slots<A>& value, int32_t id, A x) const {
    if (id % kWarpSize == lane) value[id / kWarpSize] += x;
  }
};

// ---- load, and store ---------------------------------------------------------------------------

// Calls f(T()) with the type of logits that are computed in A.
template <class A, class F>
__device__ __forceinline__ void with_logits_type(Dtype dtype, const F& f) {
  if constexpr (sizeof(A) == 8) {
    f(double());
  } else if (dtype == Dtype::f32) {
    f(float());
  } else if (dtype == Dtype::bf16) {
    f(bf16());
  } else {
    f(f16());
  }
}

// value = token t's logits. Of a token that is not present nothing is read: it may hold
// anything, NaN too.
template <class A, class Team, class Values>
__device__ __forceinline__ void load_row(const Team& team, const RouteRows& p, int64_t t,
                                         bool present, Values& value) {
  with_logits_type<A>(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    team.template load<T>(value, static_cast<const T*>(p.logits) + t * team.num_experts, present);
  });
}

// out's row t = value, or zeros.
template <class A, class Team, class Values>
__device__ __forceinline__ void store_row(const Team& team, const RouteRows& p, void* out,
                                          int64_t t, bool present, Values& value) {
  with_logits_type<A>(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    team.template store<T>(static_cast<T*>(out) + t * team.num_experts, value, present);
  });
}

// ---- score --------------------------------------------------------------------------

// What a row's logits amount to.
template <class A>
struct Row {
  bool is_sigmoid;
  A max;                // of the logits; NaN if one of them is
  A inverse_exp_sum;    // 1 / sum of exp(logit - max)
  A inverse_score_sum;  // 1 / sum of the scores
  A logsumexp;

  __device__ __forceinline__ A softmax(A logit) const {
    return exponential(logit - max) * inverse_exp_sum;
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
  row.max = max = max_over_lanes<Team::kLanes>(max);
  A exp_sum = 0, score_sum = 0;
#pragma unroll
  for (int slot = 0; slot < team.slots(); ++slot) {
    const A e = exponential(value[slot] - max);
    exp_sum += e;
    if (row.is_sigmoid) score_sum += value[slot] = logistic(value[slot]);
    if (!row.is_sigmoid) value[slot] = e;
  }
  exp_sum = sum_over_lanes<Team::kLanes>(exp_sum);
  row.inverse_exp_sum = A(1) / exp_sum;
  row.inverse_score_sum = 1;
  if (row.is_sigmoid) {
    row.inverse_score_sum = A(1) / sum_over_lanes<Team::kLanes>(score_sum);
  } else {
#pragma unroll
    for (int slot = 0; slot < team.slots(); ++slot) value[slot] *= row.inverse_exp_sum;
  }
  const bool is_infinite = max == kInfinity<A> || max == -kInfinity<A>;
  row.logsumexp = is_infinite ? max : max + logarithm(exp_sum);
  return row;
}

// ---- weigh --------------------------------------------------------------------------

// A token's K choices and their weights; lane j % kLanes has choice j. Its expert's score may
// lie in another lane's registers, so it reads the expert's logit again and scores that. A lane
// keeps its first choice; the others, which exist where K is larger than the team, it reads
// again, too.
template <class A, class Team>
struct Chosen {
  const Team& team;
  const RouteRows& p;
  const Row<A>& row;
  int64_t logits_begin;   // of the token's row
  ExpertIds ids;          // (T, K)
  int64_t ids_begin;      // of the token's row
  int32_t first;          // the lane's first choice
  int top_k;              // K, or 0 for a token that is not present
  A max = -kInfinity<A>;  // of the chosen logits, for softmax_topk
  A total = 1;            // what the weights are divided by

  __device__ __forceinline__ int32_t id(int j) const {
    return j == team.lane ? first : ids.at(ids_begin + j, team.num_experts);
  }
  __device__ __forceinline__ A logit(int32_t id) const {
    return load_as<A>(p.logits, p.dtype, logits_begin + id);
  }
  // What an expert counts before the weights are normalised.
  __device__ __forceinline__ A share(int32_t id) const {
    if (id >= team.num_experts) return 0;
    return p.options.score_function == kSoftmaxTopk ? exponential(logit(id) - max)
                                                    : row.score(logit(id));
  }
  // Its weight before routed_scaling_factor; `total` is 0 where all of a token's are sentinels.
  __device__ __forceinline__ A weight(int32_t id) const {
    return id < team.num_experts ? share(id) / total : A(0);
  }

  // Finds max and total; the whole warp calls it together.
  __device__ __forceinline__ void normalise() {
    const bool is_topk = p.options.score_function == kSoftmaxTopk;
    if (is_topk) {
      for (int j = team.lane; j < top_k; j += Team::kLanes)
        if (id(j) < team.num_experts) max = larger(max, logit(id(j)));
      max = max_over_lanes<Team::kLanes>(max);
    } else if (!p.options.norm_topk_prob) {
      return;
    }
    A sum = 0;
    for (int j = team.lane; j < top_k; j += Team::kLanes) sum += share(id(j));
    total = sum_over_lanes<Team::kLanes>(sum) + (is_topk ? A(0) : A(1e-20));
  }
};

}  // namespace moe_ext::cuda
