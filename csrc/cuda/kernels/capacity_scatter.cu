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
// Traffic: the ids twice (8 T K bytes) and three numbers an assignment written (12 T K); the
// floor is 16 T K. The cells are at most 2 T K numbers, read and written some six times, and
// stay in the L2. Shared memory: (1 + choices) E counters a warp, up to 48 KiB; with more
// experts than that the counters stay in global memory. Ids and weights are read one by one,
// whatever their strides, so that nothing need be aligned.

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

// A block has 8 experts, whose numbers are neighbours in memory, and 64 groups of threads,
// which share out the segments.
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

// How many of a segment's assignments stay with the expert that has these columns.
__device__ __forceinline__ int32_t kept_of(const ScatterShape& s, const int32_t* cells,
                                           const int32_t* first_row, int64_t segment) {
  if (s.order == DropOrder::kProbs) return first_row[segment * s.num_experts];
  const int64_t sequence = segment / s.segments_per_sequence;
  const int64_t place = segment - sequence * s.segments_per_sequence;
  int32_t sum = 0;
  for (int64_t j = 0; j < s.choices; ++j) {
    sum += cells[((sequence * s.choices + j) * s.segments_per_sequence + place) * s.num_experts];
  }
  return sum;
}

// How many assignments an expert has, and how many rows.
struct Totals {
  int32_t all, kept;
};

// Writes each segment's first row within the expert; with kProbs the cells become each
// segment's begin in the list, where nobody is dropped yet.
__device__ __forceinline__ Totals number_rows(const ScatterShape& s, int32_t* cells,
                                              int32_t* first_row, bool active,
                                              int32_t (&parts)[kScanGroups][kScanExperts]) {
  const bool by_weight = s.order == DropOrder::kProbs;
  const Share mine = share_of(threadIdx.y, active ? s.segments : 0);
  int32_t kept = 0, listed = 0;
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    kept += kept_of(s, cells, first_row, i);
    if (by_weight) listed += cells[i * s.num_experts];
  }
  Totals totals{};
  int32_t row = sum_below(parts, kept, totals.kept);
  int32_t entry = by_weight ? sum_below(parts, listed, totals.all) : 0;
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    const int32_t stay = kept_of(s, cells, first_row, i);
    first_row[i * s.num_experts] = row;
    row += stay;
    if (by_weight) {
      const int32_t count = cells[i * s.num_experts];
      cells[i * s.num_experts] = entry;
      entry += count;
    }
  }
  return totals;
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
  __shared__ int32_t warp_sums[kScanWarps];
  const int thread = threadIdx.y * kScanExperts + threadIdx.x;
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  int32_t before = 0;
  for (int64_t begin = 0; begin < num_experts; begin += kScanWarps * kWarpSize) {
    const int64_t e = begin + thread;
    int32_t sum = sum_through_lane(lane, e < num_experts ? offsets[1 + e] : 0);
    if (lane == kWarpSize - 1) warp_sums[warp] = sum;
    __syncthreads();
    int32_t total = 0;
    for (int w = 0; w < kScanWarps; ++w) {
      if (w == warp) sum += total;
      total += warp_sums[w];
    }
    if (e < num_experts) offsets[1 + e] = before + sum;
    before += total;
    __syncthreads();  // the next sums take the place of these
  }
  if (thread == 0) offsets[0] = 0;
}

__global__ void __launch_bounds__(kScanExperts* kScanGroups) scan_kernel(const CapacityScatter p) {
  __shared__ int32_t parts[kScanGroups][kScanExperts];
  const ScatterShape& s = p.shape;
  const int64_t expert = static_cast<int64_t>(blockIdx.x) * kScanExperts + threadIdx.x;
  const bool active = expert < s.num_experts;
  const bool by_weight = s.order == DropOrder::kProbs, limited = s.order != DropOrder::kNone;
  int32_t* const cells = p.cells + expert;
  int32_t* const first_row = p.first_row + expert;

  int32_t all = 0;
  if (limited) admit(p, cells, by_weight ? first_row : cells, active, all, parts);
  const Totals totals = number_rows(s, cells, first_row, active, parts);
  if (active && threadIdx.y == 0) {
    p.expert_counts[expert] = limited ? all : totals.kept;
    p.expert_offsets[1 + expert] = totals.kept;
    if (by_weight) p.all_offsets[1 + expert] = totals.all;
  }
  if (!is_last_block(p.ticket)) return;
  accumulate(p.expert_offsets, s.num_experts);
  if (by_weight) accumulate(p.all_offsets, s.num_experts);
}

