// How topk_route and its backward go through the tokens: which team takes how many experts,
// which block takes which tokens, and where rows lie that are too long for registers.
#pragma once

#include "platform.cuh"
#include "route_row.cuh"
#include "topk_choice.cuh"
#include "topk_route.h"

namespace moe_ext::cuda {

constexpr int kRouteThreads = 256;

// A block's teams, and its threads. A team with long rows has a block of its own.
template <class Team>
constexpr int kTeams = Team::kInRegisters ? kRouteThreads / Team::kLanes : 1;
template <class Team>
constexpr int kTeamThreads = kTeams<Team> * Team::kLanes;

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

// The tokens of this block, as [begin, end).
struct Tokens {
  int64_t begin, end;
  __device__ __forceinline__ Tokens(const RouteGrid& grid, int64_t tokens)
      : begin(blockIdx.x * grid.tokens_per_block),
        end(begin + grid.tokens_per_block < tokens ? begin + grid.tokens_per_block : tokens) {}
};

// The long rows of this block's token. The keys are the forward's and the gradients the
// backward's, so they share a row.
template <class A>
struct RouteWorkspace {
  static constexpr int kRows = 4;
  A *values, *gradients;
  Key<A>*keys, *shared_row, *groups;
  __device__ __forceinline__ RouteWorkspace(void* workspace, int64_t row_size)
      : values(static_cast<A*>(workspace) + blockIdx.x * kRows * row_size),
        gradients(values + row_size),
        keys(reinterpret_cast<Key<A>*>(gradients)),
        shared_row(keys + row_size),
        groups(shared_row + row_size) {}
};

}  // namespace moe_ext::cuda
