// The plan, by a stable counting sort of the T K assignments into expert order.
//
//   count   a warp a segment (of neighbouring assignments of one sequence): how many of
//           them each expert has, in the segment's cells
//   scan    a block 8 experts: over the cells in the order of dropping, how many of each
//           still find a place; over the segments, each one's first row in the expert;
//           the block that finishes last turns the experts' sums into expert_offsets
//   place   a warp a segment: each assignment's place and row. Lanes of the same expert
//           find one another by __match_any_sync, and a lane's rank is how many of them
//           are below it
//   choose  kProbs only (capacity_choose.cuh): the C largest weights, and their rows
//
// kChoice drops in another order (j by j) than it numbers rows in (t by t), so its cells
// are an expert's assignments of one choice: laid out (sequence, j, segment, expert), they
// lie in the order of dropping. With kProbs `place` makes a list of all assignments in
// expert order, from which `choose` takes; how many stay needs no look at the weights.
//
// Three launches (kProbs four), whose sizes are the host's knowledge; no host read. It is
// integers throughout, and every sum of them, so the same bits follow from any order.
// Traffic: the ids twice, three numbers an assignment written, and the cells, at most 2 T K,
// some six times from the L2. Shared memory: (1 + choices) E counters a warp, up to 48 KiB;
// with more experts than that the counters stay in global memory.

#include "capacity_choose.cuh"
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

// ---- scan ----------------------------------------------------------------------------

constexpr int kScanExperts = 8, kScanGroups = 64;
constexpr int kScanWarps = kScanExperts * kScanGroups / kWarpSize;

// Thread (expert, group) of a block walks the group's share of the expert's column.
struct Share {
  int64_t begin, end, size;
};
__device__ __forceinline__ Share share_of(int64_t group, int64_t count) {
  const int64_t size = max((count + kScanGroups - 1) / kScanGroups, int64_t{1});
  return {min(group * size, count), min((group + 1) * size, count), size};
}

// The sum of `value` over this expert's lower groups; `total`: over all of them.
__device__ __forceinline__ int32_t sum_below(int32_t (&parts)[kScanGroups][kScanExperts],
                                             int32_t value, int32_t& total) {
  __syncthreads();  // whoever used `parts` before is done
  parts[threadIdx.y][threadIdx.x] = value;
  __syncthreads();
  const int mine = threadIdx.y;
  int32_t below = 0;
  total = 0;
  for (int group = 0; group < kScanGroups; ++group) {
    const int32_t part = parts[group][threadIdx.x];
    below += group < mine ? part : 0;
    total += part;
  }
  return below;
}

// Replaces every count among an expert's cells by how many of them find a place: cells
// come in the order of dropping, and the sequences one after another. `result` may be the
// cells themselves. Sets `total` to how many there were.
__device__ __forceinline__ void admit(const CapacityScatter& p, const int32_t* cells,
                                      int32_t* result, bool active, int32_t& total,
                                      int32_t (&parts)[kScanGroups][kScanExperts]) {
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
    result[c * num_experts] = min(count, max(p.capacity - seen, 0));
    seen += count;
  }
  __syncthreads();  // another share's cells are read next
}

// sums[i] becomes sums[0] + ... + sums[i], by one block.
__device__ __forceinline__ void accumulate(int32_t* sums, int64_t count) {
  __shared__ int32_t warp_sums[kScanWarps];
  const int thread = threadIdx.y * kScanExperts + threadIdx.x;
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  int32_t before = 0;
  for (int64_t begin = 0; begin < count; begin += kScanWarps * kWarpSize) {
    const int64_t i = begin + thread;
    int32_t sum = i < count ? sums[i] : 0;
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const int32_t lower = __shfl_up_sync(kFullWarp, sum, distance);
      if (lane >= distance) sum += lower;
    }
    if (lane == kWarpSize - 1) warp_sums[warp] = sum;
    __syncthreads();
    int32_t total = 0;
    for (int w = 0; w < kScanWarps; ++w) {
      if (w == warp) sum += total;
      total += warp_sums[w];
    }
    if (i < count) sums[i] = before + sum;
    before += total;
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kScanExperts* kScanGroups) scan_kernel(const CapacityScatter p) {
  __shared__ int32_t parts[kScanGroups][kScanExperts];
  __shared__ bool is_last;
  const ScatterShape& s = p.shape;
  const int64_t num_experts = s.num_experts;
  const int64_t expert = static_cast<int64_t>(blockIdx.x) * kScanExperts + threadIdx.x;
  const bool active = expert < num_experts;
  const bool by_weight = s.order == DropOrder::kProbs;
  int32_t* const cells = p.cells + expert;
  int32_t* const first_row = p.first_row + expert;

  int32_t all = 0;
  if (s.order != DropOrder::kNone) {
    admit(p, cells, by_weight ? first_row : cells, active, all, parts);
  }
  const auto kept_of = [&](int64_t segment) {
    if (by_weight) return first_row[segment * num_experts];
    if (s.choices == 1) return cells[segment * num_experts];
    const int64_t sequence = segment / s.segments_per_sequence;
    const int64_t place = segment - sequence * s.segments_per_sequence;
    int32_t sum = 0;
    for (int64_t j = 0; j < s.choices; ++j) {
      sum += cells[((sequence * s.choices + j) * s.segments_per_sequence + place) * num_experts];
    }
    return sum;
  };

  const Share mine = share_of(threadIdx.y, active ? s.segments : 0);
  int32_t kept = 0, total = 0, in_list = 0;
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    kept += kept_of(i);
    if (by_weight) in_list += cells[i * num_experts];
  }
  int32_t row = sum_below(parts, kept, total);
  if (by_weight) in_list = sum_below(parts, in_list, all);
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    const int32_t stay = kept_of(i);
    first_row[i * num_experts] = row;
    row += stay;
    if (by_weight) {  // the cells become each segment's begin in the list
      const int32_t count = cells[i * num_experts];
      cells[i * num_experts] = in_list;
      in_list += count;
    }
  }
  if (active && threadIdx.y == 0) {
    const int32_t count = s.order == DropOrder::kNone ? total : all;
    p.expert_counts[expert] = count;
    p.expert_offsets[1 + expert] = total;
    if (by_weight) p.all_offsets[1 + expert] = count;
  }

  // The last block to come here sees what all of them wrote.
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    is_last = atomicAdd(p.ticket, 1) == static_cast<int32_t>(gridDim.x) - 1;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  accumulate(p.expert_offsets + 1, num_experts);
  if (by_weight) accumulate(p.all_offsets + 1, num_experts);
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    p.expert_offsets[0] = 0;
    if (by_weight) p.all_offsets[0] = 0;
  }
}

