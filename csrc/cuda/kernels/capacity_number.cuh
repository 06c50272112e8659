// How many of an expert's assignments stay, and where their rows begin: the passes `admit` and
// `number` of capacity_scatter, in one launch.
//
// A block has 8 experts, whose numbers are neighbours in memory, and 64 groups of threads: thread
// (expert, group) walks the group's share of the expert's cells or segments twice, first for the
// share's sum, then, knowing the sums of the shares before, for each number. The block that
// finishes last turns the experts' totals into expert_offsets. Grid: E / 8 blocks of 512 threads.
// Shared memory: 3 KiB, static.
#pragma once

#include "capacity_segments.cuh"

namespace moe_ext::cuda {

constexpr int kColumns = 8, kGroups = 64;  // experts and groups a block
constexpr int kNumberWarps = kColumns * kGroups / kWarpSize;
using Parts = int32_t[kGroups][kColumns];

// What a group walks of `count` cells or segments.
struct Share {
  int64_t begin, end, size;
};
__device__ __forceinline__ Share share_of(int64_t group, int64_t count) {
  const int64_t size = max((count + kGroups - 1) / kGroups, int64_t{1});
  return {min(group * size, count), min((group + 1) * size, count), size};
}

// The sum of `value` over this expert's lower groups; `total`: over all of them.
__device__ __forceinline__ int32_t sum_below(Parts& parts, int32_t value, int32_t& total) {
  __syncthreads();  // earlier reads of `parts` are done
  parts[threadIdx.y][threadIdx.x] = value;
  __syncthreads();
  const int mine = threadIdx.y;
  int32_t below = 0;
  total = 0;
  for (int group = 0; group < kGroups; ++group) {
    const int32_t part = parts[group][threadIdx.x];
    below += group < mine ? part : 0;
    total += part;
  }
  return below;
}

// Turns the counts in an expert's cells into how many of them find a place: cells come in the
// order of dropping, and every sequence has its own C places. `admitted` may be the cells
// themselves. Returns how many assignments there were.
__device__ __forceinline__ int32_t admit(const CapacityScatter& p, const int32_t* cells,
                                         int32_t* admitted, bool active, Parts& parts) {
  const int64_t num_experts = p.shape.num_experts;
  const int64_t of_sequence = p.shape.choices * p.shape.segments_per_sequence;
  const Share mine = share_of(threadIdx.y, active ? p.shape.cells : 0);

  int32_t since_start = 0, all = 0;  // of the sequence that the share ends in; of the share
  int64_t until_start = (of_sequence - mine.begin % of_sequence) % of_sequence;
  for (int64_t c = mine.begin; c < mine.end; ++c, --until_start) {
    if (until_start == 0) since_start = 0, until_start = of_sequence;
    const int32_t count = cells[c * num_experts];
    since_start += count;
    all += count;
  }
  int32_t total;
  sum_below(parts, all, total);
  __syncthreads();
  parts[threadIdx.y][threadIdx.x] = since_start;
  __syncthreads();

  // What came before the share in its sequence, from the share on that the sequence begins in.
  int32_t seen = 0;
  const int64_t start = mine.begin - mine.begin % of_sequence;
  for (int64_t group = start / mine.size; group < threadIdx.y; ++group) {
    seen += parts[group][threadIdx.x];
  }
  until_start = (of_sequence - mine.begin % of_sequence) % of_sequence;
  for (int64_t c = mine.begin; c < mine.end; ++c, --until_start) {
    if (until_start == 0) seen = 0, until_start = of_sequence;
    const int32_t count = cells[c * num_experts];
    admitted[c * num_experts] = min(count, max(p.capacity - seen, 0));
    seen += count;
  }
  __syncthreads();  // another share's cells are read next
  return total;
}

// How many assignments of a segment stay, over all its choices' cells.
__device__ __forceinline__ int32_t sum_of_cells(const ScatterShape& s, const int32_t* cells,
                                                int64_t segment) {
  const int64_t sequence = segment / s.segments_per_sequence;
  const int64_t place = segment - sequence * s.segments_per_sequence;
  int32_t sum = 0;
  for (int64_t j = 0; j < s.choices; ++j) {
    sum += cells[((sequence * s.choices + j) * s.segments_per_sequence + place) * s.num_experts];
  }
  return sum;
}

// Numbers what the expert has: first[segment] = how many there are in the segments before, of
// count_of(segment) each. Returns how many there are in all. `count_of` may read `first` itself.
template <class Count>
__device__ __forceinline__ int32_t number(const ScatterShape& s, int32_t* first, bool active,
                                          Parts& parts, const Count& count_of) {
  const Share mine = share_of(threadIdx.y, active ? s.segments : 0);
  int32_t sum = 0, total;
  for (int64_t i = mine.begin; i < mine.end; ++i) sum += count_of(i);
  int32_t next = sum_below(parts, sum, total);
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    const int32_t count = count_of(i);
    first[i * s.num_experts] = next;
    next += count;
  }
  return total;
}

