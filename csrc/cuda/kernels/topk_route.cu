// topk_route: from a token's logits to its K experts and their weights, together with all
// that the losses need.
//
//   s = softmax(logits) or sigmoid(logits)     (E of a token)
//   experts = the K largest of s + bias, best first, a tie to the lower id
//   weights = scale * s[experts] (/ their sum), or scale * softmax(logits[experts])
//   score_sums = sum over tokens of s (sigmoid: of s / sum s);  counts;  logsumexp
//
// One team of lanes a token (route_row.cuh): 4 lanes for E <= 16, a warp from E = 65 on,
// with 4 to 32 scores a lane in registers. A block of 256 threads has 8 to 64 teams, each
// of which takes 1 to 32 tokens, one after the other. Longer rows run through the same code
// with their rows in a workspace and one warp a block.
//
// The choice (topk_choice.cuh): scores become integers that order alike, and each of K
// rounds takes the team's largest, then its lowest id. Nothing is sorted.
//
// The sums: a lane adds up its experts over its tokens in registers, the teams of a block
// add up in order in shared memory, and a second launch adds the blocks in float64. Which
// token is added where depends on T and E alone, and no float is added by an atomic: the
// same bits every time. Counts are integers, so their atomics may come in any order.
//
// Shared memory: 8 bytes an expert (float64: 12), at most 8 KB; with groups also a row of
// keys and one of groups a team, 6 to 57 KB in all. Any alignment; 16-byte loads where rows
// have it.
//
// Bytes, which are the floor: the logits once, 8 T K of weights and ids, 4 T of logsumexp.
// On top 16 E a block, written and read again: half of the logits' float32 in a block of 8
// tokens, 1/64 in one of 256. Work: about 20 operations and an exponential a logit, and 3
// a slot and round for the choice, which is the larger part from K = 8 on.
#include <algorithm>

#include "platform.cuh"
#include "route_grid.cuh"
#include "route_row.cuh"
#include "topk_choice.cuh"
#include "topk_route.h"

namespace moe_ext::cuda {
namespace {

// ---- where a block keeps what outlives a token, and what a team's lanes read of each other --

template <class A, class Team>
struct RouteSmem {
  static constexpr int kExperts = Team::kLanes * Team::kPerLane;
  A sums[kExperts];
  int32_t counts[kExperts];
  // With groups only:
  Key<A> rows[kTeams<Team>][spread(kExperts)];
  Key<A> groups[kTeams<Team>][kExperts / 2];
};

template <class A, class Team>
struct RouteMemory {
  int32_t* counts;
  A *block_sums, *values;
  Key<A>*keys, *shared_row, *groups;

