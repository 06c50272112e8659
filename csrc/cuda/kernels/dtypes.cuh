// Element types in a kernel: what a tensor's elements are computed in, and how several
// neighbouring ones are loaded and stored at once.
//
// Everything is computed in float32, or in float64 for float64, and rounded (to nearest
// even) once, when it is stored.
#pragma once

#include <cstring>
#include <type_traits>

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

// Calls body(T{}) with the element type that `dtype` names.
template <class Body>
auto with_type(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::f64:
      return body(double());
    case Dtype::f32:
      return body(float());
    case Dtype::bf16:
      return body(bf16());
    default:
      return body(f16());
  }
}

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

// How many of N neighbours a pack has.
template <class T, int N>
constexpr int kPackOf = N * sizeof(T) < kMaxPackBytes ? N : kMaxPackBytes / sizeof(T);

// Whether rows of `length` elements, the first at `rows` and `stride` elements apart, are made of
// whole packs of N neighbours. To be asked once an operand, not once a pack: behind a branch of
// its own every load would wait for the one before.
template <class T, int N>
__host__ __device__ __forceinline__ bool in_packs(const void* rows, int64_t stride,
                                                  int64_t length) {
  constexpr int kBytes = kPackOf<T, N> * sizeof(T);
  return reinterpret_cast<uintptr_t>(rows) % kBytes == 0 && stride * sizeof(T) % kBytes == 0 &&
         length % N == 0;
}

// Calls body(whole) with a constant for an answer of in_packs.
template <class Body>
__device__ __forceinline__ void with_packs(bool whole, Body body) {
  if (whole) {
    body(std::true_type());
  } else {
    body(std::false_type());
  }
}

// Two neighbouring 16-bit elements are one word, the first in its lower half.
__device__ __forceinline__ void from_word(uint32_t word, float& low, float& high, bf16) {
  low = __uint_as_float(word << 16), high = __uint_as_float(word & 0xffff0000u);
}
__device__ __forceinline__ void from_word(uint32_t word, float& low, float& high, f16) {
  __half2 pair;
  memcpy(&pair, &word, sizeof word);
  low = __low2float(pair), high = __high2float(pair);
}
__device__ __forceinline__ uint32_t to_word(float low, float high, bf16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}
__device__ __forceinline__ uint32_t to_word(float low, float high, f16) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

// N neighbouring elements as they lie in memory: loading them does not wait for them, so that
// more loads may follow; `values` does. In whole packs either all N exist or none.
template <class T, int N>
class Neighbours {
  static constexpr int kPack = kPackOf<T, N>;
  static constexpr bool kPairs = sizeof(T) == 2 && N % 2 == 0;
  using Word = std::conditional_t<kPairs, uint32_t, T>;
  static constexpr int kPerWord = kPairs ? 2 : 1;
  using WordPack = Pack<Word, kPack / kPerWord>;

 public:
  // The first `count` of them from `from` on; zeros for the others, which are not read.
  template <bool kWhole>
  __device__ __forceinline__ void load(std::bool_constant<kWhole>, const T* from, int count) {
    if constexpr (kWhole) {
#pragma unroll
      for (int i = 0; i < N; i += kPack) {
        WordPack pack{};
        if (count > 0) pack = *reinterpret_cast<const WordPack*>(from + i);
#pragma unroll
        for (int j = 0; j < kPack / kPerWord; ++j) word_[i / kPerWord + j] = pack.element[j];
      }
    } else if constexpr (kPairs) {
      const auto* bits = reinterpret_cast<const uint16_t*>(from);
#pragma unroll
      for (int i = 0; i < N; i += 2) {
        const uint32_t low = i < count ? bits[i] : 0, high = i + 1 < count ? bits[i + 1] : 0;
        word_[i / 2] = low | high << 16;
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) word_[i] = i < count ? from[i] : T{};
    }
  }

  __device__ __forceinline__ void values(Compute<T> (&value)[N]) const {
#pragma unroll
    for (int i = 0; i < N; i += kPerWord) {
      if constexpr (kPairs) {
        from_word(word_[i / 2], value[i], value[i + 1], T());
      } else {
        value[i] = to_compute(word_[i]);
      }
    }
  }

  // Rounds.
  __device__ __forceinline__ void set(const Compute<T> (&value)[N]) {
#pragma unroll
    for (int i = 0; i < N; i += kPerWord) {
      if constexpr (kPairs) {
        word_[i / 2] = to_word(value[i], value[i + 1], T());
      } else {
        round_to(word_[i], value[i]);
      }
    }
  }

  template <bool kWhole>
  __device__ __forceinline__ void store(std::bool_constant<kWhole>, T* to, int count) const {
    if constexpr (kWhole) {
#pragma unroll
      for (int i = 0; i < N; i += kPack) {
        WordPack pack;
#pragma unroll
        for (int j = 0; j < kPack / kPerWord; ++j) pack.element[j] = word_[i / kPerWord + j];
        if (count > 0) *reinterpret_cast<WordPack*>(to + i) = pack;
      }
    } else if constexpr (kPairs) {
      auto* bits = reinterpret_cast<uint16_t*>(to);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (i < count) bits[i] = static_cast<uint16_t>(word_[i / 2] >> (i % 2 * 16));
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (i < count) to[i] = word_[i];
      }
    }
  }

 private:
  Word word_[N / kPerWord];
};

// to[i] = value[i], rounded, for i < count.
template <class T, int N>
__device__ __forceinline__ void store_neighbours(T* to, const Compute<T> (&value)[N], int count) {
  Neighbours<T, N> rounded;
  rounded.set(value);
  with_packs(count >= N && in_packs<T, N>(to, 0, 0),
             [&](auto whole) { rounded.store(whole, to, count); });
}

}  // namespace moe_ext::cuda
