// Sums over an expert's rows, over all rows of a matrix, and along rows.

template <class T>
void sum_rows(const RowsOut& out, const Rows& src, const T* weight, int64_t rows, int64_t cols) {
  T total[kSumBlock], sum[kSumBlock], row[kSumBlock];
  with_storage<T>(src.dtype, [&](auto stored) {
    using S = decltype(stored);
    for (int64_t c0 = 0; c0 < cols; c0 += kSumBlock) {
      const int64_t count = std::min(kSumBlock, cols - c0);
      std::fill(total, total + count, T(0));
      for (int64_t r0 = 0; r0 < rows; r0 += KC_TN) {
        std::fill(sum, sum + count, T(0));
        for (int64_t r = r0; r < std::min(rows, r0 + KC_TN); ++r) {
          convert_in(row, row_of<S>(src, r) + c0, count);
          const T scale = weight ? weight[r] : T(1);
          for (int64_t c = 0; c < count; ++c) sum[c] += scale * row[c];
        }
        for (int64_t c = 0; c < count; ++c) total[c] += sum[c];
      }
      store_rows<T>(out.from_column(c0), {total, 1, count, 0});
    }
  });
}

// In lanes, which are then added up in order.
template <class T>
T dot(const Rows& left, const Rows& right, int64_t cols) {
  T a[kSumBlock], b[kSumBlock], total = 0;
  for (int64_t c0 = 0; c0 < cols; c0 += kSumBlock) {
    const int64_t count = std::min(kSumBlock, cols - c0), whole = round_up(count, Simd<T>::lanes);
    load_rows<T>({a, 1, count, 0}, left.from_column(c0));
    load_rows<T>({b, 1, count, 0}, right.from_column(c0));
    V<T> sum = {};
    for (int64_t c = 0; c < whole; c += Simd<T>::lanes) sum += load(a + c) * load(b + c);
    T part = 0;
    for (int l = 0; l < Simd<T>::lanes; ++l) part += sum[l];
    total += part;
  }
  return total;
}

// Each column of a, added up in float64.
template <class A>
void sum_columns(A* out, const Matrix<const A>& a) {
  std::vector<double> sum(a.cols, 0.0);
  for (int64_t r = 0; r < a.rows; ++r)
    for (int64_t c = 0; c < a.cols; ++c) sum[c] += a.data[r * a.ld + c];
  for (int64_t c = 0; c < a.cols; ++c) out[c] = static_cast<A>(sum[c]);
}
