// topk_route: from a token's logits to its K experts and their weights, together with all
// that the losses need.
//
//   s = softmax(logits) or sigmoid(logits)     (E of a token)
//   experts = the K largest of s + bias, best first, a tie to the lower id
//   weights = scale * s[experts] (/ their sum), or scale * softmax(logits[experts])
//   score_sums = sum over tokens of s (sigmoid: of s / sum s);  counts;  logsumexp
//
// Up to 1,024 experts (float64: 512). A team of 4 lanes (E <= 16), 16 (E <= 64) or a whole warp
// holds a token's row in registers, 4 to 32 experts a lane (route_row.cuh). It loads the logits,
// turns them into scores, chooses in K rounds that each take the team's best (topk_choice.cuh;
// nothing is sorted), and weighs what it chose: route_tokens below. A block of 256 threads has 64,
// 16 or 8 teams, each of which takes 1 to 32 tokens, one after the other. Shared memory: 8 bytes
// an expert (float64: 12) for the block's sums and counts, at most 8 KB; with groups also a row of
// keys and one of groups a team, 6 to 57 KB in all. Any alignment; 16-byte loads where rows have
// it.
//
// Beyond. No registers hold the row, so it lies in a workspace in global memory, and so do its
// keys, its groups and the block's counts; a block is one warp, which takes 1 to 256 tokens
// through the same route_tokens. No shared memory. Every round of the choice reads the row again,
// mostly from the L1: this path is right, not fast.
//
// The sums. A lane adds up its experts over its tokens, in registers or, beyond, in the block's
// row of block_sums; the teams of a block add up in order in shared memory, and a second launch
// adds the blocks in float64. Which token is added where depends on T and E alone, and no float
// is added by an atomic: the same bits every time. Counts are integers, so their atomics may come
// in any order.
//
// Bytes, which are the floor: the logits once, 8 T K of weights and ids, 4 T of logsumexp.
// On top 16 E a block, written and read again: half of the logits' float32 in a block of 8
// tokens, 1/64 in one of 256. Work: about 20 operations and an exponential a logit, and 3
// a slot and round for the choice, which is the larger part from K = 8 on.
#include <algorithm>
#include <type_traits>

#include "platform.cuh"
#include "route_grid.cuh"
#include "route_row.cuh"
#include "topk_choice.cuh"
#include "topk_route.h"

