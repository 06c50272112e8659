// topk_route's backward: from the gradients of the weights, of score_sums and of logsumexp,
// each of which may be missing, to the logits' gradient.
//
// With v the weights before the factor c = routed_scaling_factor and g = c dw, the chosen
// scores get
//   normalised: (g - <g, v>) / sum of the chosen scores      otherwise: g
// and every score gets (G - <G, s> / S) / S from score_sums' gradient G, S being the sum of
// the scores. A softmax passes ds on as s (ds - <ds, s>), a sigmoid as s (1 - s) ds;
// softmax_topk's weights reach the chosen logits directly, as v (g - <g, v>). logsumexp
// adds softmax(logits) times its gradient. Sentinels and padding get nothing, exactly 0.
//
// Teams, blocks and tokens are the forward's (topk_route.cu), whose rows are recomputed
// rather than kept: reading the logits again costs what reading the scores would. No shared
// memory, no atomics: a lane alone adds to the experts it holds, choice after choice, so the
// bits are the same every time, also for an expert chosen twice. Any alignment.
//
// Bytes, which are the floor: the logits, ids and gradients once, dlogits once. Work: about
// 30 operations and an exponential a logit, and 2 a slot and choice to find a choice's owner.
#include <algorithm>

#include "platform.cuh"
#include "route_grid.cuh"
#include "route_row.cuh"
#include "topk_route.h"

namespace moe_ext::cuda {
namespace {

// What the scores get from score_sums' gradient; zeros without one.
template <class A, class Team, class Values>
__device__ __forceinline__ void start_gradient(const Team& team, const A* dscore_sums,
                                               const Row<A>& row, Values& score, Values& gradient) {
  A mean = 0;
#pragma unroll
  for (int slot = 0; slot < team.slots(); ++slot) {
    const int e = team.expert(slot);
    gradient[slot] = dscore_sums && e < team.num_experts ? dscore_sums[e] : A(0);
    mean += gradient[slot] * score[slot];
  }
  if (!dscore_sums) return;
  mean = team.sum(mean) * row.score_share;
#pragma unroll
  for (int slot = 0; slot < team.slots(); ++slot)
    gradient[slot] = (gradient[slot] - mean) * row.score_share;
}

// What the chosen get from the weights' gradient.
template <class A, class Team>
struct ChosenGradient {
  const Chosen<A, Team>& chosen;
  const A* dweights;  // (T, K)
  A inner = 0;        // <g, v>

  __device__ __forceinline__ bool is_topk() const {
    return chosen.options.score_function == kSoftmaxTopk;
  }
  __device__ __forceinline__ A g(int j) const {
    return dweights[chosen.ids_begin + j] * static_cast<A>(chosen.options.scale);
  }

  // Finds `inner`; the whole warp calls it together.
  __device__ __forceinline__ void prepare() {
    if (!is_topk() && !chosen.options.norm_topk_prob) return;
    for (int j = chosen.team.lane; j < chosen.top_k; j += Team::kLanes) {
      const int32_t id = chosen.id(j);
      if (id < chosen.team.num_experts) inner += g(j) * chosen.weight(id);
    }
    inner = chosen.team.sum(inner);
  }

  // For the score of choice j; under softmax_topk, for its logit.
  __device__ __forceinline__ A of(int j, int32_t id) const {
    const A d = g(j) - inner;
    if (is_topk()) return d * chosen.weight(id);
    return chosen.options.norm_topk_prob ? d / chosen.total : d;
  }

