// A token's rows, added up by weight, and the way back. Blocks of 256 columns: the sum of a block
// stays in the first-level cache.

constexpr int64_t kSumBlock = 256;

template <class A, class T>
void combine_rows(const RowsOut& out, const Rows& rows, const A* weight, int64_t top_k,
                  int64_t cols) {
  A sum[kSumBlock];
  for (int64_t c0 = 0; c0 < cols; c0 += kSumBlock) {
    const int64_t count = std::min(kSumBlock, cols - c0);
    std::fill(sum, sum + count, A(0));
    for (int64_t j = 0; j < top_k; ++j) {
      if (rows.index[j] < 0) continue;
      const T* row = row_of<T>(rows, j) + c0;
      const A scale = weight ? weight[j] : A(1);
#pragma omp simd
      for (int64_t c = 0; c < count; ++c) sum[c] += scale * A(to_compute(row[c]));
    }
    store_rows<A>(out.from_column(c0), {sum, 1, count, 0});
  }
}

template <class A>
void combine(const RowsOut& out, const Rows& rows, const A* weight, int64_t top_k, int64_t cols) {
  with_any_storage<A>(rows.dtype, [&](auto stored) {
    combine_rows<A, decltype(stored)>(out, rows, weight, top_k, cols);
  });
}

template <class A, class T>
void scale_row(T* drow, const T* dy, A weight, int64_t cols) {
#pragma omp simd
  for (int64_t c = 0; c < cols; ++c) from_compute(drow[c], weight * A(to_compute(dy[c])));
}

// Partial sums of an inner product; a compiler left alone may choose another number, and with it
// another order.
template <class A, class T>
constexpr int kPartialSums =
    MOE_VECTOR_BYTES == 64 && sizeof(A) == 4 ? MOE_VECTOR_BYTES / sizeof(A)
                                             : MOE_VECTOR_BYTES / sizeof(T);

template <class A, class T>
A inner_product(const T* dy, const T* row, int64_t cols) {
  A total = 0;
  for (int64_t c0 = 0; c0 < cols; c0 += kSumBlock) {
    const int64_t end = std::min(c0 + kSumBlock, cols);
    A sum = 0;
#pragma omp simd simdlen(kPartialSums<A, T>) reduction(+ : sum)
    for (int64_t c = c0; c < end; ++c) sum += A(to_compute(dy[c])) * A(to_compute(row[c]));
    total += sum;
  }
  return total;
}

template <class A>
void combine_backward(const RowsOut& drow, A* dweight, const Rows& dy, const Rows& row, A weight,
                      int64_t cols) {
  with_any_storage<A>(dy.dtype, [&](auto stored) {
    using T = decltype(stored);
    const T* upstream = row_of<T>(dy, 0);
    if (drow.data) scale_row(static_cast<T*>(drow.data), upstream, weight, cols);
    if (dweight) *dweight = inner_product<A>(upstream, row_of<T>(row, 0), cols);
  });
}
