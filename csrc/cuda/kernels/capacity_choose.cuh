// Each expert's C largest weights, and their rows: the pass `choose` of capacity_scatter.
//
// A block takes an expert's assignments of one sequence (a bucket), which lie in the list
// one after another. If they are more than C it finds the C-th largest weight by a radix
// selection: 8 bits at a time from the top, a histogram of the next digit among the keys
// that share the digits found so far. Then it goes through the list in order, and gives
// rows to the keys above and to the first of those that equal it, which is why a tie goes
// to the earlier assignment. Grid: buckets, at most kMaxChooseBlocks, 256 threads each.
// Shared memory: 1.1 KiB. Traffic: 4 bytes and a weight an assignment, for each digit (2
// for 16-bit weights, 4 for float32, 8 for float64) and once more; mostly from the L2.
#pragma once

#include "capacity_segments.cuh"

namespace moe_ext::cuda {

constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;
constexpr int kChooseThreads = kDigits;  // a thread a digit
constexpr int64_t kMaxChooseBlocks = 16384;

// A float's bits as a number that rises with it: NaN counts as -inf, -0 as 0.
__device__ __forceinline__ uint64_t rising(uint64_t bits, int width, uint64_t infinity) {
  const uint64_t sign = uint64_t{1} << (width - 1);
  if ((bits & ~sign) > infinity) bits = sign | infinity;
  if (bits == sign) bits = 0;
  return bits & sign ? ~bits & (sign | (sign - 1)) : bits | sign;
}

__device__ __forceinline__ uint64_t key_of(const CapacityScatter& p, int64_t assignment) {
  const Assignment a = locate(p, assignment);
  const int64_t at = a.token * p.weights_token_stride + a.choice * p.weights_choice_stride;
  switch (p.weights_dtype) {
    case Dtype::f64:
      return rising(static_cast<const uint64_t*>(p.weights)[at], 64, 0x7ffull << 52);
    case Dtype::f32:
      return rising(static_cast<const uint32_t*>(p.weights)[at], 32, 0xffull << 23);
    case Dtype::bf16:
      return rising(static_cast<const uint16_t*>(p.weights)[at], 16, 0xffull << 7);
    default:
      return rising(static_cast<const uint16_t*>(p.weights)[at], 16, 0x1full << 10);
  }
}

// The sum of `value` over the block's lower threads; `total`: over all of them.
__device__ __forceinline__ int32_t sum_below(int32_t value, int32_t& total) {
  constexpr int kWarps = kChooseThreads / kWarpSize;
  __shared__ int32_t warp_sums[kWarps];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int32_t sum = sum_through_lane(lane, value);
  __syncthreads();  // earlier reads of `warp_sums` are done
  if (lane == kWarpSize - 1) warp_sums[warp] = sum;
  __syncthreads();
  int32_t below = 0;
  total = 0;
  for (int w = 0; w < kWarps; ++w) {
    below += w < warp ? warp_sums[w] : 0;
    total += warp_sums[w];
  }
  return below + sum - value;
}

// What stays: keys above `key`, and the first `ties` of those that equal it.
struct Threshold {
  uint64_t key;
  int32_t ties;
};

// The threshold that lets `stay` of the listed assignments through, 0 < stay < count: digit
// by digit from the top, the one that the stay-th largest key has.
__device__ __forceinline__ Threshold find_threshold(const CapacityScatter& p, const int32_t* list,
                                                    int32_t count, int32_t stay) {
  __shared__ int32_t histogram[kDigits];
  __shared__ int32_t found_digit, found_ties;
  Threshold threshold{0, stay};
  const int width = p.weights_dtype == Dtype::f64 ? 64 : p.weights_dtype == Dtype::f32 ? 32 : 16;
  for (int shift = width - kDigitBits; shift >= 0; shift -= kDigitBits) {
    histogram[threadIdx.x] = 0;
    __syncthreads();
    const uint64_t known = shift + kDigitBits < width ? ~uint64_t{0} << (shift + kDigitBits) : 0;
    for (int64_t i = threadIdx.x; i < count; i += kChooseThreads) {
      const uint64_t key = key_of(p, list[i]);
      if ((key & known) == threshold.key) atomicAdd(&histogram[key >> shift & (kDigits - 1)], 1);
    }
    __syncthreads();
    const int digit = kDigits - 1 - static_cast<int>(threadIdx.x);  // the largest first
    int32_t total;
    const int32_t mine = histogram[digit], above = sum_below(mine, total);
    if (above < threshold.ties && threshold.ties <= above + mine) {
      found_digit = digit;
      found_ties = threshold.ties - above;
    }
    __syncthreads();
    threshold.key |= static_cast<uint64_t>(found_digit) << shift;
    threshold.ties = found_ties;
  }
  return threshold;
}

static __global__ void __launch_bounds__(kChooseThreads) choose_kernel(const CapacityScatter p) {
  const ScatterShape& s = p.shape;
  for (int64_t b = blockIdx.x; b < s.num_experts * s.num_sequences; b += gridDim.x) {
    const int64_t sequence = b / s.num_experts, expert = b - sequence * s.num_experts;
    // Its assignments lie in the list from here to where the next sequence's begin.
    const Segment segment = segment_of(p, sequence * s.segments_per_sequence);
    const int32_t begin = p.all_offsets[expert] + segment.cells[expert];
    const int32_t end = sequence + 1 < s.num_sequences
                            ? p.all_offsets[expert] +
                                  segment.cells[s.segments_per_sequence * s.num_experts + expert]
                            : p.all_offsets[expert + 1];
    const int32_t* const list = p.list + begin;
    const int32_t count = end - begin, stay = min(count, p.capacity);
    const bool all_stay = stay == count;
    Threshold threshold{~uint64_t{0}, 0};
    if (stay > 0 && !all_stay) threshold = find_threshold(p, list, count, stay);

    int32_t row = p.expert_offsets[expert] + segment.first_row[expert];
    for (int64_t i = threadIdx.x; i - threadIdx.x < count; i += kChooseThreads) {
      const int32_t assignment = i < count ? list[i] : 0;
      bool above = false, tied = false;
      if (i < count && stay > 0) {
        const uint64_t key = all_stay ? 0 : key_of(p, assignment);
        above = all_stay || key > threshold.key;
        tied = !above && key == threshold.key;
      }
      // Two sums in one: a block has fewer than 2^16 threads.
      int32_t total;
      const int32_t below = sum_below(above + (tied << 16), total);
      const int32_t ties_below = min(below >> 16, threshold.ties);
      const bool kept = above || (tied && ties_below < threshold.ties);
      const int32_t mine = row + (below & 0xffff) + ties_below;
      if (i < count) p.assignment_row[assignment] = kept ? mine : -1;
      if (kept) {
        p.row_token[mine] = locate(p, assignment).token;
        p.row_assignment[mine] = assignment;
      }
      const int32_t ties = min(total >> 16, threshold.ties);
      row += (total & 0xffff) + ties;
      threshold.ties -= ties;
    }
  }
}

}  // namespace moe_ext::cuda
