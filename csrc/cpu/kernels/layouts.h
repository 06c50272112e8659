// What the kernels read and write: dtypes, rows and matrices in memory, blocks in scratch.

#pragma once

#include <cstdint>

namespace moe_ext::cpu {

enum class Dtype { f64, f32, bf16, f16 };

constexpr int64_t size_of(Dtype dtype) {
  return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
}

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// P is what products multiply; they are added up in Sum<P>.
template <class P>
struct Operand {
  using Sum = P;
  static constexpr Dtype dtype = sizeof(P) == 8 ? Dtype::f64 : Dtype::f32;
};
template <>
struct Operand<bf16> {
  using Sum = float;
  static constexpr Dtype dtype = Dtype::bf16;
};
template <class P>
using Sum = typename Operand<P>::Sum;

// ---- in memory

// Rows to read: row r starts at data + (index ? index[r] : r) * stride elements.
struct Rows {
  const void* data;
  Dtype dtype;
  int64_t stride;
  const int32_t* index = nullptr;

  Rows from_row(int64_t r) const {
    if (index) return {data, dtype, stride, index + r};
    return {static_cast<const char*>(data) + r * stride * size_of(dtype), dtype, stride};
  }
  Rows from_column(int64_t c) const {
    return {static_cast<const char*>(data) + c * size_of(dtype), dtype, stride, index};
  }
  Rows with_index(const int32_t* rows) const { return {data, dtype, stride, rows}; }
};

// Rows to write, rounded to nearest even: row r starts at data + r * stride elements.
struct RowsOut {
  void* data;
  Dtype dtype;
  int64_t stride;

  RowsOut from_row(int64_t r) const {
    return {static_cast<char*>(data) + r * stride * size_of(dtype), dtype, stride};
  }
  RowsOut from_column(int64_t c) const {
    return {static_cast<char*>(data) + c * size_of(dtype), dtype, stride};
  }
};

// One expert's weight as W(n, k): element (n, k) at data + n*stride_n + k*stride_k.
// One of the strides is 1 in the layouts that are fast.
struct Weight {
  const void* data;
  Dtype dtype;
  int64_t stride_n, stride_k;
};

// ---- in scratch memory

constexpr int64_t kLineBytes = 64;  // of a cache
constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The leading dimension: whole vectors, and one more line so that rows a power of two apart do
// not fall into one cache set.
template <class T>
constexpr int64_t padded(int64_t cols) {
  constexpr int64_t line = kLineBytes / sizeof(T);
  return round_up(cols, line) + line;
}

// Rows as they are, `ld` elements apart.
template <class T>
struct Matrix {
  T* data;
  int64_t rows, cols, ld;

  Matrix from_row(int64_t r, int64_t count) const { return {data + r * ld, count, cols, ld}; }
  Matrix from_column(int64_t c, int64_t count) const { return {data + c, rows, count, ld}; }
};

// The first `packed` rows in micropanels, a vector of rows for each column (each pair of columns
// of bf16), as products like them; then the other rows as they are, padded<T>(cols) apart.
// Where blocks meet in a product, `packed` is the same in all of them.
template <class T>
struct Block {
  T* data;
  int64_t rows, packed, cols;
};

// The elements that a block takes. Rows may be cut at whole kRowUnits into the blocks of several
// products without changing how any of them is summed.
constexpr int64_t kRowUnit = 16;
template <class T>
constexpr int64_t block_size(int64_t rows, int64_t cols) {
  return round_up(rows, kRowUnit) * padded<T>(cols);
}

// Pieces of one allocation, each on a cache line of its own, handed out from its beginning; a
// copy hands out the same again. Without memory it only counts them.
struct Scratch {
  char* memory;
  int64_t used = 0;

  template <class T>
  T* take(int64_t elements) {
    T* piece = memory ? reinterpret_cast<T*>(memory + used) : nullptr;
    used += round_up(elements * int64_t(sizeof(T)), kLineBytes);
    return piece;
  }
  Scratch take_scratch(int64_t bytes) { return {take<char>(bytes)}; }
};

// The bytes of the pieces that carve(Scratch&) takes.
template <class Carve>
int64_t bytes_of(Carve carve) {
  Scratch counted{nullptr};
  carve(counted);
  return counted.used;
}

}  // namespace moe_ext::cpu