  __device__ __forceinline__ RouteMemory(const TopkRoute<A>& p, int place)
      : block_sums(p.block_sums + blockIdx.x * p.grid.row_size) {
    if constexpr (Team::kInRegisters) {
      auto& smem = dyn_smem<RouteSmem<A, Team>>();
      counts = smem.counts;
      values = nullptr;  // in registers, as are the keys
      keys = nullptr;
      shared_row = smem.rows[place];
      groups = smem.groups[place];
    } else {
      const RouteWorkspace<A> own(p.workspace, p.grid.row_size);
      counts = p.block_counts + blockIdx.x * p.grid.row_size;
      values = own.values;
      keys = own.keys;
      shared_row = own.shared_row;
      groups = own.groups;
    }
  }
};

// ---- a token ------------------------------------------------------------------------

// What the scores are worth in the choice. Slots past E and the experts of groups that were
// not chosen are ineligible.
template <class A, class Team, class Values, class Keys>
__device__ __forceinline__ void make_keys(const Team& team, const TopkRoute<A>& p, Values& score,
                                          Keys& key, const RouteMemory<A, Team>& memory) {
  const RouteOptions& o = p.options;
#pragma unroll
  for (int slot = 0; slot < team.slots(); ++slot) {
    const int e = team.expert(slot);
    const A bias = p.selection_bias && e < team.num_experts ? p.selection_bias[e] : A(0);
    key[slot] = e < team.num_experts ? key_of(score[slot] + bias) : kIneligible<A>;
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

// ---- the sums -----------------------------------------------------------------------

// The block's sums and counts go from registers and shared memory to where the second launch
// finds them. The teams of a warp add up as a butterfly, then warp adds to warp, in turn.
template <class A, class Team, class Sums>
__device__ __forceinline__ void write_block_sums(const Team& team, const TopkRoute<A>& p,
                                                 Sums& sums) {
  auto& smem = dyn_smem<RouteSmem<A, Team>>();
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
  sum = sums[lane][own];
  count = __reduce_add_sync(kFullWarp, counts[lane][own]);
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
    sum += __shfl_xor_sync(kFullWarp, sum, distance);
  const int64_t mine = static_cast<int64_t>(blockIdx.x) * kTotalsExperts + own;
  if (lane == 0 && mine < p.options.num_experts) {
    p.score_sums[mine] = static_cast<A>(sum);
    p.counts[mine] = count;
  }
}

// ---- the kernel ---------------------------------------------------------------------

template <class A, int kLanes, int kPerLane>
__global__ void __launch_bounds__(kTeamThreads<Team<kLanes, kPerLane>>, 1)
    topk_route_kernel(const TopkRoute<A> p) {
  using MyTeam = Team<kLanes, kPerLane>;
  const RouteOptions& o = p.options;
  const int E = static_cast<int>(o.num_experts), K = static_cast<int>(o.top_k);
  const int thread = threadIdx.x, place = thread / kLanes;  // the team's, in the block
  const MyTeam team{thread % kLanes, E};
  const RouteMemory<A, MyTeam> memory(p, place);
  Slots<A, kPerLane> value(memory.values, team.lane), sums(memory.block_sums, team.lane);
  Slots<Key<A>, kPerLane> key(memory.keys, team.lane);
  for (int e = thread; e < E; e += kTeamThreads<MyTeam>) memory.counts[e] = 0;
#pragma unroll
  for (int slot = 0; slot < team.slots(); ++slot) sums[slot] = 0;
  __syncthreads();  // any team may count any expert

  const Tokens tokens(p.grid, p.tokens);
  // All teams go round equally often, the last time perhaps without a token of their own:
  // what is a whole warp's, all lanes call.
  for (int64_t next = tokens.begin; next < tokens.end; next += kTeams<MyTeam>) {
    const int64_t t = next + place;
    const bool is_token = t < tokens.end;
    const bool present = is_token && !(p.padding && p.padding[t]);
    read_row<A>(team, p.logits, p.dtype, t * E, present, value);
    if (!o.replay && o.by_logits) make_keys(team, p, value, key, memory);
    const Row<A> row = score_row<A>(team, o.score_function, value);
    if (present) {
#pragma unroll
      for (int slot = 0; slot < team.slots(); ++slot) sums[slot] += value[slot] * row.score_share;
    }

    if (!o.replay && !o.by_logits) make_keys(team, p, value, key, memory);
    int32_t first = E;  // the lane's first choice
    for (int chunk = 0; chunk < K; chunk += kLanes) {
      const int j = chunk + team.lane;
      const int32_t mine = next_choice(team, p, t, chunk, present, key);
      if (chunk == 0) first = mine;
      if (is_token && j < K) p.experts[t * K + j] = mine;
      if (mine < E) atomicAdd(memory.counts + mine, 1);
    }

    Chosen<A, MyTeam> chosen{
        team, o, row, p.logits, p.dtype, t * E, {p.experts, false}, t * K, first, present ? K : 0};
    chosen.normalise();
    if (!is_token) continue;
    for (int j = team.lane; j < K; j += kLanes) {
      p.weights[t * K + j] = present ? chosen.weight(chosen.id(j)) * static_cast<A>(o.scale) : A(0);
    }
    if (team.lane == 0) p.logsumexp[t] = present ? row.logsumexp : A(0);
  }
  // Long rows have summed and counted where it belongs.
  if constexpr (MyTeam::kInRegisters) write_block_sums(team, p, sums);
}

}  // namespace

template <class A>
RouteGrid topk_route_grid(int64_t tokens, int64_t num_experts) {
  RouteGrid grid{};
  // Room for a slot of every lane, and for a row of keys as keep_best_groups lays it out.
  const auto rounded = (num_experts + kWarpSize - 1) / kWarpSize * kWarpSize;
  grid.row_size = spread(rounded);
  with_team<A>(num_experts, [&](auto team) {
    constexpr int64_t kBlocks = 1024;  // fill any GPU
    if constexpr (decltype(team)::kInRegisters) {
      // A team's own sum is over at most 32 tokens.
      const int64_t teams = kTeams<decltype(team)>;
      const int64_t rounds = std::clamp<int64_t>(tokens / (teams * kBlocks), 1, 32);
      grid.tokens_per_block = teams * rounds;
    } else {
      grid.tokens_per_block = std::clamp<int64_t>(tokens / kBlocks, 1, 256);
    }
    grid.blocks = (tokens + grid.tokens_per_block - 1) / grid.tokens_per_block;
    if constexpr (!decltype(team)::kInRegisters)
      grid.workspace_bytes = grid.blocks * RouteWorkspace<A>::kRows * grid.row_size * sizeof(A);
    return cudaSuccess;
  });
  return grid;
}

template <class A>
cudaError_t topk_route(const TopkRoute<A>& p, cudaStream_t stream) {
  if (p.grid.blocks > 0) {
    const cudaError_t error = with_team<A>(p.options.num_experts, [&](auto team) {
      using MyTeam = decltype(team);
      const dim3 blocks(static_cast<unsigned>(p.grid.blocks));
      const auto kernel = topk_route_kernel<A, MyTeam::kLanes, MyTeam::kPerLane>;
      if constexpr (MyTeam::kInRegisters) {
        using Smem = RouteSmem<A, MyTeam>;
        const bool groups = !p.options.replay && p.options.topk_group < p.options.n_group;
        const size_t bytes = groups ? sizeof(Smem) : offsetof(Smem, rows);
        return launch({blocks, dim3(kRouteThreads), bytes, stream, "topk_route"}, kernel, p);
      } else {
        return launch({blocks, dim3(kWarpSize), 0, stream, "topk_route"}, kernel, p);
      }
    });
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
