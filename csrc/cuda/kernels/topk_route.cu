// topk_route: from a token's logits to its K experts and their weights, together with all
// that the losses need.
//
//   s = softmax(logits) or sigmoid(logits)     (E of a token)
//   experts = the K largest of s + bias, best first, a tie to the lower id
//   weights = scale * s[experts] (/ their sum), or scale * softmax(logits[experts])
//   score_sums = sum over tokens of s (sigmoid: of s / sum s);  counts;  logsumexp
//
// One team of lanes a token (route_row.cuh): 4 lanes for E <= 16, a warp from E = 65 on,
// with 4 to 32 scores a lane in registers; a block of 256 threads takes a few tokens a
// team. Longer rows run through the same code with their rows in a workspace.
//
// The choice: scores become integers that order alike (NaN as -inf), and each of K rounds
// takes the team's largest, then its lowest id. Nothing is sorted.
//
// The sums: a lane adds up its experts over its tokens in registers, the teams of a block
// add up in order in shared memory, and a second launch adds the blocks in float64. Which
// token is added where depends on T and E alone, and no float is added by an atomic: the
// same bits every time. Counts are integers, so their atomics may come in any order.
//
// Shared memory: 8 bytes an expert (float64: 12); with groups a row of keys a team more,
// 1.5 KB to 48 KB a block. Any alignment; 16-byte loads where rows have it.
// Bytes: logits once, weights and experts (T K 8), logsumexp, and 8 E a block of tokens.
// Floor: the same without the last, which is 1/4 to 1/32 of the logits' float32.
#include <algorithm>

#include "platform.cuh"
#include "route_row.cuh"
#include "topk_choice.cuh"
#include "topk_route.h"