  // Lane j % kLanes knows choice j, another one may hold its expert: every choice is told to
  // the whole team, one after the other, and its owner adds.
  template <class Values>
  __device__ __forceinline__ void add_to(Values& gradient) const {
    const Team& team = chosen.team;
    const int E = team.num_experts, K = static_cast<int>(chosen.options.top_k);
    for (int chunk = 0; chunk < K; chunk += Team::kLanes) {
      const int j = chunk + team.lane;
      const int32_t mine = j < chosen.top_k ? chosen.id(j) : E;
      const A dmine = mine < E ? of(j, mine) : A(0);
      for (int i = 0; i < Team::kLanes && chunk + i < K; ++i) {
        const int32_t id = __shfl_sync(kFullWarp, mine, i, Team::kLanes);
        const A d = __shfl_sync(kFullWarp, dmine, i, Team::kLanes);
        if (id >= E) continue;
        if constexpr (Team::kInRegisters) {  // which have no addresses: each slot is asked
#pragma unroll
          for (int slot = 0; slot < Team::kPerLane; ++slot)
            if (team.expert(slot) == id) gradient[slot] += d;
        } else if (id % Team::kLanes == team.lane) {
          gradient[id / Team::kLanes] += d;
        }
      }
    }
  }
};

// Turns the scores' gradient into the logits'.
template <class A, class Team, class Values>
__device__ __forceinline__ void through_scores(const Team& team, bool is_sigmoid, Values& score,
                                               Values& gradient) {
  A inner = 0;  // <ds, s>
#pragma unroll
  for (int slot = 0; slot < team.slots(); ++slot) inner += gradient[slot] * score[slot];
  inner = is_sigmoid ? A(0) : team.sum(inner);
#pragma unroll
  for (int slot = 0; slot < team.slots(); ++slot) {
    const A s = score[slot];
    gradient[slot] = is_sigmoid ? s * (A(1) - s) * gradient[slot] : s * (gradient[slot] - inner);
  }
}

template <class A, int kLanes, int kPerLane>
__global__ void __launch_bounds__(kTeamThreads<Team<kLanes, kPerLane>>, 1)
    topk_route_backward_kernel(const TopkRouteBackward<A> p) {
  using MyTeam = Team<kLanes, kPerLane>;
  const RouteOptions& o = p.options;
  const int E = static_cast<int>(o.num_experts), K = static_cast<int>(o.top_k);
  const int place = threadIdx.x / kLanes;
  const MyTeam team{static_cast<int>(threadIdx.x) % kLanes, E};
  const bool is_topk = o.score_function == kSoftmaxTopk, is_sigmoid = o.score_function == kSigmoid;
  const ExpertIds ids{p.experts, p.experts_are_int64};
  A *value_row = nullptr, *gradient_row = nullptr;
  if constexpr (!MyTeam::kInRegisters) {
    const RouteWorkspace<A> own(p.workspace, p.grid.row_size);
    value_row = own.values;
    gradient_row = own.gradients;
  }
  Slots<A, kPerLane> value(value_row, team.lane), gradient(gradient_row, team.lane);

  const Tokens tokens(p.grid, p.tokens);
  for (int64_t next = tokens.begin; next < tokens.end; next += kTeams<MyTeam>) {  // see topk_route
    const int64_t t = next + place;
    const bool is_token = t < tokens.end;
    const bool present = is_token && !(p.padding && p.padding[t]);
    read_row<A>(team, p.logits, p.dtype, t * E, present, value);
    const Row<A> row = score_row<A>(team, o.score_function, value);
    start_gradient(team, p.dscore_sums, row, value, gradient);

    const int32_t first = present && team.lane < K ? ids.at(t * K + team.lane, E) : E;
    Chosen<A, MyTeam> chosen{team,  o,   row,   p.logits, p.dtype,
                             t * E, ids, t * K, first,    present ? K : 0};
    ChosenGradient<A, MyTeam> of_chosen{chosen, p.dweights};
    if (p.dweights) {
      chosen.normalise();
      of_chosen.prepare();
    }
    if (p.dweights && !is_topk) of_chosen.add_to(gradient);
    through_scores<A>(team, is_sigmoid, value, gradient);
    if (p.dweights && is_topk) of_chosen.add_to(gradient);

    if (p.dlogsumexp) {
      const A dlogsumexp = present ? p.dlogsumexp[t] : A(0);
      if (is_sigmoid) read_row<A>(team, p.logits, p.dtype, t * E, present, value);
#pragma unroll
      for (int slot = 0; slot < team.slots(); ++slot)
        gradient[slot] += (is_sigmoid ? row.softmax(value[slot]) : value[slot]) * dlogsumexp;
    }
    if (is_token) write_row<A>(team, p.dlogits, p.dtype, t * E, present, gradient);
  }
}

}  // namespace

template <class A>
cudaError_t topk_route_backward(const TopkRouteBackward<A>& p, cudaStream_t stream) {
  if (p.grid.blocks == 0) return cudaSuccess;
  return with_team<A>(p.options.num_experts, [&](auto team) {
    using MyTeam = decltype(team);
    const dim3 blocks(static_cast<unsigned>(p.grid.blocks)), threads(kTeamThreads<MyTeam>);
    return launch({blocks, threads, 0, stream, "topk_route_backward"},
                  topk_route_backward_kernel<A, MyTeam::kLanes, MyTeam::kPerLane>, p);
  });
}

template cudaError_t topk_route_backward(const TopkRouteBackward<float>&, cudaStream_t);
template cudaError_t topk_route_backward(const TopkRouteBackward<double>&, cudaStream_t);

}  // namespace moe_ext::cuda
