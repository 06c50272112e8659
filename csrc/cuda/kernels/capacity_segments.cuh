// The assignments as capacity_scatter's kernels see them: an assignment's token, choice and
// expert; a warp's segment of neighbouring assignments.
#pragma once

#include "capacity_scatter.h"
#include "dtypes.cuh"
#include "platform.cuh"

namespace moe_ext::cuda {

struct Assignment {
  int32_t token, choice;
};

__device__ __forceinline__ Assignment locate(const CapacityScatter& p, int64_t assignment) {
  const auto a = static_cast<uint32_t>(assignment), k = static_cast<uint32_t>(p.top_k);
  return {static_cast<int32_t>(a / k), static_cast<int32_t>(a % k)};
}

// The assignment's expert, or -1 for a sentinel's and for padding's.
__device__ __forceinline__ int32_t expert_of(const CapacityScatter& p, Assignment a) {
  if (p.padding != nullptr && p.padding[a.token * p.padding_stride]) return -1;
  const int64_t at = a.token * p.experts_token_stride + a.choice * p.experts_choice_stride;
  const int64_t id = p.experts_are_int64 ? static_cast<const int64_t*>(p.experts)[at]
                                         : static_cast<const int32_t*>(p.experts)[at];
  return id >= 0 && id < p.shape.num_experts ? static_cast<int32_t>(id) : -1;
}

// A lane's next assignments, of kAhead steps of the warp, so that many ids are in flight.
constexpr int kAhead = 4;
struct Batch {
  Assignment assignments[kAhead];
  int32_t experts[kAhead];  // -1 past the end as well
};

__device__ __forceinline__ Batch load_batch(const CapacityScatter& p, int64_t begin, int64_t end) {
  Batch batch;
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    const int64_t a = begin + i * kWarpSize + threadIdx.x;
    batch.assignments[i] = locate(p, a);
    batch.experts[i] = a < end ? expert_of(p, batch.assignments[i]) : -1;
  }
  return batch;
}

// The assignments of a segment, and where its numbers stand.
struct Segment {
  int64_t begin, end;
  int32_t* first_row;  // (E)
  int32_t* cells;      // of choice 0: (E); the next choice's lie cell_stride further
  int64_t cell_stride;
};

__device__ __forceinline__ Segment segment_of(const CapacityScatter& p, int64_t segment) {
  const ScatterShape& s = p.shape;
  const int64_t sequence = segment / s.segments_per_sequence;
  const int64_t place = segment - sequence * s.segments_per_sequence;
  const int64_t end_of_sequence = (sequence + 1) * s.sequence_size;
  const int64_t begin = sequence * s.sequence_size + place * s.segment_size;
  const int64_t cell = sequence * s.choices * s.segments_per_sequence + place;
  return {
      begin,
      min(begin + s.segment_size, end_of_sequence),
      p.first_row + segment * s.num_experts,
      p.cells + cell * s.num_experts,
      s.segments_per_sequence * s.num_experts,
  };
}

// The sum of `value` over the warp's lanes up to this one.
__device__ __forceinline__ int32_t sum_through_lane(int lane, int32_t value) {
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int32_t lower = __shfl_up_sync(kFullWarp, value, distance);
    if (lane >= distance) value += lower;
  }
  return value;
}

}  // namespace moe_ext::cuda
