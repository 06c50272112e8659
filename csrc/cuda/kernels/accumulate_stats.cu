// accumulate_stats: adds one forward's routing to running sums.
//
//   softmax:  entropy = log Z - sum_e p_e (l_e - max) / Z,  p_e = exp(l_e - max), Z = sum p
//   sigmoid:  entropy = log S - sum_e s_e log s_e / S,      S = sum s
//   and the token's largest logit, its assignments, and how many of them have no row
//
// First launch: a warp a token, a block of 8 warps for 8 to 256 tokens; each block writes
// one StatsPart. Second launch: a thread an expert adds what topk_route has counted, and
// the first block adds up the parts. Sums go over a warp's tokens, then over the warps,
// then over the blocks, in float64 and in an order that T alone fixes; no float is added by
// an atomic, so the same forwards give the same bits.
//
// Shared memory: 0.4 and 12 KB, static. Any alignment. Bytes: the logits once from memory
// (the second pass over a row finds it in L1), 4 T K ids and rows, 48 a block.
#include <algorithm>

#include "accumulate_stats.h"
#include "dtypes.cuh"
#include "platform.cuh"
#include "scores.cuh"

namespace moe_ext::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarpSize;

__device__ __forceinline__ void add(StatsPart& sum, const StatsPart& part) {
  sum.entropy += part.entropy;
  sum.max_logit = larger(sum.max_logit, part.max_logit);
  sum.tokens += part.tokens;
  sum.assignments += part.assignments;
  sum.dropped += part.dropped;
  sum.lost += part.lost;
}

// One token's part, of which every lane gets the same bits.
template <class A>
__device__ __forceinline__ StatsPart token_stats(const AccumulateStats& p, int64_t t, int lane) {
  const int E = static_cast<int>(p.num_experts);
  const auto logit = [&](int e) { return load_as<A>(p.logits, p.dtype, t * E + e); };
  A max = -kInfinity<A>;
  for (int e = lane; e < E; e += kWarpSize) max = larger(max, logit(e));
  max = max_over_lanes<kWarpSize>(max);
  A sum = 0, weighted = 0;
  for (int e = lane; e < E; e += kWarpSize) {
    const A distance = logit(e) - max;
    const A score = p.is_sigmoid ? logistic(logit(e)) : exponential(distance);
    sum += score;
    // A score that underflowed counts 0, not 0 * -inf; a NaN is not hidden: `sum` has it.
    if (score > A(0)) weighted += score * (p.is_sigmoid ? logarithm(score) : distance);
  }
  sum = sum_over_lanes<kWarpSize>(sum);
  weighted = sum_over_lanes<kWarpSize>(weighted);

  const ExpertIds ids{p.experts, p.experts_are_int64};
  int assigned = 0, kept = 0;
  for (int64_t j = lane; j < p.top_k; j += kWarpSize) {
    const int64_t a = t * p.top_k + j;
    if (ids.at(a, E) >= E) continue;
    ++assigned;
    kept += !p.assignment_row || p.assignment_row[a] >= 0;
  }
  assigned = __reduce_add_sync(kFullWarp, assigned);
  kept = __reduce_add_sync(kFullWarp, kept);
  return {logarithm(sum) - weighted / sum, max, 1, assigned, assigned - kept,
          assigned > 0 && kept == 0};
}

template <class A>
__global__ void __launch_bounds__(kThreads, 2) token_stats_kernel(const AccumulateStats p) {
  __shared__ StatsPart parts[kWarps];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t begin = blockIdx.x * p.tokens_per_block;
  const int64_t end = begin + p.tokens_per_block < p.tokens ? begin + p.tokens_per_block : p.tokens;
  StatsPart own{0, -kInfinity<double>, 0, 0, 0, 0};
  for (int64_t t = begin + warp; t < end; t += kWarps) {
    if (p.padding && p.padding[t]) continue;
    add(own, token_stats<A>(p, t, lane));
  }
  if (lane == 0) parts[warp] = own;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int other = 1; other < kWarps; ++other) add(own, parts[other]);
    p.parts[blockIdx.x] = own;
  }
}

__global__ void __launch_bounds__(kThreads) add_stats_kernel(const AccumulateStats p) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (e < p.num_experts) {
    p.counts[e] += p.expert_counts[e];
    if (p.step_counts) p.step_counts[e] += p.expert_counts[e];
    p.score_sums[e] += load_as<double>(p.route_score_sums, p.route_score_sums_dtype, e);
  }
  if (blockIdx.x > 0) return;

  __shared__ StatsPart parts[kThreads];
  StatsPart own{0, -kInfinity<double>, 0, 0, 0, 0};
  for (int64_t block = threadIdx.x; block < p.blocks; block += kThreads) add(own, p.parts[block]);
  parts[threadIdx.x] = own;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) add(parts[threadIdx.x], parts[threadIdx.x + half]);
  }
  if (threadIdx.x == 0) {
    const StatsPart& sum = parts[0];
    double* total = p.totals;
    // Zeros are a fresh start, so the first maximum replaces what it finds.
    const double max_logit = total[kForwards] > 0 ? total[kMaxLogit] : -kInfinity<double>;
    total[kMaxLogit] = larger(max_logit, sum.max_logit);
    total[kTokens] += static_cast<double>(sum.tokens);
    total[kAssignments] += static_cast<double>(sum.assignments);
    total[kDropped] += static_cast<double>(sum.dropped);
    total[kLostTokens] += static_cast<double>(sum.lost);
    total[kEntropy] += sum.entropy;
    total[kForwards] += 1;
  }
}

}  // namespace

void accumulate_stats_blocks(AccumulateStats& p) {
  constexpr int64_t kBlocks = 1024;  // fill any GPU
  p.tokens_per_block = kWarps * std::clamp<int64_t>(p.tokens / (kWarps * kBlocks), 1, 32);
  p.blocks = (p.tokens + p.tokens_per_block - 1) / p.tokens_per_block;
}

cudaError_t accumulate_stats(const AccumulateStats& p, cudaStream_t stream) {
  if (p.blocks > 0) {
    const auto kernel =
        p.dtype == Dtype::f64 ? token_stats_kernel<double> : token_stats_kernel<float>;
    const dim3 blocks(static_cast<unsigned>(p.blocks));
    const cudaError_t error = launch({blocks, dim3(kThreads), 0, stream, "token_stats"}, kernel, p);
    if (error != cudaSuccess) return error;
  }
  // One at least, for the totals: a layer without experts counts its forwards, too.
  const int64_t add_blocks = std::max<int64_t>(1, (p.num_experts + kThreads - 1) / kThreads);
  const dim3 blocks(static_cast<unsigned>(add_blocks));
  return launch({blocks, dim3(kThreads), 0, stream, "add_stats"}, add_stats_kernel, p);
}

}  // namespace moe_ext::cuda