// ---- place ---------------------------------------------------------------------------

// What a warp counts on: each expert's next row (with kProbs, next entry in the list), and
// how many places each cell has left. Each warp has its own, in shared memory where they fit.
struct Counters {
  int32_t *next, *places;
  int64_t stride;  // from a choice's places to the next one's
};

__device__ __forceinline__ Counters load_counters(const CapacityScatter& p, const Segment& segment,
                                                  bool limited) {
  const ScatterShape& s = p.shape;
  const int lane = threadIdx.x;
  const bool by_weight = s.order == DropOrder::kProbs;
  const int32_t* const offsets = by_weight ? p.all_offsets : p.expert_offsets;
  const int32_t* const first = by_weight ? segment.cells : segment.first_row;
  Counters counters{p.next_row + blockIdx.x * s.num_experts, segment.cells, segment.cell_stride};
  if (s.counters_in_smem) {
    counters.next = &dyn_smem<int32_t>();
    counters.places = counters.next + s.num_experts;
    counters.stride = s.num_experts;
  }
  for (int64_t e = lane; e < s.num_experts; e += kWarpSize) {
    counters.next[e] = offsets[e] + first[e];
  }
  if (limited && s.counters_in_smem) {
    for (int64_t j = 0; j < s.choices; ++j) {
      for (int64_t e = lane; e < s.num_experts; e += kWarpSize) {
        counters.places[j * counters.stride + e] = segment.cells[j * segment.cell_stride + e];
      }
    }
  }
  __syncwarp();
  return counters;
}

// A lane's rank among those of the warp that come for the same thing. Lanes lie in the
// assignments' order, so that the rank is who comes first; the leader counts for all.
struct Rank {
  int before, count;
  bool leads;
};
__device__ __forceinline__ Rank rank_among(unsigned lanes) {
  const unsigned before = lanes & ((1u << threadIdx.x) - 1);
  return {__popc(before), __popc(lanes), before == 0};
}

// Whether the lane finds a place in its cell; cell -1: it looks for none. take_row comes next
// always, and its barriers stand between this write and the next look.
__device__ __forceinline__ bool take_place(int32_t* places, int64_t cell) {
  const Rank rank = rank_among(__match_any_sync(kFullWarp, cell));
  const int32_t left = cell >= 0 ? places[cell] : 0;
  __syncwarp();  // everybody has seen how many are left
  if (cell >= 0 && rank.leads) places[cell] = max(left - rank.count, 0);
  return rank.before < left;
}

// The lane's row with its expert; expert -1: none.
__device__ __forceinline__ int32_t take_row(int32_t* next, int32_t expert) {
  const Rank rank = rank_among(__match_any_sync(kFullWarp, expert));
  const int32_t row = expert >= 0 ? next[expert] + rank.before : -1;
  __syncwarp();  // everybody has seen which is next
  if (expert >= 0 && rank.leads) next[expert] += rank.count;
  __syncwarp();
  return row;
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
  const bool by_weight = s.order == DropOrder::kProbs;
  const bool limited = s.order == DropOrder::kChoice || s.order == DropOrder::kToken;
  const Counters counters = load_counters(p, segment, limited);

  for (int64_t begin = segment.begin; begin < segment.end; begin += kAhead * kWarpSize) {
    const Batch batch = load_batch(p, begin, segment.end);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t a = begin + i * kWarpSize + threadIdx.x;
      int32_t expert = batch.experts[i];
      if (limited) {
        const int64_t choice = s.choices > 1 ? batch.assignments[i].choice : 0;
        const int64_t cell = expert >= 0 ? choice * counters.stride + expert : -1;
        if (!take_place(counters.places, cell)) expert = -1;
      }
      const int32_t row = take_row(counters.next, expert);
      if (a >= segment.end) continue;
      if (by_weight && row >= 0) {
        p.list[row] = static_cast<int32_t>(a);
        continue;
      }
      p.assignment_row[a] = row;
      if (row < 0) continue;
      p.row_token[row] = batch.assignments[i].token;
      p.row_assignment[row] = static_cast<int32_t>(a);
    }
  }
  mark_tail(p);
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
