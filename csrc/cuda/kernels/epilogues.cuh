// What becomes of a RowsGemm's accumulators, in registers. A kernel that has computed N
// neighbouring columns of some rows of an expert asks once which epilogue it is (with_epilogue),
// makes that epilogue's object for its columns, and gives it row after row:
//
//   StoreColumns      out[r][n] = acc + bias[n]
//   ActivateColumns   h = acc + bias (kept if asked for), out[r][i] = act(h)
//   BackwardColumns   acc is dA[r][i] = <dy, W_down column i>, before the routing weight w:
//                     A is recomputed from the kept h; dh[r] = w dA act'(h),
//                     out[r][i] = w A; returns <dA, A> over its columns, the row's part
//                     of the router's gradient
//
// What does not change from row to row, biases and where packs move in one instruction, is known
// before the first. What a row needs from memory comes in two steps that a kernel may take rows
// ahead: look_up, then fetch. N is what a kernel's layout of accumulators gives: 1, 2, 4, 8;
// columns past the end are neither read nor written.
//
// Arithmetic is in the compute type (float32, or float64); a value is rounded once, when it
// is stored. Every element depends on its own row only.
#pragma once

#include "activations.cuh"

namespace moe_ext::cuda {

// ---- columns of rows -----------------------------------------------------------------

// From the order of memory, N and N neighbours, to N gates and the N ups beside them; and back.
template <class C, int N>
__device__ __forceinline__ void split(C (&first)[N], C (&second)[N], bool interleaved) {
  if (!interleaved) return;
  C both[2 * N];
#pragma unroll
  for (int j = 0; j < N; ++j) both[j] = first[j], both[N + j] = second[j];
#pragma unroll
  for (int j = 0; j < N; ++j) first[j] = both[2 * j], second[j] = both[2 * j + 1];
}
template <class C, int N>
__device__ __forceinline__ void join(C (&gate)[N], C (&up)[N], bool interleaved) {
  if (!interleaved) return;
  C both[2 * N];
#pragma unroll
  for (int j = 0; j < N; ++j) both[2 * j] = gate[j], both[2 * j + 1] = up[j];
#pragma unroll
  for (int j = 0; j < N; ++j) gate[j] = both[j], up[j] = both[N + j];
}

// N neighbouring columns, from `column` on, of the rows of a matrix; kGated: N gates and their
// ups, which lie as GateColumns says. Rows are `stride` elements apart.
template <class T, int N, bool kGated>
class ColumnsOfRows {
  using C = Compute<T>;
  static constexpr int kParts = kGated ? 2 : 1;

 public:
  struct Held {
    Neighbours<T, N> part[kParts];
  };

  __device__ __forceinline__ ColumnsOfRows(const void* matrix, int64_t stride,
                                           const GateColumns& at, int64_t columns, int64_t column)
      : stride_(stride),
        interleaved_(kGated && at.step != 1),
        whole_(in_packs<T, N>(matrix, stride, columns)) {
    const int64_t left = columns - column;
    count_ = left > N ? N : left > 0 ? static_cast<int>(left) : 0;
    // Threads without columns look at the first ones, and store nothing.
    const int64_t i = left > 0 ? column : 0;
    T* const rows = static_cast<T*>(const_cast<void*>(matrix));
    first_ = rows ? rows + (interleaved_ ? 2 * i : i) : nullptr;
    second_ = interleaved_ ? N : at.up;
  }

  // How many of the N exist; whether there is a matrix.
  __device__ __forceinline__ int count() const { return count_; }
  __device__ __forceinline__ explicit operator bool() const { return first_ != nullptr; }

  __device__ __forceinline__ Held load(int64_t row) const {
    Held held;
    const T* from = first_ + row * stride_;
    with_packs(whole_, [&](auto whole) {
      constexpr bool kWhole = decltype(whole)::value;
      held.part[0].load(whole, from, kWhole ? N : first_count());
      if constexpr (kGated) {
        held.part[1].load(whole, from + second_, kWhole ? N : second_count());
      }
    });
    return held;
  }

  __device__ __forceinline__ void values(const Held& held, C (&gate)[N], C (&up)[N]) const {
    held.part[0].values(gate);
    if constexpr (kGated) {
      held.part[1].values(up);
      split(gate, up, interleaved_);
    }
  }