namespace moe_ext::cuda {
namespace {

// ---- a token ------------------------------------------------------------------------

// What a team's lanes write for each other, and for the block.
template <class A>
struct TeamMemory {
  int32_t* counts;             // the block's, (E)
  Key<A>*shared_row, *groups;  // the team's: see keep_best_groups
};

// What the values, scores or logits, are worth in the choice. Slots past E and the experts of
// groups that were not chosen are ineligible.
template <class A, class Team, class Values, class Keys>
__device__ __forceinline__ void make_keys(const Team& team, const TopkRoute<A>& p, Values& value,
                                          Keys& key, const TeamMemory<A>& memory) {
  const RouteOptions& o = p.options;
#pragma unroll
  for (int slot = 0; slot < team.slots(); ++slot) {
    const int e = team.expert(slot);
    const A bias = p.selection_bias && e < team.num_experts ? p.selection_bias[e] : A(0);
    key[slot] = e < team.num_experts ? key_of(value[slot] + bias) : kIneligible<A>;
  }
  // Groups of one expert need none of this: the best of the best groups are the best.
  if (o.topk_group < o.n_group && o.n_group < o.num_experts)
    keep_best_groups<A>(team, o, key, memory.shared_row, memory.groups);
}

// Choice `chunk` + lane of token t; E where there is none, and for a token that is not present.
// The whole warp calls it together.
template <class A, class Team, class Keys>
__device__ __forceinline__ int32_t next_choice(const Team& team, const TopkRoute<A>& p, int64_t t,
                                               int chunk, bool present, Keys& key) {
  const int K = static_cast<int>(p.options.top_k), j = chunk + team.lane;
  int32_t mine = team.num_experts;
  if (p.options.replay) {
    const ExpertIds replayed{p.replayed, p.replayed_is_int64};
    if (present && j < K) mine = replayed.at(t * K + j, team.num_experts);
    return mine;
  }
  for (int round = chunk; round < K && round < chunk + Team::kLanes; ++round) {
    const int32_t id = take_best<A>(team, key);  // all lanes get it, one keeps it
    if (round == j && present) mine = id;
  }
  return mine;
}

// The tokens of a team, each from its row of logits to its weights. `value` and `key` are for a
// row, `sums` adds up the scores of all rows.
template <class A, class Team, class Values, class Keys>
__device__ __forceinline__ void route_tokens(const Team& team, const TopkRoute<A>& p,
                                             const TeamMemory<A>& memory, Values& value, Keys& key,
                                             Values& sums) {
  const RouteOptions& o = p.options;
  const int E = static_cast<int>(o.num_experts), K = static_cast<int>(o.top_k);
  const int place = threadIdx.x / Team::kLanes;  // the team's, in the block
  const Tokens tokens(p);
  // All teams go round equally often, the last time perhaps without a token of their own:
  // what is a whole warp's, all lanes call.
  for (int64_t next = tokens.begin; next < tokens.end; next += kTeams<Team>) {
    const int64_t t = next + place;
    const bool is_token = t < tokens.end;
    const bool present = is_token && !(p.padding && p.padding[t]);

    // Load: the lane's values are logits ...
    load_row<A>(team, p, t, present, value);
    if (!o.replay && o.by_logits) make_keys(team, p, value, key, memory);

    // Score: ... and now scores.
    const Row<A> row = score_row<A>(team, o.score_function, value);
    if (present) {
#pragma unroll
      for (int slot = 0; slot < team.slots(); ++slot)
        sums[slot] += value[slot] * row.inverse_score_sum;
    }

    // Choose: lane j % kLanes gets choice j.
    if (!o.replay && !o.by_logits) make_keys(team, p, value, key, memory);
    int32_t first = E;  // the lane's first choice
    for (int chunk = 0; chunk < K; chunk += Team::kLanes) {
      const int j = chunk + team.lane;
      const int32_t mine = next_choice(team, p, t, chunk, present, key);
      if (chunk == 0) first = mine;
      if (is_token && j < K) p.experts[t * K + j] = mine;
      if (mine < E) atomicAdd(memory.counts + mine, 1);
    }

    // Weigh.
    Chosen<A, Team> chosen{team, p, row, t * E, {p.experts, false}, t * K, first, present ? K : 0};
    chosen.normalise();
    if (!is_token) continue;
    for (int j = team.lane; j < K; j += Team::kLanes) {
      p.weights[t * K + j] = present ? chosen.weight(chosen.id(j)) * static_cast<A>(o.scale) : A(0);
    }
    if (team.lane == 0) p.logsumexp[t] = present ? row.logsumexp : A(0);
  }
}

// ---- rows in registers ----------------------------------------------------------------

template <class A, class Team>
struct RouteSmem {
  A sums[Team::kExperts];
  int32_t counts[Team::kExperts];
  // With groups only:
  Key<A> rows[kTeams<Team>][spread(Team::kExperts)];
  Key<A> groups[kTeams<Team>][Team::kExperts / 2];
};

// The block's sums and counts go from registers and shared memory to where the second launch
// finds them. The teams of a warp add up as a butterfly, then warp adds to warp, in turn.
template <class A, class Team, class Sums>
__device__ __forceinline__ void write_block_sums(const Team& team, const TopkRoute<A>& p,
                                                 RouteSmem<A, Team>& smem, Sums& sums) {
  const int thread = threadIdx.x;
#pragma unroll
  for (int slot = 0; slot < Team::kPerLane; ++slot) {
#pragma unroll
    for (int distance = Team::kLanes; distance < kWarpSize; distance *= 2)
      sums[slot] += __shfl_xor_sync(kFullWarp, sums[slot], distance);
  }
  for (int warp = 0; warp < kRouteThreads / kWarpSize; ++warp) {
    if (thread / kWarpSize == warp && thread % kWarpSize < Team::kLanes) {
#pragma unroll
      for (int slot = 0; slot < Team::kPerLane; ++slot) {
        A& sum = smem.sums[team.expert(slot)];
        sum = warp == 0 ? sums[slot] : sum + sums[slot];
      }
    }
    __syncthreads();  // the last one: also for the counts
  }
  const int64_t row = blockIdx.x * p.grid.row_size;
  for (int e = thread; e < team.num_experts; e += kRouteThreads) {
    p.block_sums[row + e] = smem.sums[e];
    p.block_counts[row + e] = smem.counts[e];
  }
}

template <class A, int kLanes, int kPerLane>
__global__ void __launch_bounds__(kRouteThreads, 1) topk_route_kernel(const TopkRoute<A> p) {
  using Team = RegisterTeam<kLanes, kPerLane>;
  const int thread = threadIdx.x, place = thread / kLanes;
  const Team team{thread % kLanes, static_cast<int>(p.options.num_experts)};
  auto& smem = dyn_smem<RouteSmem<A, Team>>();
  for (int e = thread; e < team.num_experts; e += kRouteThreads) smem.counts[e] = 0;
  typename Team::template Slots<A> value, sums;
  typename Team::template Slots<Key<A>> key;
#pragma unroll
  for (int slot = 0; slot < kPerLane; ++slot) sums[slot] = 0;
  __syncthreads();  // any team may count any expert

  const TeamMemory<A> memory{smem.counts, smem.rows[place], smem.groups[place]};
  route_tokens(team, p, memory, value, key, sums);
  write_block_sums(team, p, smem, sums);
}

template <class A, int kLanes, int kPerLane>
cudaError_t launch_rows(const TopkRoute<A>& p, RegisterTeam<kLanes, kPerLane>,
                        cudaStream_t stream) {
  using Smem = RouteSmem<A, RegisterTeam<kLanes, kPerLane>>;
  const bool groups = !p.options.replay && p.options.topk_group < p.options.n_group;
  const size_t bytes = groups ? sizeof(Smem) : offsetof(Smem, rows);
  const dim3 blocks(static_cast<unsigned>(p.grid.blocks));
  return launch({blocks, dim3(kRouteThreads), bytes, stream, "topk_route"},
                topk_route_kernel<A, kLanes, kPerLane>, p);
}

// ---- rows in the workspace --------------------------------------------------------------

template <class A>
__global__ void __launch_bounds__(kWarpSize, 1) topk_route_long_kernel(const TopkRoute<A> p) {
  const WorkspaceTeam team{static_cast<int>(threadIdx.x), static_cast<int>(p.options.num_experts)};
  const RouteWorkspace<A> own(p);
  auto value = team.slots_of(own.values);
  auto key = team.slots_of(own.keys);
  auto sums = team.slots_of(p.block_sums + blockIdx.x * p.grid.row_size);
  int32_t* const counts = p.block_counts + blockIdx.x * p.grid.row_size;
  for (int slot = 0; slot < team.slots(); ++slot) sums[slot] = 0;
  for (int e = team.lane; e < team.num_experts; e += kWarpSize) counts[e] = 0;
  __syncwarp();  // any lane may count any expert

  const TeamMemory<A> memory{counts, own.shared_row, own.groups};
  route_tokens(team, p, memory, value, key, sums);
}

template <class A>
cudaError_t launch_rows(const TopkRoute<A>& p, WorkspaceTeam, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(p.grid.blocks));
  return launch({blocks, dim3(kWarpSize), 0, stream, "topk_route_long"}, topk_route_long_kernel<A>,
                p);
}

// ---- the blocks' sums ---------------------------------------------------------------------

// Adds up the blocks: 8 experts a block of threads, and a warp an expert in the end.
constexpr int kTotalsExperts = kRouteThreads / kWarpSize;

template <class A>
__global__ void __launch_bounds__(kRouteThreads) route_totals_kernel(const TopkRoute<A> p) {
  __shared__ double sums[kWarpSize][kTotalsExperts];
  __shared__ int32_t counts[kWarpSize][kTotalsExperts];
  const int column = threadIdx.x % kTotalsExperts, row = threadIdx.x / kTotalsExperts;
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kTotalsExperts + column;
  double sum = 0;
  int32_t count = 0;
  if (e < p.options.num_experts) {
#pragma unroll 4
    for (int64_t block = row; block < p.grid.blocks; block += kWarpSize) {
      sum += p.block_sums[block * p.grid.row_size + e];
      count += p.block_counts[block * p.grid.row_size + e];
    }
  }
  sums[row][column] = sum;
  counts[row][column] = count;
  __syncthreads();
  const int lane = threadIdx.x % kWarpSize, own = threadIdx.x / kWarpSize;
  sum = sum_over_lanes<kWarpSize>(sums[lane][own]);
  count = __reduce_add_sync(kFullWarp, counts[lane][own]);
  const int64_t mine = static_cast<int64_t>(blockIdx.x) * kTotalsExperts + own;
  if (lane == 0 && mine < p.options.num_experts) {
    p.score_sums[mine] = static_cast<A>(sum);
    p.counts[mine] = count;
  }
}

}  // namespace

