// What scores are made of: the functions and the reductions over lanes that topk_route, its
// backward and accumulate_stats share, and expert ids as they are given.
#pragma once

#include <cmath>
#include <limits>

#include "platform.cuh"

namespace moe_ext::cuda {

// ---- numbers ------------------------------------------------------------------------

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }

template <class A>
__device__ __forceinline__ A logistic(A x) {
  const A e = exponential(x < A(0) ? x : -x);  // cannot overflow
  return (x < A(0) ? e : A(1)) / (A(1) + e);
}

// The larger of two; a NaN stays once it is there.
template <class A>
__device__ __forceinline__ A larger(A a, A b) {
  return b > a || b != b ? b : a;
}

// ---- over kLanes neighbouring lanes ---------------------------------------------------
//
// A butterfly: in every step a lane adds what its partner has, and all end with the same bits.
// The whole warp calls these together.

template <int kLanes, class A>
__device__ __forceinline__ A sum_over_lanes(A x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    x += __shfl_xor_sync(kFullWarp, x, distance);
  return x;
}

template <int kLanes, class A>
__device__ __forceinline__ A max_over_lanes(A x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    x = larger(x, __shfl_xor_sync(kFullWarp, x, distance));
  return x;
}

// ---- ids ----------------------------------------------------------------------------

constexpr int32_t kLargestId = std::numeric_limits<int32_t>::max();

// Expert ids, int32 or int64, as they were given: anything outside of 0..E-1 is a sentinel.
struct ExpertIds {
  const void* data;
  bool is_int64;

  // A sentinel comes back as E or more, within int32.
  __device__ __forceinline__ int32_t at(int64_t index, int32_t num_experts) const {
    const int64_t id = is_int64 ? static_cast<const int64_t*>(data)[index]
                                : static_cast<const int32_t*>(data)[index];
    return id < 0 ? num_experts : static_cast<int32_t>(id < kLargestId ? id : kLargestId);
  }
};

}  // namespace moe_ext::cuda