// ---- place ---------------------------------------------------------------------------

__device__ __forceinline__ int lowest_lane(unsigned lanes) { return __ffs(lanes) - 1; }

__global__ void __launch_bounds__(kWarpSize) place_kernel(const CapacityScatter p) {
  const ScatterShape& s = p.shape;
  const int64_t num_experts = s.num_experts;
  const Segment segment = segment_of(p, blockIdx.x);
  const int lane = threadIdx.x;
  const unsigned lanes_below = (1u << lane) - 1;
  const bool by_weight = s.order == DropOrder::kProbs;
  const bool limited = s.order == DropOrder::kChoice || s.order == DropOrder::kToken;

  // Each expert's next row (in the list, with kProbs), and how many places its cells have left.
  const bool counters_in_smem = s.counters_in_smem;
  const int32_t* const first = by_weight ? segment.cells : segment.first_row;
  int32_t* const next =
      counters_in_smem ? &dyn_smem<int32_t>() : p.next_row + blockIdx.x * num_experts;
  int32_t* const places = counters_in_smem ? next + num_experts : segment.cells;
  const int64_t stride = counters_in_smem ? num_experts : segment.cell_stride;
  const int32_t* const offsets = by_weight ? p.all_offsets : p.expert_offsets;
  for (int64_t e = lane; e < num_experts; e += kWarpSize) next[e] = offsets[e] + first[e];
  if (limited && counters_in_smem) {
    for (int64_t j = 0; j < s.choices; ++j) {
      for (int64_t e = lane; e < num_experts; e += kWarpSize) {
        places[j * stride + e] = segment.cells[j * segment.cell_stride + e];
      }
    }
  }
  __syncwarp();

  for (int64_t begin = segment.begin; begin < segment.end; begin += kAhead * kWarpSize) {
    const Batch batch = load_batch(p, begin, segment.end);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t a = begin + i * kWarpSize + lane;
      const Assignment assignment = batch.assignments[i];
      const int32_t expert = batch.experts[i];
      bool kept = expert >= 0;
      if (limited) {
        const int64_t choice = s.choices > 1 ? assignment.choice : 0;
        const int64_t cell = kept ? choice * stride + expert : -1;
        const unsigned rivals = __match_any_sync(kFullWarp, cell);
        const int32_t left = kept ? places[cell] : 0;
        __syncwarp();
        if (kept && lane == lowest_lane(rivals)) {
          places[cell] = max(left - __popc(rivals), 0);
        }
        kept = __popc(rivals & lanes_below) < left;
      }
      const unsigned mates = __match_any_sync(kFullWarp, kept ? expert : -1);
      const int32_t row = kept ? next[expert] + __popc(mates & lanes_below) : -1;
      __syncwarp();
      if (kept && lane == lowest_lane(mates)) next[expert] += __popc(mates);
      __syncwarp();
      if (a >= segment.end) continue;
      if (kept && by_weight) {
        p.list[row] = static_cast<int32_t>(a);
      } else {
        p.assignment_row[a] = row;
        if (!kept) continue;
        p.row_token[row] = assignment.token;
        p.row_assignment[row] = static_cast<int32_t>(a);
      }
    }
  }

  const int64_t threads = static_cast<int64_t>(gridDim.x) * kWarpSize;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kWarpSize + lane;
  for (int64_t row = p.expert_offsets[num_experts] + thread; row < p.rows; row += threads) {
    p.row_token[row] = -1;
    p.row_assignment[row] = -1;
  }
}

}  // namespace

cudaError_t capacity_scatter(const CapacityScatter& scatter, cudaStream_t stream) {
  const ScatterShape& s = scatter.shape;
  const size_t smem = s.counters_in_smem ? s.counter_bytes : 0;
  const dim3 segments(s.segments), experts((s.num_experts + kScanExperts - 1) / kScanExperts);
  cudaError_t error = launch({segments, dim3(kWarpSize), smem, stream, "capacity_scatter_count"},
                             count_kernel, scatter);
  if (error != cudaSuccess) return error;
  error = launch({experts, dim3(kScanExperts, kScanGroups), 0, stream, "capacity_scatter_scan"},
                 scan_kernel, scatter);
  if (error != cudaSuccess) return error;
  error = launch({segments, dim3(kWarpSize), smem, stream, "capacity_scatter_place"}, place_kernel,
                 scatter);
  if (error != cudaSuccess || s.order != DropOrder::kProbs) return error;
  const dim3 buckets(std::min(s.num_experts * s.num_sequences, kMaxChooseBlocks));
  return launch({buckets, dim3(kChooseThreads), 0, stream, "capacity_scatter_choose"},
                choose_kernel, scatter);
}

}  // namespace moe_ext::cuda