// ---- launches -----------------------------------------------------------------------------

template <class A>
RouteGrid topk_route_grid(int64_t tokens, int64_t num_experts) {
  constexpr int64_t kBlocks = 1024;  // fill any GPU
  RouteGrid grid{};
  // Room for a slot of every lane, and for a row of keys as keep_best_groups lays it out.
  const auto rounded = (num_experts + kWarpSize - 1) / kWarpSize * kWarpSize;
  grid.row_size = spread(rounded);
  with_team<A>(num_experts, [&](auto team) {
    using Team = decltype(team);
    const int64_t rounds =
        std::clamp<int64_t>(tokens / (kTeams<Team> * kBlocks), 1, kMostTokens<Team>);
    grid.tokens_per_block = kTeams<Team> * rounds;
    grid.blocks = (tokens + grid.tokens_per_block - 1) / grid.tokens_per_block;
    if (std::is_same_v<Team, WorkspaceTeam>)
      grid.workspace_bytes = grid.blocks * RouteWorkspace<A>::kRows * grid.row_size * sizeof(A);
  });
  return grid;
}

template <class A>
cudaError_t topk_route(const TopkRoute<A>& p, cudaStream_t stream) {
  if (p.grid.blocks > 0) {
    const cudaError_t error = with_team<A>(p.options.num_experts,
                                           [&](auto team) { return launch_rows(p, team, stream); });
    if (error != cudaSuccess) return error;
  }
  const auto blocks = (p.options.num_experts + kTotalsExperts - 1) / kTotalsExperts;
  return launch(
      {dim3(static_cast<unsigned>(blocks)), dim3(kRouteThreads), 0, stream, "route_totals"},
      route_totals_kernel<A>, p);
}

template RouteGrid topk_route_grid<float>(int64_t, int64_t);
template RouteGrid topk_route_grid<double>(int64_t, int64_t);
template cudaError_t topk_route(const TopkRoute<float>&, cudaStream_t);
template cudaError_t topk_route(const TopkRoute<double>&, cudaStream_t);

}  // namespace moe_ext::cuda