// Whether this block is the last to come here. It sees what all the others wrote before: a
// fence passes on what its thread has seen, which by the barriers is the block's.
__device__ __forceinline__ bool is_last_block(int32_t* ticket) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    __threadfence();
    is_last = atomicAdd(ticket, 1) == static_cast<int32_t>(gridDim.x) - 1;
    __threadfence();
  }
  __syncthreads();
  return is_last;
}

// From counts[e] at offsets[1 + e] to offsets, by one block.
__device__ __forceinline__ void accumulate(int32_t* offsets, int64_t num_experts) {
  __shared__ int32_t warp_sums[kNumberWarps];
  const int thread = threadIdx.y * kColumns + threadIdx.x;
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  int32_t before = 0;
  for (int64_t begin = 0; begin < num_experts; begin += kNumberWarps * kWarpSize) {
    const int64_t e = begin + thread;
    int32_t sum = sum_through_lane(lane, e < num_experts ? offsets[1 + e] : 0);
    if (lane == kWarpSize - 1) warp_sums[warp] = sum;
    __syncthreads();
    int32_t total = 0;
    for (int w = 0; w < kNumberWarps; ++w) {
      if (w == warp) sum += total;
      total += warp_sums[w];
    }
    if (e < num_experts) offsets[1 + e] = before + sum;
    before += total;
    __syncthreads();  // the next sums take the place of these
  }
  if (thread == 0) offsets[0] = 0;
}

static __global__ void __launch_bounds__(kColumns* kGroups) number_kernel(const CapacityScatter p) {
  __shared__ Parts parts;
  const ScatterShape& s = p.shape;
  const int64_t expert = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  const bool active = expert < s.num_experts;
  const bool by_weight = s.order == DropOrder::kProbs, limited = s.order != DropOrder::kNone;
  int32_t* const cells = p.cells + expert;
  int32_t* const first_row = p.first_row + expert;

  int32_t all = 0;
  if (limited) all = admit(p, cells, by_weight ? first_row : cells, active, parts);
  const int32_t kept = number(s, first_row, active, parts, [&](int64_t segment) {
    return by_weight ? first_row[segment * s.num_experts] : sum_of_cells(s, cells, segment);
  });
  // Which of them stay is still open, so the list has them all: the cells become its numbers.
  if (by_weight) {
    number(s, cells, active, parts,
           [&](int64_t segment) { return cells[segment * s.num_experts]; });
  }
  if (active && threadIdx.y == 0) {
    p.expert_counts[expert] = limited ? all : kept;
    p.expert_offsets[1 + expert] = kept;
    if (by_weight) p.all_offsets[1 + expert] = all;
  }
  if (!is_last_block(p.ticket)) return;
  accumulate(p.expert_offsets, s.num_experts);
  if (by_weight) accumulate(p.all_offsets, s.num_experts);
}

}  // namespace moe_ext::cuda
