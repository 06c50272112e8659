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
// Teams, blocks and tokens are the forward's (topk_route.cu), and so are the two paths: rows in
// registers, and beyond 1,024 experts (float64: 512) rows in a workspace. A row is loaded, scored
// and weighed again rather than kept: reading the logits again costs what reading the scores
// would. No shared memory, no atomics: a lane alone adds to the experts it holds, choice after
// choice, so the bits are the same every time, also for an expert chosen twice. Any alignment.
//
// Bytes, which are the floor: the logits, ids and gradients once, dlogits once. Work: about
// 30 operations and an exponential a logit, and 2 a slot and choice to find a choice's owner.
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
  mean = sum_over_lanes<Team::kLanes>(mean) * row.inverse_score_sum;
#pragma unroll
  for (int slot = 0; slot < team.slots(); ++slot)
    gradient[slot] = (gradient[slot] - mean) * row.inverse_score_sum;
}

// What the chosen get from the weights' gradient.
template <class A, class Team>
struct ChosenGradient {
  const Chosen<A, Team>& chosen;
  const A* dweights;  // (T, K)
  A inner = 0;        // <g, v>

  __device__ __forceinline__ bool is_topk() const {
    return chosen.p.options.score_function == kSoftmaxTopk;
  }
  __device__ __forceinline__ A g(int j) const {
    return dweights[chosen.ids_begin + j] * static_cast<A>(chosen.p.options.scale);
  }

  // Finds `inner`; the whole warp calls it together.
  __device__ __forceinline__ void prepare() {
    if (!is_topk() && !chosen.p.options.norm_topk_prob) return;
    for (int j = chosen.team.lane; j < chosen.top_k; j += Team::kLanes) {
      const int32_t id = chosen.id(j);
      if (id < chosen.team.num_experts) inner += g(j) * chosen.weight(id);
    }
    inner = sum_over_lanes<Team::kLanes>(inner);
  }

  // For the score of choice j; under softmax_topk, for its logit.
  __device__ __forceinline__ A of(int j, int32_t id) const {
    const A d = g(j) - inner;
    if (is_topk()) return d * chosen.weight(id);
    return chosen.p.options.norm_topk_prob ? d / chosen.total : d;
  }

