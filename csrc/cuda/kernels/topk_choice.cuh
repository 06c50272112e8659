// The choice of experts without sorting: scores become integers that order alike, and each
// of K rounds takes a team's largest, then its lowest id.
//
// A round costs a lane 3 operations a slot and two reductions over the team; a warp that
// takes 8 of 256 experts is done in about 300 instructions, where sorting 256 keys would
// need 36 exchanges of every key, most of them between lanes. Integers, because sm_80
// reduces those over a warp in one instruction, and because a key can then say what no
// number does: "not eligible" lies below -inf.
#pragma once

#include <cstring>
#include <type_traits>

#include "../../routing.h"
#include "platform.cuh"
#include "scores.cuh"

namespace moe_ext::cuda {

// ---- keys ---------------------------------------------------------------------------

template <class A>
using Key = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
template <class A>
constexpr Key<A> kLargestKey = std::numeric_limits<Key<A>>::max();
template <class A>
constexpr Key<A> kIneligible = std::numeric_limits<Key<A>>::min();

template <class To, class From>
__device__ __forceinline__ To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Orders as the numbers do; NaN as -inf, -0 as 0. All are above kIneligible.
template <class A>
__device__ __forceinline__ Key<A> key_of(A x) {
  const Key<A> bits = bits_as<Key<A>>((x == x ? x : -kInfinity<A>)+A(0));
  return bits ^ (bits >> (8 * sizeof(A) - 1) & kLargestKey<A>);
}
// The number of a key; kIneligible's is a NaN.
template <class A>
__device__ __forceinline__ A number_of(Key<A> key) {
  return bits_as<A>(key ^ (key >> (8 * sizeof(A) - 1) & kLargestKey<A>));
}

// ---- rounds -------------------------------------------------------------------------

// The best of the team's keys, a tie to the lowest id, which is then no longer eligible.
template <class A, class Team, class Keys>
__device__ __forceinline__ int32_t take_best(const Team& team, Keys& key) {
  Key<A> best = kIneligible<A>;
  int32_t id = kLargestId;
#pragma unroll
  for (int slot = 0; slot < team.slots(); ++slot) {
    if (key[slot] > best) {  // a lane's ids rise, so the first of equals is its lowest
      best = key[slot];
      id = team.expert(slot);
    }
  }
  if constexpr (Team::kLanes == kWarpSize && sizeof(A) == 4) {
    const int32_t largest = __reduce_max_sync(kFullWarp, best);
    id = __reduce_min_sync(kFullWarp, best == largest ? id : kLargestId);
  } else {
#pragma unroll
    for (int distance = Team::kLanes / 2; distance > 0; distance /= 2) {
      const Key<A> other = __shfl_xor_sync(kFullWarp, best, distance);
      const int32_t other_id = __shfl_xor_sync(kFullWarp, id, distance);
      if (other > best || (other == best && other_id < id)) {
        best = other;
        id = other_id;
      }
    }
  }
#pragma unroll
  for (int slot = 0; slot < team.slots(); ++slot) {
    if (team.expert(slot) == id) key[slot] = kIneligible<A>;
  }
  return id;
}

// ---- groups -------------------------------------------------------------------------

// Where expert e's key lies in a row that the whole team reads: a gap every 32, so that
// lanes that go through groups of 32 side by side do not meet in one bank.
template <class Index>
__host__ __device__ constexpr Index spread(Index e) {
  return e + e / 32;
}

// Makes the experts of all groups but the best topk_group ineligible; groups have two experts
// or more. A lane scores whole groups, whose experts other lanes hold: hence the row of all
// keys. `row` (spread(E)) and `groups` (E / 2) are the team's own.
template <class A, class Team, class Keys>
__device__ __forceinline__ void keep_best_groups(const Team& team, const RouteOptions& o, Keys& key,
                                                 Key<A>* row, Key<A>* groups) {
  const int E = team.num_experts, n_group = static_cast<int>(o.n_group), size = E / n_group;
#pragma unroll
  for (int slot = 0; slot < team.slots(); ++slot) {
    if (team.expert(slot) < E) row[spread(team.expert(slot))] = key[slot];
  }
  __syncwarp();
  for (int g = team.lane; g < n_group; g += Team::kLanes) {
    Key<A> first = kIneligible<A>, second = kIneligible<A>;
    for (int e = g * size; e < (g + 1) * size; ++e) {
      const Key<A> x = row[spread(e)];
      second = x > first ? first : x > second ? x : second;
      first = x > first ? x : first;
    }
    if (o.group_score == kTop2Sum) first = key_of(number_of<A>(first) + number_of<A>(second));
    groups[g] = first;
  }
  __syncwarp();
  // A group is kept if fewer than topk_group others are better. The keys in the row have
  // served; it takes the verdicts.
  for (int g = team.lane; g < n_group; g += Team::kLanes) {
    int better = 0;
    for (int other = 0; other < n_group; ++other)
      better += groups[other] > groups[g] || (groups[other] == groups[g] && other < g);
    row[g] = better < o.topk_group;
  }
  __syncwarp();
#pragma unroll
  for (int slot = 0; slot < team.slots(); ++slot) {
    const int e = team.expert(slot);
    if (e < E && !row[e / size]) key[slot] = kIneligible<A>;
  }
  __syncwarp();  // the team's next token overwrites both
}

}  // namespace moe_ext::cuda