  // Rounds. `exists`: else the row is not touched.
  __device__ __forceinline__ void store(int64_t row, C (&gate)[N], C (&up)[N], bool exists) const {
    if constexpr (kGated) join(gate, up, interleaved_);
    T* to = first_ + row * stride_;
    Neighbours<T, N> first, second;
    first.set(gate);
    if constexpr (kGated) second.set(up);
    with_packs(whole_, [&](auto whole) {
      first.store(whole, to, exists ? first_count() : 0);
      if constexpr (kGated) second.store(whole, to + second_, exists ? second_count() : 0);
    });
  }

 private:
  __device__ __forceinline__ int first_count() const {
    return interleaved_ ? min(2 * count_, N) : count_;
  }
  __device__ __forceinline__ int second_count() const {
    return interleaved_ ? 2 * count_ - first_count() : count_;
  }

  T* first_;
  int64_t stride_, second_;
  int count_;
  bool interleaved_, whole_;
};

// The width of a row of preactivations.
template <bool kGated>
__device__ __forceinline__ int64_t width_of(const Epilogue& e) {
  return kGated ? 2 * e.columns : e.columns;
}

// ---- routing weights -------------------------------------------------------------------
//
// 1 where the rows are wanted for themselves, 0 where a row is no assignment's. `e` is an Epilogue
// or a BiasGradient.

template <class Weighted>
__device__ __forceinline__ bool has_weight(const Weighted& e, int32_t assignment) {
  return assignment >= 0 && assignment < e.assignments;
}
template <class Weighted>
__device__ __forceinline__ int32_t assignment_of(const Weighted& e, int64_t row) {
  return e.weights ? e.row_assignment[row] : 0;
}
template <class C, class Weighted>
__device__ __forceinline__ C weight_of(const Weighted& e, int32_t assignment) {
  if (!e.weights) return C(1);
  return has_weight(e, assignment) ? load_as<C>(e.weights, e.weights_dtype, assignment) : C(0);
}

// The same for weights of T or float32, in two steps, of which the first does not wait.
template <class T>
class HeldWeight {
  using C = Compute<T>;
  static constexpr bool kRaw = sizeof(T) == 2;

 public:
  __device__ __forceinline__ HeldWeight(const Epilogue& e, int32_t assignment) {
    if constexpr (kRaw) {
      held_ = e.weights ? 0 : __float_as_uint(1.0f);
      if (!e.weights || !has_weight(e, assignment)) return;
      held_ = e.weights_dtype == Dtype::f32 ? static_cast<const uint32_t*>(e.weights)[assignment]
                                            : static_cast<const uint16_t*>(e.weights)[assignment];
    } else {
      held_ = weight_of<C>(e, assignment);
    }
  }

  __device__ __forceinline__ C value(const Epilogue& e) const {
    if constexpr (kRaw) {
      float narrow, unused;
      from_word(held_, narrow, unused, T());
      return !e.weights || e.weights_dtype == Dtype::f32 ? __uint_as_float(held_) : narrow;
    } else {
      return held_;
    }
  }

 private:
  std::conditional_t<kRaw, uint32_t, C> held_;
};

// ---- the epilogues -----------------------------------------------------------------
//
// `first` (with a gate `gate` and `up`) are the accumulators of the object's columns; a row
// that does not `exist` computes along with its warp, from any row that does, and stores nothing.

template <class T, int N>
class StoreColumns {
  using C = Compute<T>;

 public:
  struct Held {};

  __device__ __forceinline__ StoreColumns(const Epilogue& e, int expert, int64_t column)
      : out_(e.out, e.out_stride, e.at, e.columns, column) {
    if (!e.bias) return;
    const Columns bias(e.bias, e.columns, e.at, e.columns, column);
    bias.values(bias.load(expert), bias_, bias_);
  }

  __device__ __forceinline__ int32_t look_up(int64_t) const { return 0; }
  __device__ __forceinline__ Held fetch(int64_t, int32_t) const { return {}; }
  __device__ __forceinline__ C finish(int64_t row, bool exists, const Held&, const C (&acc)[N],
                                      const C (&)[N]) const {
    C value[N];
#pragma unroll
    for (int j = 0; j < N; ++j) value[j] = bias_[j] + acc[j];
    out_.store(row, value, value, exists);
    return C(0);
  }

 private:
  using Columns = ColumnsOfRows<T, N, false>;
  Columns out_;
  C bias_[N] = {};
};

template <class T, int N, bool kGated>
class ActivateColumns {
  using C = Compute<T>;

 public:
  struct Held {};

