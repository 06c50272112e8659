// The plan, by a stable counting sort of the T K assignments into expert order.
//
//   count    how many assignments each expert has in each segment; a segment is a warp's share,
//            neighbouring assignments of one sequence
//   admit    how many of these find a place in their expert
//   number   each segment's first row in each expert; expert_offsets
//   place    each assignment's row
//   list     all assignments in expert order, for choose
//   choose   each expert's C largest weights, and their rows
//
// A policy takes these of them; in a full expert the places go
//
//   no capacity   count           number   place            to all
//   token         count   admit   number   place            by ascending t, then j
//   choice        count   admit   number   place            by ascending j, then t
//   probs         count   admit   number   list    choose   to the largest weights: admit knows how
//                                                           many stay, choose finds out which
//
// With several sequences each has C places of its own in every expert: admit begins anew with a
// sequence, and choose takes an expert's assignments of one sequence at a time.
//
// A cell holds the count of an expert's assignments in a segment; with choice, of those of one j.
// Cells are laid out (sequence, j, segment, expert), which is the order of dropping. Rows are
// numbered by ascending t K + j, whatever the policy.
//
// Launches: count; admit and number (capacity_number.cuh); place, or list and choose
// (capacity_choose.cuh). The host knows their sizes and reads nothing back. All sums are of
// integers, so the same bits follow from any order. count, place and list run a warp a segment.
// Shared memory: (1 + choices) E counters a warp, up to 48 KiB; with more experts than that the
// counters stay in global memory. Ids and weights are read one by one, whatever their strides, so
// that nothing need be aligned.
//
// Traffic: the ids twice (8 T K bytes) and three numbers an assignment written (12 T K); the
// floor is 16 T K. The cells are at most 2 T K numbers, read and written some six times, and
// stay in the L2.

#include "capacity_choose.cuh"
#include "capacity_number.cuh"
#include "capacity_scatter.h"
#include "capacity_segments.cuh"

namespace moe_ext::cuda {
namespace {

// ---- count ---------------------------------------------------------------------------

__global__ void __launch_bounds__(kWarpSize) count_kernel(const CapacityScatter p) {
  const Segment segment = segment_of(p, blockIdx.x);
  const int64_t num_experts = p.shape.num_experts;
  const bool counters_in_smem = p.shape.counters_in_smem;
  const int lane = threadIdx.x;
  int32_t* const counters = counters_in_smem ? &dyn_smem<int32_t>() : segment.cells;
  const int64_t stride = counters_in_smem ? num_experts : segment.cell_stride;

  for (int64_t j = 0; j < p.shape.choices; ++j) {
    for (int64_t e = lane; e < num_experts; e += kWarpSize) counters[j * stride + e] = 0;
  }
  __syncwarp();
  for (int64_t begin = segment.begin; begin < segment.end; begin += kAhead * kWarpSize) {
    const Batch batch = load_batch(p, begin, segment.end);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t choice = p.shape.choices > 1 ? batch.assignments[i].choice : 0;
      if (batch.experts[i] >= 0) atomicAdd(&counters[choice * stride + batch.experts[i]], 1);
    }
  }
  __syncwarp();
  if (counters_in_smem) {
    for (int64_t j = 0; j < p.shape.choices; ++j) {
      for (int64_t e = lane; e < num_experts; e += kWarpSize) {
        segment.cells[j * segment.cell_stride + e] = counters[j * num_experts + e];
      }
    }
  }
  if (blockIdx.x == 0 && lane == 0) *p.ticket = 0;
}

// ---- place and list ---------------------------------------------------------------------
//
// Both hand out numbers: an expert's next row, or the next entry of its part of the list. Lanes
// of the same expert find one another by __match_any_sync, and a lane's rank is how many of them
// are below it. They lie in the assignments' order, so the ranks do.

struct Rank {
  int before, count;
  bool leads;  // for all of them
};
__device__ __forceinline__ Rank rank_among(unsigned lanes) {
  const unsigned before = lanes & ((1u << threadIdx.x) - 1);
  return {__popc(before), __popc(lanes), before == 0};
}

// Each expert's next number, for this warp, which begins at offsets[e] + first[e].
__device__ __forceinline__ int32_t* load_next(const CapacityScatter& p, const int32_t* offsets,
                                              const int32_t* first) {
  const ScatterShape& s = p.shape;
  int32_t* const next =
      s.counters_in_smem ? &dyn_smem<int32_t>() : p.next_row + blockIdx.x * s.num_experts;
  for (int64_t e = threadIdx.x; e < s.num_experts; e += kWarpSize) next[e] = offsets[e] + first[e];
  return next;
}

// The lane's number with its expert; expert -1: none.
__device__ __forceinline__ int32_t take_next(int32_t* next, int32_t expert) {
  const Rank rank = rank_among(__match_any_sync(kFullWarp, expert));
  const int32_t number = expert >= 0 ? next[expert] + rank.before : -1;
  __syncwarp();  // all lanes have read which is next
  if (expert >= 0 && rank.leads) next[expert] += rank.count;
  __syncwarp();
  return number;
}

// How many places each cell has left, for this warp: the cells themselves, or a copy of them
// behind the next numbers.
struct Places {
  int32_t* left;
  int64_t stride;  // from one choice's to the next one's
};

__device__ __forceinline__ Places load_places(const CapacityScatter& p, const Segment& segment) {
  const ScatterShape& s = p.shape;
  const bool copied = s.counters_in_smem;
  const Places places{copied ? &dyn_smem<int32_t>() + s.num_experts : segment.cells,
                      copied ? s.num_experts : segment.cell_stride};
  for (int64_t j = 0; copied && j < s.choices; ++j) {
    for (int64_t e = threadIdx.x; e < s.num_experts; e += kWarpSize) {
      places.left[j * places.stride + e] = segment.cells[j * segment.cell_stride + e];
    }
  }
  return places;
}

// Whether the lane finds a place in its cell; cell -1: it looks for none. take_next comes after it
// always, and its barriers stand between this write and the next look.
__device__ __forceinline__ bool take_place(int32_t* left_in, int64_t cell) {
  const Rank rank = rank_among(__match_any_sync(kFullWarp, cell));
  const int32_t left = cell >= 0 ? left_in[cell] : 0;
  __syncwarp();  // all lanes have read how many are left
  if (cell >= 0 && rank.leads) left_in[cell] = max(left - rank.count, 0);
  return rank.before < left;
}

// Rows that hold nothing lie behind those that do.
__device__ __forceinline__ void mark_tail(const CapacityScatter& p) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kWarpSize;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kWarpSize + threadIdx.x;
  for (int64_t row = p.expert_offsets[p.shape.num_experts] + thread; row < p.rows; row += threads) {
    p.row_token[row] = -1;
    p.row_assignment[row] = -1;
  }
}

