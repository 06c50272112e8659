// How topk_route and its backward go through the tokens: which team takes how many experts,
// which block takes which tokens, and where the rows lie that are too long for registers.
#pragma once

#include "platform.cuh"
#include "route_row.cuh"
#include "topk_choice.cuh"
#include "topk_route.h"

namespace moe_ext::cuda {

// Calls f(team) with the smallest team that holds E experts in registers: float64 rows of more
// than 512 would not fit beside their sums.
template <class A, class F>
auto with_team(int64_t num_experts, const F& f) {
  if (num_experts <= 16) return f(RegisterTeam<4, 4>());
  if (num_experts <= 64) return f(RegisterTeam<16, 4>());
  if (num_experts <= 128) return f(RegisterTeam<32, 4>());
  if (num_experts <= 256) return f(RegisterTeam<32, 8>());
  if (num_experts <= 512) return f(RegisterTeam<32, 16>());
  if constexpr (sizeof(A) == 4)
    if (num_experts <= 1024) return f(RegisterTeam<32, 32>());
  return f(WorkspaceTeam());
}

// A block's threads, its teams, and how many tokens a team takes at most, one after the other.
// A team with long rows has a block of its own.
constexpr int kRouteThreads = 256;
template <class Team>
constexpr int kTeams = kRouteThreads / Team::kLanes;
template <>
inline constexpr int kTeams<WorkspaceTeam> = 1;
template <class Team>
constexpr int kMostTokens = 32;
template <>
inline constexpr int kMostTokens<WorkspaceTeam> = 256;

// The tokens of this block, as [begin, end).
struct Tokens {
  int64_t begin, end;
  __device__ __forceinline__ explicit Tokens(const RouteRows& p)
      : begin(blockIdx.x * p.grid.tokens_per_block),
        end(begin + p.grid.tokens_per_block < p.tokens ? begin + p.grid.tokens_per_block
                                                       : p.tokens) {}
};

// The rows of this block in the workspace. The keys are the forward's and the gradients the
// backward's, so they share a row.
template <class A>
struct RouteWorkspace {
  static constexpr int kRows = 4;
  A *values, *gradients;
  Key<A>*keys, *shared_row, *groups;
  __device__ __forceinline__ explicit RouteWorkspace(const RouteRows& p)
      : values(static_cast<A*>(p.workspace) + blockIdx.x * kRows * p.grid.row_size),
        gradients(values + p.grid.row_size),
        keys(reinterpret_cast<Key<A>*>(gradients)),
        shared_row(keys + p.grid.row_size),
        groups(shared_row + p.grid.row_size) {}
};

}  // namespace moe_ext::cuda