  __device__ __forceinline__ ActivateColumns(const Epilogue& e, int expert, int64_t column)
      : activated_(e.activation),
        kept_(e.kept, width_of<kGated>(e), e.at, e.columns, column),
        out_(e.out, e.out_stride, e.at, e.columns, column) {
    if (!e.bias) return;
    const Preactivations bias(e.bias, width_of<kGated>(e), e.at, e.columns, column);
    bias.values(bias.load(expert), gate_bias_, up_bias_);
  }

  __device__ __forceinline__ int32_t look_up(int64_t) const { return 0; }
  __device__ __forceinline__ Held fetch(int64_t, int32_t) const { return {}; }
  __device__ __forceinline__ C finish(int64_t row, bool exists, const Held&, const C (&gate)[N],
                                      const C (&up)[N]) const {
    C g[N], u[N], a[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      g[j] = gate_bias_[j] + gate[j];
      u[j] = up_bias_[j] + up[j];
    }
    activated_.apply(g, u, a);
    if (kept_) kept_.store(row, g, u, exists);
    out_.store(row, a, a, exists);
    return C(0);
  }

 private:
  using Preactivations = ColumnsOfRows<T, N, kGated>;
  Activated<T, kGated> activated_;
  Preactivations kept_;
  ColumnsOfRows<T, N, false> out_;
  C gate_bias_[N] = {}, up_bias_[N] = {};
};

// finish returns the sum over its columns of dA * A: to be added over the row's columns in a fixed
// order, and written to score_parts[tile * R + row].
template <class T, int N, bool kGated>
class BackwardColumns {
  using C = Compute<T>;
  using Preactivations = ColumnsOfRows<T, N, kGated>;

 public:
  struct Held {
    typename Preactivations::Held preactivations;
    HeldWeight<T> weight;
  };

  __device__ __forceinline__ BackwardColumns(const Epilogue& e, int, int64_t column)
      : e_(e),
        activated_(e.activation),
        kept_(e.kept, width_of<kGated>(e), e.at, e.columns, column),
        dh_(e.dh, width_of<kGated>(e), e.at, e.columns, column),
        out_(e.out, e.out_stride, e.at, e.columns, column) {}

  __device__ __forceinline__ int32_t look_up(int64_t row) const { return assignment_of(e_, row); }
  __device__ __forceinline__ Held fetch(int64_t row, int32_t assignment) const {
    return {kept_.load(row), HeldWeight<T>(e_, assignment)};
  }
  __device__ __forceinline__ C finish(int64_t row, bool exists, const Held& held, const C (&da)[N],
                                      const C (&)[N]) const {
    const C w = held.weight.value(e_);
    C g[N], u[N], a[N], score = C(0);
    kept_.values(held.preactivations, g, u);
    activated_.differentiate(g, u, a);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const C upstream = w * da[j];
      g[j] = upstream * g[j], u[j] = upstream * u[j];
      if (j < kept_.count()) score += da[j] * a[j];
      a[j] *= w;
    }
    if (dh_) dh_.store(row, g, u, exists);
    if (out_) out_.store(row, a, a, exists);
    return score;
  }

 private:
  const Epilogue& e_;
  Activated<T, kGated> activated_;
  Preactivations kept_, dh_;
  ColumnsOfRows<T, N, false> out_;
};

// ---- which one it is -------------------------------------------------------------------

// kPaired: the accumulators of a gate and of its up belong together.
struct Storing {
  static constexpr bool kPaired = false, kScores = false;
  template <class T, int N>
  using Columns = StoreColumns<T, N>;
};
template <bool kGated>
struct Activating {
  static constexpr bool kPaired = kGated, kScores = false;
  template <class T, int N>
  using Columns = ActivateColumns<T, N, kGated>;
};
template <bool kGated>
struct Differentiating {
  static constexpr bool kPaired = false, kScores = true;
  template <class T, int N>
  using Columns = BackwardColumns<T, N, kGated>;
};

// Calls body with one of the three, an empty value. A kernel without kBackward never sees one.
template <bool kBackward, class Body>
__device__ __forceinline__ void with_epilogue(const Epilogue& e, Body body) {
  const bool gated = e.activation.gated;
  if (e.kind == EpilogueKind::kStore) {
    body(Storing());
  } else if (e.kind == EpilogueKind::kActivate) {
    gated ? body(Activating<true>()) : body(Activating<false>());
  } else if constexpr (kBackward) {
    gated ? body(Differentiating<true>()) : body(Differentiating<false>());
  }
}

}  // namespace moe_ext::cuda
