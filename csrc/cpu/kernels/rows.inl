// Rows in and out of scratch memory, and the sums over a token's or an expert's rows.

template <class P>
void load_rows(P* dst, Rows src, int64_t rows, int64_t cols) {
  const int64_t ld = padded<P>(cols), whole = round_up(cols, kPadBytes / sizeof(P));
  with_storage<P>(src.dtype, [&](auto stored) {
    using S = decltype(stored);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t from = src.index ? src.index[r] : r;
      convert_in(dst + r * ld, static_cast<const S*>(src.data) + from * src.stride, cols);
      std::fill(dst + r * ld + cols, dst + r * ld + whole, P());
    }
  });
}

template <class T>
void store_rows(void* dst, Dtype dtype, int64_t stride, const T* src, int64_t ld, int64_t rows,
                int64_t cols) {
  with_storage<T>(dtype, [&](auto stored) {
    using S = decltype(stored);
    for (int64_t r = 0; r < rows; ++r)
      convert_out(static_cast<S*>(dst) + r * stride, src + r * ld, cols);
  });
}

template <class T>
void unweave(T* even, T* odd, const T* both, int64_t m, int64_t cols) {
  for (int64_t r = 0; r < m; ++r) {
    const T* from = both + r * padded<T>(2 * cols);
    T *e = even + r * padded<T>(cols), *o = odd + r * padded<T>(cols);
    for (int64_t i = 0; i < cols; ++i) {
      e[i] = from[2 * i];
      o[i] = from[2 * i + 1];
    }
  }
}

// Blocks of 256 columns: the sum of a block stays in the first-level cache.
constexpr int64_t kSumBlock = 256;

template <class T>
void combine(void* out, Dtype dtype, const T* rows, int64_t ld, const int32_t* index,
             const T* weight, int64_t top_k, int64_t cols) {
  T sum[kSumBlock];
  for (int64_t c0 = 0; c0 < cols; c0 += kSumBlock) {
    const int64_t count = std::min(kSumBlock, cols - c0);
    std::fill(sum, sum + count, T(0));
    for (int64_t j = 0; j < top_k; ++j) {
      if (index[j] < 0) continue;
      const T* row = rows + index[j] * ld + c0;
      const T scale = weight ? weight[j] : T(1);
      for (int64_t c = 0; c < count; ++c) sum[c] += scale * row[c];
    }
    store_rows<T>(static_cast<char*>(out) + c0 * size_of(dtype), dtype, 0, sum, 0, 1, count);
  }
}

template <class T>
void sum_rows(void* out, Dtype dtype, Rows src, const T* weight, int64_t rows, int64_t cols) {
  T total[kSumBlock], sum[kSumBlock], row[kSumBlock];
  with_storage<T>(src.dtype, [&](auto stored) {
    using S = decltype(stored);
    for (int64_t c0 = 0; c0 < cols; c0 += kSumBlock) {
      const int64_t count = std::min(kSumBlock, cols - c0);
      std::fill(total, total + count, T(0));
      for (int64_t r0 = 0; r0 < rows; r0 += kRowChunk) {
        std::fill(sum, sum + count, T(0));
        for (int64_t r = r0; r < std::min(rows, r0 + kRowChunk); ++r) {
          const int64_t from = src.index ? src.index[r] : r;
          convert_in(row, static_cast<const S*>(src.data) + from * src.stride + c0, count);
          const T scale = weight ? weight[r] : T(1);
          for (int64_t c = 0; c < count; ++c) sum[c] += scale * row[c];
        }
        for (int64_t c = 0; c < count; ++c) total[c] += sum[c];
      }
      store_rows<T>(static_cast<char*>(out) + c0 * size_of(dtype), dtype, 0, total, 0, 1, count);
    }
  });
}

// Two rows' inner product, in lanes and then a tree, the same for every call.
template <class T>
T dot(Rows left, Rows right, int64_t cols) {
  T a[kSumBlock], b[kSumBlock], total = 0;
  for (int64_t c0 = 0; c0 < cols; c0 += kSumBlock) {
    const int64_t count = std::min(kSumBlock, cols - c0), whole = round_up(count, Simd<T>::lanes);
    for (auto [to, from] : {std::pair(a, left), std::pair(b, right)}) {
      with_storage<T>(from.dtype, [&, to = to, from = from](auto stored) {
        convert_in(to, static_cast<const decltype(stored)*>(from.data) + c0, count);
      });
      std::fill(to + count, to + whole, T(0));
    }
    V<T> sum = {};
    for (int64_t c = 0; c < whole; c += Simd<T>::lanes) sum += load(a + c) * load(b + c);
    T part = 0;
    for (int l = 0; l < Simd<T>::lanes; ++l) part += sum[l];
    total += part;
  }
  return total;
}