__global__ void __launch_bounds__(kWarpSize) place_kernel(const CapacityScatter p) {
  const ScatterShape& s = p.shape;
  const Segment segment = segment_of(p, blockIdx.x);
  const bool limited = s.order != DropOrder::kNone;
  int32_t* const next = load_next(p, p.expert_offsets, segment.first_row);
  const Places places = limited ? load_places(p, segment) : Places{};
  __syncwarp();  // rows and places are there

  for (int64_t begin = segment.begin; begin < segment.end; begin += kAhead * kWarpSize) {
    const Batch batch = load_batch(p, begin, segment.end);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t a = begin + i * kWarpSize + threadIdx.x;
      int32_t expert = batch.experts[i];
      if (limited) {
        const int64_t choice = s.choices > 1 ? batch.assignments[i].choice : 0;
        const int64_t cell = expert >= 0 ? choice * places.stride + expert : -1;
        if (!take_place(places.left, cell)) expert = -1;
      }
      const int32_t row = take_next(next, expert);
      if (a >= segment.end) continue;
      p.assignment_row[a] = row;
      if (row < 0) continue;
      p.row_token[row] = batch.assignments[i].token;
      p.row_assignment[row] = static_cast<int32_t>(a);
    }
  }
  mark_tail(p);
}

__global__ void __launch_bounds__(kWarpSize) list_kernel(const CapacityScatter p) {
  const Segment segment = segment_of(p, blockIdx.x);
  int32_t* const next = load_next(p, p.all_offsets, segment.cells);
  __syncwarp();  // the entries are there

  for (int64_t begin = segment.begin; begin < segment.end; begin += kAhead * kWarpSize) {
    const Batch batch = load_batch(p, begin, segment.end);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t a = begin + i * kWarpSize + threadIdx.x;
      const int32_t entry = take_next(next, batch.experts[i]);
      if (a >= segment.end) continue;
      if (entry >= 0) {
        p.list[entry] = static_cast<int32_t>(a);
      } else {
        p.assignment_row[a] = -1;  // a sentinel, which choose never sees
      }
    }
  }
  mark_tail(p);
}

}  // namespace

cudaError_t capacity_scatter(const CapacityScatter& scatter, cudaStream_t stream) {
  const ScatterShape& s = scatter.shape;
  const size_t smem = s.counters_in_smem ? s.counter_bytes : 0;
  const dim3 segments(s.segments), warp(kWarpSize);
  const dim3 experts((s.num_experts + kColumns - 1) / kColumns), threads(kColumns, kGroups);
  cudaError_t error =
      launch({segments, warp, smem, stream, "capacity_scatter_count"}, count_kernel, scatter);
  if (error != cudaSuccess) return error;
  error = launch({experts, threads, 0, stream, "capacity_scatter_number"}, number_kernel, scatter);
  if (error != cudaSuccess) return error;
  if (s.order != DropOrder::kProbs)
    return launch({segments, warp, smem, stream, "capacity_scatter_place"}, place_kernel, scatter);
  error = launch({segments, warp, smem, stream, "capacity_scatter_list"}, list_kernel, scatter);
  if (error != cudaSuccess) return error;
  const dim3 buckets(std::min(s.num_experts * s.num_sequences, kMaxChooseBlocks));
  return launch({buckets, dim3(kChooseThreads), 0, stream, "capacity_scatter_choose"},
                choose_kernel, scatter);
}

}  // namespace moe_ext::cuda