  // Lane j % kLanes knows choice j, another one may hold its expert: every choice is told to
  // the whole team, one after the other, and its owner adds.
  template <class Values>
  __device__ __forceinline__ void add_to(Values& gradient) const {
    const Team& team = chosen.team;
    const int E = team.num_experts, K = static_cast<int>(chosen.p.options.top_k);
    for (int chunk = 0; chunk < K; chunk += Team::kLanes) {
      const int j = chunk + team.lane;
      const int32_t mine = j < chosen.top_k ? chosen.id(j) : E;
      const A dmine = mine < E ? of(j, mine) : A(0);
      for (int i = 0; i < Team::kLanes && chunk + i < K; ++i) {
        const int32_t id = __shfl_sync(kFullWarp, mine, i, Team::kLanes);
        const A d = __shfl_sync(kFullWarp, dmine, i, Team::kLanes);
        if (id < E) team.add(gradient, id, d);
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
  inner = is_sigmoid ? A(0) : sum_over_lanes<Team::kLanes>(inner);
#pragma unroll
  for (int slot = 0; slot < team.slots(); ++slot) {
    const A s = score[slot];
    gradient[slot] = is_sigmoid ? s * (A(1) - s) * gradient[slot] : s * (gradient[slot] - inner);
  }
}

// The tokens of a team. `value` and `gradient` are for a row.
template <class A, class Team, class Values>
__device__ __forceinline__ void route_tokens_backward(const Team& team,
                                                      const TopkRouteBackward<A>& p, Values& value,
                                                      Values& gradient) {
  const RouteOptions& o = p.options;
  const int E = static_cast<int>(o.num_experts), K = static_cast<int>(o.top_k);
  const bool is_topk = o.score_function == kSoftmaxTopk, is_sigmoid = o.score_function == kSigmoid;
  const ExpertIds ids{p.experts, p.experts_are_int64};
  const int place = threadIdx.x / Team::kLanes;  // the team's, in the block
  const Tokens tokens(p);
  for (int64_t next = tokens.begin; next < tokens.end; next += kTeams<Team>) {  // see topk_route
    const int64_t t = next + place;
    const bool is_token = t < tokens.end;
    const bool present = is_token && !(p.padding && p.padding[t]);

    // Load and score, as the forward did.
    load_row<A>(team, p, t, present, value);
    const Row<A> row = score_row<A>(team, o.score_function, value);

    // The scores' gradient: from score_sums, and from the weights of the chosen.
    start_gradient(team, p.dscore_sums, row, value, gradient);
    const int32_t first = present && team.lane < K ? ids.at(t * K + team.lane, E) : E;
    Chosen<A, Team> chosen{team, p, row, t * E, ids, t * K, first, present ? K : 0};
    ChosenGradient<A, Team> of_chosen{chosen, p.dweights};
    if (p.dweights) {
      chosen.normalise();
      of_chosen.prepare();
    }
    if (p.dweights && !is_topk) of_chosen.add_to(gradient);

    // The logits': through the scores, from softmax_topk's weights, from logsumexp.
    through_scores<A>(team, is_sigmoid, value, gradient);
    if (p.dweights && is_topk) of_chosen.add_to(gradient);
    if (p.dlogsumexp) {
      const A dlogsumexp = present ? p.dlogsumexp[t] : A(0);
      if (is_sigmoid) load_row<A>(team, p, t, present, value);
#pragma unroll
      for (int slot = 0; slot < team.slots(); ++slot)
        gradient[slot] += (is_sigmoid ? row.softmax(value[slot]) : value[slot]) * dlogsumexp;
    }
    if (is_token) store_row<A>(team, p, p.dlogits, t, present, gradient);
  }
}

// ---- rows in registers ----------------------------------------------------------------

template <class A, int kLanes, int kPerLane>
__global__ void __launch_bounds__(kRouteThreads, 1)
    topk_route_backward_kernel(const TopkRouteBackward<A> p) {
  using Team = RegisterTeam<kLanes, kPerLane>;
  const Team team{static_cast<int>(threadIdx.x) % kLanes, static_cast<int>(p.options.num_experts)};
  typename Team::template Slots<A> value, gradient;
  route_tokens_backward(team, p, value, gradient);
}

template <class A, int kLanes, int kPerLane>
cudaError_t launch_rows(const TopkRouteBackward<A>& p, RegisterTeam<kLanes, kPerLane>,
                        cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(p.grid.blocks));
  return launch({blocks, dim3(kRouteThreads), 0, stream, "topk_route_backward"},
                topk_route_backward_kernel<A, kLanes, kPerLane>, p);
}

// ---- rows in the workspace --------------------------------------------------------------

template <class A>
__global__ void __launch_bounds__(kWarpSize, 1)
    topk_route_backward_long_kernel(const TopkRouteBackward<A> p) {
  const WorkspaceTeam team{static_cast<int>(threadIdx.x), static_cast<int>(p.options.num_experts)};
  const RouteWorkspace<A> own(p);
  auto value = team.slots_of(own.values), gradient = team.slots_of(own.gradients);
  route_tokens_backward(team, p, value, gradient);
}

template <class A>
cudaError_t launch_rows(const TopkRouteBackward<A>& p, WorkspaceTeam, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(p.grid.blocks));
  return launch({blocks, dim3(kWarpSize), 0, stream, "topk_route_backward_long"},
                topk_route_backward_long_kernel<A>, p);
}

}  // namespace

template <class A>
cudaError_t topk_route_backward(const TopkRouteBackward<A>& p, cudaStream_t stream) {
  if (p.grid.blocks == 0) return cudaSuccess;
  return with_team<A>(p.options.num_experts,
                      [&](auto team) { return launch_rows(p, team, stream); });
}

template cudaError_t topk_route_backward(const TopkRouteBackward<float>&, cudaStream_t);
template cudaError_t topk_route_backward(const TopkRouteBackward<double>&, cudaStream_t);

}  // namespace moe_ext::cuda