namespace moe_ext::cuda {
namespace {

constexpr int kThreads = 256;

template <class A, class Team>
struct RouteSmem {
  static constexpr int kTeams = kThreads / Team::kLanes;
  static constexpr int kExperts = Team::kLanes * Team::kPerLane;
  A sums[kExperts];
  int32_t counts[kExperts];
  // With groups only:
  Key<A> rows[kTeams][spread(kExperts)];
  Key<A> groups[kTeams][kExperts / 2];
};

// The rows of one block where they are too long for registers and shared memory.
template <class A>
struct RouteWorkspace {
  static constexpr int kRows = 4;
  A *values, *gradients;
  Key<A>*keys, *shared_row, *groups;
  __device__ __forceinline__ RouteWorkspace(void* workspace, int64_t row_size)
      : values(static_cast<A*>(workspace) + blockIdx.x * kRows * row_size),
        gradients(values + row_size),
        keys(reinterpret_cast<Key<A>*>(gradients)),  // one is the backward's, one the forward's
        shared_row(keys + row_size),
        groups(shared_row + row_size) {}
};

// The tokens of this block, as [begin, end).
struct Tokens {
  int64_t begin, end;
  __device__ __forceinline__ Tokens(const RouteGrid& grid, int64_t tokens)
      : begin(blockIdx.x * grid.tokens_per_block),
        end(begin + grid.tokens_per_block < tokens ? begin + grid.tokens_per_block : tokens) {}
};

// ---- forward ------------------------------------------------------------------------

template <class A, int kLanes, int kPerLane>
__global__ void __launch_bounds__(kPerLane > 0 ? kThreads : kWarpSize, 1)
    topk_route_kernel(const TopkRoute<A> p) {
  using MyTeam = Team<kLanes, kPerLane>;
  constexpr int kTeams = MyTeam::kInRegisters ? kThreads / kLanes : 1;
  const RouteOptions& o = p.options;
  const int E = static_cast<int>(o.num_experts), K = static_cast<int>(o.top_k);
  const int thread = threadIdx.x, place = thread / kLanes;  // the team's, in the block
  const MyTeam team{thread % kLanes, E};

  A *value_row = nullptr, *block_sums = p.block_sums + blockIdx.x * p.grid.row_size;
  int32_t* block_counts = p.block_counts + blockIdx.x * p.grid.row_size;
  Key<A>*key_row = nullptr, *shared_row, *groups;
  int32_t* counts;
  if constexpr (MyTeam::kInRegisters) {
    auto& smem = dyn_smem<RouteSmem<A, MyTeam>>();
    counts = smem.counts;
    shared_row = smem.rows[place];
    groups = smem.groups[place];
  } else {
    const RouteWorkspace<A> own(p.workspace, p.grid.row_size);
    counts = block_counts;
    value_row = own.values;
    key_row = own.keys;
    shared_row = own.shared_row;
    groups = own.groups;
  }
  Slots<A, kPerLane> value(value_row, team.lane), sums(block_sums, team.lane);
  Slots<Key<A>, kPerLane> key(key_row, team.lane);
  for (int e = thread; e < E; e += blockDim.x) counts[e] = 0;
#pragma unroll
  for (int slot = 0; slot < team.slots(); ++slot) sums[slot] = 0;
  __syncthreads();

  const Tokens tokens(p.grid, p.tokens);
  // All teams go round equally often, the last time perhaps without a token of their own:
  // what is a whole warp's, all lanes call.
  for (int64_t next = tokens.begin; next < tokens.end; next += kTeams) {
    const int64_t t = next + place;
    const bool is_token = t < tokens.end;
    const bool present = is_token && !(p.padding && p.padding[t]);
    read_row<A>(team, p.logits, p.dtype, t * E, present, value);
    const Row<A> row = score_row<A>(team, o.score_function, value);
    if (present) {
#pragma unroll
      for (int slot = 0; slot < team.slots(); ++slot) sums[slot] += value[slot] * row.score_share;
    }

    if (!o.replay) {
#pragma unroll
      for (int slot = 0; slot < team.slots(); ++slot) {
        const int e = team.expert(slot);
        const A bias = p.selection_bias && e < E ? p.selection_bias[e] : A(0);
        key[slot] = e < E ? key_of(value[slot] + bias) : kIneligible<A>;
      }
      if (o.topk_group < o.n_group && o.n_group < E)
        keep_best_groups<A>(team, o, key, shared_row, groups);
    }
    int32_t first = E;  // the lane's first choice; a token that is not present has none
    for (int chunk = 0; chunk < K; chunk += kLanes) {
      const int j = chunk + team.lane;
      int32_t mine = E;
      if (o.replay) {
        const ExpertIds replayed{p.replayed, p.replayed_is_int64};
        if (present && j < K) mine = replayed.at(t * K + j, E);
      } else {
        for (int round = chunk; round < K && round < chunk + kLanes; ++round) {
          const int32_t id = take_best<A>(team, key);
          if (round == j && present) mine = id;
        }
      }
      if (chunk == 0) first = mine;
      if (is_token && j < K) p.experts[t * K + j] = mine;
      if (mine < E) atomicAdd(counts + mine, 1);
    }

    Chosen<A, MyTeam> chosen{
        team, o, row, p.logits, p.dtype, t * E, {p.experts, false}, t * K, first, present ? K : 0};
    chosen.normalise();
    if (is_token) {
      for (int j = team.lane; j < K; j += kLanes) {
        p.weights[t * K + j] =
            present ? chosen.weight(chosen.id(j)) * static_cast<A>(o.scale) : A(0);
      }
      if (team.lane == 0) p.logsumexp[t] = present ? row.logsumexp : A(0);
    }
  }

  if constexpr (MyTeam::kInRegisters) {  // else the sums are where they belong
    auto& smem = dyn_smem<RouteSmem<A, MyTeam>>();
#pragma unroll
    for (int slot = 0; slot < kPerLane; ++slot) {
#pragma unroll
      for (int distance = kLanes; distance < kWarpSize; distance *= 2)
        sums[slot] += __shfl_xor_sync(kFullWarp, sums[slot], distance);
    }
    for (int warp = 0; warp < kThreads / kWarpSize; ++warp) {
      if (thread / kWarpSize == warp && thread % kWarpSize < kLanes) {
#pragma unroll
        for (int slot = 0; slot < kPerLane; ++slot) {
          A& sum = smem.sums[team.expert(slot)];
          sum = warp == 0 ? sums[slot] : sum + sums[slot];
        }
      }
      __syncthreads();
    }
    for (int e = thread; e < E; e += kThreads) {
      block_sums[e] = smem.sums[e];
      block_counts[e] = counts[e];
    }
  }
}

// Adds up the blocks: 8 experts a block of threads, and a warp an expert in the end.
constexpr int kTotalsExperts = kThreads / kWarpSize;

template <class A>
__global__ void __launch_bounds__(kThreads) route_totals_kernel(const TopkRoute<A> p) {
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

// ---- backward -----------------------------------------------------------------------

// With v the weights before the factor c and g = c dw, the chosen scores get
//   normalised: (g - <g, v>) / sum of the chosen scores      otherwise: g
// and every score gets (G - <G, s> / S) / S from score_sums, S being the sum of the
// scores. A softmax passes ds on as s (ds - <ds, s>), a sigmoid as s (1 - s) ds;
// softmax_topk's weights reach the chosen logits directly, as v (g - <g, v>). logsumexp
// adds softmax(logits) times its gradient.
template <class A, int kLanes, int kPerLane>
__global__ void __launch_bounds__(kPerLane > 0 ? kThreads : kWarpSize, 1)
    topk_route_backward_kernel(const TopkRouteBackward<A> p) {
  using MyTeam = Team<kLanes, kPerLane>;
  constexpr int kTeams = MyTeam::kInRegisters ? kThreads / kLanes : 1;
  const RouteOptions& o = p.options;
  const int E = static_cast<int>(o.num_experts), K = static_cast<int>(o.top_k);
  const MyTeam team{static_cast<int>(threadIdx.x) % kLanes, E};
  const int place = threadIdx.x / kLanes;
  const bool is_topk = o.score_function == kSoftmaxTopk, is_sigmoid = o.score_function == kSigmoid;

  A *value_row = nullptr, *gradient_row = nullptr;
  if constexpr (!MyTeam::kInRegisters) {
    const RouteWorkspace<A> own(p.workspace, p.grid.row_size);
    value_row = own.values;
    gradient_row = own.gradients;
  }
  Slots<A, kPerLane> value(value_row, team.lane), gradient(gradient_row, team.lane);

  const Tokens tokens(p.grid, p.tokens);
  for (int64_t next = tokens.begin; next < tokens.end; next += kTeams) {
    const int64_t t = next + place;
    const bool is_token = t < tokens.end;
    const bool present = is_token && !(p.padding && p.padding[t]);
    read_row<A>(team, p.logits, p.dtype, t * E, present, value);
    const Row<A> row = score_row<A>(team, o.score_function, value);

    A mean = 0;
#pragma unroll
    for (int slot = 0; slot < team.slots(); ++slot) {
      const int e = team.expert(slot);
      gradient[slot] = p.dscore_sums && e < E ? p.dscore_sums[e] : A(0);
      mean += gradient[slot] * value[slot];
    }
    if (p.dscore_sums) {
      mean = team.sum(mean) * row.score_share;
#pragma unroll
      for (int slot = 0; slot < team.slots(); ++slot)
        gradient[slot] = (gradient[slot] - mean) * row.score_share;
    }

    const ExpertIds ids{p.experts, p.experts_are_int64};
    const int32_t first = present && team.lane < K ? ids.at(t * K + team.lane, E) : E;
    Chosen<A, MyTeam> chosen{team,  o,   row,   p.logits, p.dtype,
                             t * E, ids, t * K, first,    present ? K : 0};
    A inner = 0;  // <g, v>
    const auto dweight = [&](int j) { return p.dweights[t * K + j] * static_cast<A>(o.scale); };
    if (p.dweights) {
      chosen.normalise();
      if (is_topk || o.norm_topk_prob) {
        for (int j = team.lane; j < chosen.top_k; j += kLanes) {
          const int32_t id = chosen.id(j);
          if (id < E) inner += dweight(j) * chosen.weight(id);
        }
        inner = team.sum(inner);
      }
    }
    // Hands the gradients of the chosen to the lanes that own them, choice after choice, so
    // that an expert chosen twice gets them in order.
    const auto add_chosen = [&] {
      for (int chunk = 0; chunk < K; chunk += kLanes) {
        const int j = chunk + team.lane;
        int32_t mine = j < chosen.top_k ? chosen.id(j) : E;
        A dmine = 0;
        if (mine < E) {
          dmine = dweight(j) - inner;
          if (is_topk) dmine *= chosen.weight(mine);
          if (!is_topk && o.norm_topk_prob) dmine /= chosen.total;
        }
        for (int i = 0; i < kLanes && chunk + i < K; ++i) {
          const int32_t id = __shfl_sync(kFullWarp, mine, i, kLanes);
          const A d = __shfl_sync(kFullWarp, dmine, i, kLanes);
          if constexpr (MyTeam::kInRegisters) {
#pragma unroll
            for (int slot = 0; slot < kPerLane; ++slot)
              if (team.expert(slot) == id && id < E) gradient[slot] += d;
          } else if (id < E && id % kLanes == team.lane) {
            gradient[id / kLanes] += d;
          }
        }
      }
    };
    if (p.dweights && !is_topk) add_chosen();

    A dot = 0;  // <ds, s>
#pragma unroll
    for (int slot = 0; slot < team.slots(); ++slot) dot += gradient[slot] * value[slot];
    if (!is_sigmoid) dot = team.sum(dot);
#pragma unroll
    for (int slot = 0; slot < team.slots(); ++slot) {
      const A s = value[slot];
      gradient[slot] = is_sigmoid ? s * (A(1) - s) * gradient[slot] : s * (gradient[slot] - dot);
    }
    if (p.dweights && is_topk) add_chosen();

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

// ---- launches -----------------------------------------------------------------------

// Calls launch(Team) with the smallest team that holds E experts in registers: float64
// rows of more than 512 would not fit beside their sums.
template <class A, class Launch>
cudaError_t with_team(int64_t num_experts, const Launch& launch) {
  if (num_experts <= 16) return launch(Team<4, 4>());
  if (num_experts <= 64) return launch(Team<16, 4>());
  if (num_experts <= 128) return launch(Team<32, 4>());
  if (num_experts <= 256) return launch(Team<32, 8>());
  if (num_experts <= 512) return launch(Team<32, 16>());
  if constexpr (sizeof(A) == 4)
    if (num_experts <= 1024) return launch(Team<32, 32>());
  return launch(Team<32, 0>());
}

}  // namespace

template <class A>
RouteGrid topk_route_grid(int64_t tokens, int64_t num_experts) {
  RouteGrid grid{};
  const auto rounded = (num_experts + kWarpSize - 1) / kWarpSize * kWarpSize;
  grid.row_size = spread(rounded);
  with_team<A>(num_experts, [&](auto team) {
    constexpr int64_t kBlocks = 1024;  // fill any GPU
    if constexpr (decltype(team)::kInRegisters) {
      // A team's own sum is over at most 32 tokens.
      const int64_t teams = kThreads / team.kLanes;
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
        return launch({blocks, dim3(kThreads), bytes, stream, "topk_route"}, kernel, p);
      } else {
        return launch({blocks, dim3(kWarpSize), 0, stream, "topk_route"}, kernel, p);
      }
    });
    if (error != cudaSuccess) return error;
  }
  const auto blocks = (p.options.num_experts + kTotalsExperts - 1) / kTotalsExperts;
  return launch({dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, "route_totals"},
                route_totals_kernel<A>, p);
}

template <class A>
cudaError_t topk_route_backward(const TopkRouteBackward<A>& p, cudaStream_t stream) {
  if (p.grid.blocks == 0) return cudaSuccess;
  return with_team<A>(p.options.num_experts, [&](auto team) {
    using MyTeam = decltype(team);
    const dim3 blocks(static_cast<unsigned>(p.grid.blocks));
    const dim3 threads(MyTeam::kInRegisters ? kThreads : kWarpSize);
    return launch({blocks, threads, 0, stream, "topk_route_backward"},
                  topk_route_backward_kernel<A, MyTeam::kLanes, MyTeam::kPerLane>, p);
  });
}

template RouteGrid topk_route_grid<float>(int64_t, int64_t);
template RouteGrid topk_route_grid<double>(int64_t, int64_t);
template cudaError_t topk_route(const TopkRoute<float>&, cudaStream_t);
template cudaError_t topk_route(const TopkRoute<double>&, cudaStream_t);
template cudaError_t topk_route_backward(const TopkRouteBackward<float>&, cudaStream_t);
template cudaError_t topk_route_backward(const TopkRouteBackward<double>&, cudaStream_t);

}  // namespace moe_ext::cuda
