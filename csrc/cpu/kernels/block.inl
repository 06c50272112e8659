// Blocks of rows, in memory: panels of the turned rows, then the other rows, padded<T>(cols) each.
//
// A panel is up to kPanelVectors vectors wide. It holds kDepthChunk columns of its rows, a
// column after the other, and all panels of those columns lie before the next columns': a
// product reads them from end to end.

constexpr int64_t kDepthChunk = 1024;  // panels of that depth stay in a core's cache

// How many of m rows are turned over: all but a few that would have a vector to themselves. Of
// weights that need a conversion, tiles read what a panel would first have to copy: there it takes
// more rows.
template <class P>
int64_t turned_rows(int64_t m, Dtype weights) {
  constexpr int64_t lanes = Simd<Lane<P>>::lanes, few = lanes / 4;
  const bool converts = size_of(weights) != sizeof(P);
  const int64_t as_they_are = converts ? std::min<int64_t>(lanes, 2 * kTallTileNT) : 3 * few;
  return m <= as_they_are ? 0 : std::min(m, (m + lanes - 1 - few) / lanes * lanes);
}

// L is what a lane holds, so a column is one of pairs where operands are bf16.
template <class L>
struct Panels {
  static constexpr int64_t lanes = Simd<std::remove_const_t<L>>::lanes;
  L* data;
  int64_t vectors, cols;

  Panels(L* block, int64_t turned, int64_t cols)
      : data(block), vectors((turned + lanes - 1) / lanes), cols(cols) {}

  // body(first vector, width, number)
  template <class Body>
  void for_each(Body body) const {
    for_even_tiles(vectors, kPanelVectors, body);
  }
  // Column k of the panel; the next column is width vectors further, up to the chunk's end.
  L* at(int64_t first, int64_t width, int64_t k) const {
    const int64_t k0 = k / kDepthChunk * kDepthChunk, depth = std::min(kDepthChunk, cols - k0);
    return data + (k0 * vectors + depth * first + (k - k0) * width) * lanes;
  }
  L* others() const { return data + vectors * lanes * padded<L>(cols); }
};

template <class P>
Panels<Lane<P>> panels_of(P* block, int64_t turned, int64_t cols) {
  return {reinterpret_cast<Lane<P>*>(block), turned, lanes_of<Lane<P>>(cols)};
}

// A product is written with one panel of all its rows: column n begins n * ld elements on.
template <class T>
struct Product {
  T* data;
  int64_t ld;
  T* others;

  Product(T* block, int64_t turned, int64_t cols)
      : data(block), ld(round_up(turned, Simd<T>::lanes)), others(block + ld * padded<T>(cols)) {}
};

template <class P>
void load_block(P* block, Rows src, int64_t m, int64_t turned, int64_t cols) {
  using L = Lane<P>;
  constexpr int64_t lanes = Simd<L>::lanes, elements = kElements<L>;
  const Panels<L> panels = panels_of(block, turned, cols);
  with_storage<P>(src.dtype, [&](auto stored) {
    using S = decltype(stored);
    const auto row = [&](int64_t r) {
      return static_cast<const S*>(src.data) + (src.index ? src.index[r] : r) * src.stride;
    };
    panels.for_each([&](int64_t first, int64_t width, int64_t) {
      for (int64_t j = 0; j < width; ++j) {
        const int64_t r0 = (first + j) * lanes, height = std::min(lanes, turned - r0);
        const S* from[lanes];
        for (int64_t i = 0; i < lanes; ++i) from[i] = row(r0 + std::min(i, height - 1));
        for (int64_t k = 0; k < panels.cols; k += lanes) {
          const int64_t count = std::min(lanes, panels.cols - k);
          const int64_t filled = std::min(lanes * elements, cols - k * elements);
          V<L> v[lanes];
          for (int64_t i = 0; i < lanes; ++i) {
            if (filled == lanes * elements) {
              v[i] = load_lanes<L>(from[i] + k * elements);
            } else {
              P part[lanes * elements] = {};
              convert_in(part, from[i] + k * elements, filled);
              v[i] = load(reinterpret_cast<const L*>(part));
            }
          }
          transpose_square<L>(v);
          L* to = panels.at(first, width, k) + j * lanes;
          for (int64_t i = 0; i < count; ++i) store(to + i * width * lanes, v[i]);
        }
      }
    });
  });
  load_rows(reinterpret_cast<P*>(panels.others()), rows_from(src, turned), m - turned, cols);
}

// row[0..count) = a product's row plus bias, rounded.
template <class T, class S>
MOE_INLINE void store_part(S* row, V<T> sums, const T* bias, int64_t count) {
  T part[Simd<T>::lanes];
  if (bias && count == Simd<T>::lanes) {
    sums += load(bias);
  } else if (bias) {
    for (int64_t i = 0; i < count; ++i) sums[i] += bias[i];
  }
  if constexpr (__is_same(S, T)) {
    if (count == Simd<T>::lanes) return store(row, sums);
  }
  store(part, sums);
  convert_out(row, part, count);
}

template <class T>
void store_block(void* dst, Dtype dtype, int64_t stride, const T* block, int64_t m, int64_t turned,
                 int64_t cols, const T* bias) {
  constexpr int64_t lanes = Simd<T>::lanes;
  const Product<const T> product(block, turned, cols);
  with_storage<T>(dtype, [&](auto stored) {
    using S = decltype(stored);
    const auto row = [&](int64_t r) { return static_cast<S*>(dst) + r * stride; };
    for (int64_t r = 0; r < turned; r += lanes) {
      for (int64_t n = 0; n < cols; n += lanes) {
        V<T> v[lanes];
        for (int64_t i = 0; i < lanes; ++i) {
          v[i] = n + i < cols ? load(product.data + (n + i) * product.ld + r) : V<T>{};
        }
        transpose_square<T>(v);
        for (int64_t i = 0; i < std::min(lanes, turned - r); ++i) {
          store_part<T>(row(r + i) + n, v[i], bias ? bias + n : nullptr, std::min(lanes, cols - n));
        }
      }
    }
    for (int64_t r = turned; r < m; ++r) {
      const T* from = product.others + (r - turned) * padded<T>(cols);
      for (int64_t n = 0; n < cols; n += lanes) {
        store_part<T>(row(r) + n, load(from + n), bias ? bias + n : nullptr,
                      std::min(lanes, cols - n));
      }
    }
  });
}
