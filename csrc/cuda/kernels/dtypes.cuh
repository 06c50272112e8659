// Element types in a kernel: what a tensor's elements are computed in, and how several
// neighbouring ones are loaded and stored at once.
//
// Everything is computed in float32, or in float64 for float64, and rounded (to nearest
// even) once, when it is stored.
#pragma once

#include "dtypes.h"
#include "platform.cuh"

namespace moe_ext::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
// What elements of type T are computed in.
template <class T>
using Compute = typename ComputeType<T>::type;

__device__ __forceinline__ double to_compute(double value) { return value; }
__device__ __forceinline__ float to_compute(float value) { return value; }
__device__ __forceinline__ float to_compute(bf16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_compute(f16 value) { return __half2float(value); }

__device__ __forceinline__ void round_to(double& to, double value) { to = value; }
__device__ __forceinline__ void round_to(float& to, float value) { to = value; }
__device__ __forceinline__ void round_to(bf16& to, float value) { to = __float2bfloat16_rn(value); }
__device__ __forceinline__ void round_to(f16& to, float value) { to = __float2half_rn(value); }

// Element `index` of an array whose type is known at run time only.
template <class C>
__device__ __forceinline__ C load_as(const void* data, Dtype dtype, int64_t index) {
  switch (dtype) {
    case Dtype::f64:
      return static_cast<C>(static_cast<const double*>(data)[index]);
    case Dtype::f32:
      return static_cast<C>(static_cast<const float*>(data)[index]);
    case Dtype::bf16:
      return static_cast<C>(to_compute(static_cast<const bf16*>(data)[index]));
    default:
      return static_cast<C>(to_compute(static_cast<const f16*>(data)[index]));
  }
}

// The same for storing, rounded.
template <class C>
__device__ __forceinline__ void store_as(void* data, Dtype dtype, int64_t index, C value) {
  switch (dtype) {
    case Dtype::f64:
      static_cast<double*>(data)[index] = static_cast<double>(value);
      break;
    case Dtype::f32:
      static_cast<float*>(data)[index] = static_cast<float>(value);
      break;
    case Dtype::bf16:
      round_to(static_cast<bf16*>(data)[index], static_cast<float>(value));
      break;
    default:
      round_to(static_cast<f16*>(data)[index], static_cast<float>(value));
  }
}

// N neighbouring elements that one instruction can move, where they are aligned.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T element[N];
};
constexpr int kMaxPackBytes = 16;

template <class T, int N>
__device__ __forceinline__ bool is_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(Pack<T, N>) == 0;
}

// value[i] = from[i] for i < count, 0 for the others, which are not read.
template <class T, int N>
__device__ __forceinline__ void load_neighbours(Compute<T> (&value)[N], const T* from, int count) {
  if constexpr (N * sizeof(T) > kMaxPackBytes) {
    constexpr int half = N / 2;
    Compute<T> low[half], high[half];
    load_neighbours<T, half>(low, from, count);
    load_neighbours<T, half>(high, from + half, count - half);
#pragma unroll
    for (int i = 0; i < half; ++i) value[i] = low[i], value[half + i] = high[i];
  } else if (count >= N && is_aligned<T, N>(from)) {
    const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] = to_compute(pack.element[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] = i < count ? to_compute(from[i]) : Compute<T>(0);
  }
}

// to[i] = value[i], rounded, for i < count.
template <class T, int N>
__device__ __forceinline__ void store_neighbours(T* to, const Compute<T> (&value)[N], int count) {
  if constexpr (N * sizeof(T) > kMaxPackBytes) {
    constexpr int half = N / 2;
    Compute<T> low[half], high[half];
#pragma unroll
    for (int i = 0; i < half; ++i) low[i] = value[i], high[i] = value[half + i];
    store_neighbours<T, half>(to, low, count);
    store_neighbours<T, half>(to + half, high, count - half);
  } else if (count >= N && is_aligned<T, N>(to)) {
    Pack<T, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) round_to(pack.element[i], value[i]);
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < count) round_to(to[i], value[i]);
    }
  }
}

}  // namespace moe_ext::cuda
