// Rows into blocks and back: micropanels of the packed rows, then the other rows as they are.
//
// A micropanel is up to NR_VECTORS vectors wide. It holds KC columns of its rows, a column after
// the other, and all micropanels of those columns lie before the next columns': a product reads
// them from end to end.

constexpr int64_t KC = 1024;  // micropanels of that depth stay in a core's cache

// All but a few rows that would have a vector to themselves. Of weights that need a conversion,
// microkernels read what a micropanel would first have to copy: there it takes more rows.
template <class P>
int64_t packed_rows(int64_t rows, Dtype weights) {
  constexpr int64_t lanes = Simd<Lane<P>>::lanes, few = lanes / 4;
  const bool converts = size_of(weights) != sizeof(P);
  const int64_t as_they_are = converts ? std::min<int64_t>(lanes, 2 * MR_NT_FEW) : 3 * few;
  return rows <= as_they_are ? 0 : std::min(rows, (rows + lanes - 1 - few) / lanes * lanes);
}

// A block of operands. L is what a lane holds, so a column is one of pairs where they are bf16.
template <class L>
struct Micropanels {
  static constexpr int64_t lanes = Simd<L>::lanes;
  L* data;
  int64_t vectors, cols;
  Matrix<L> others;  // the rows as they are

  template <class P>
  explicit Micropanels(const Block<P>& block)
      : data(reinterpret_cast<L*>(block.data)),
        vectors((block.packed + lanes - 1) / lanes),
        cols(lanes_of<L>(block.cols)),
        others{data + vectors * lanes * padded<L>(cols), block.rows - block.packed, cols,
               padded<L>(cols)} {}

  // body(first vector, width, number)
  template <class Body>
  void for_each(Body body) const {
    for_even_tiles(vectors, NR_VECTORS, body);
  }
  // Column k of the micropanel; the next column is width vectors further, up to the chunk's end.
  L* at(int64_t first, int64_t width, int64_t k) const {
    const int64_t k0 = k / KC * KC, depth = std::min(KC, cols - k0);
    return data + (k0 * vectors + depth * first + (k - k0) * width) * lanes;
  }
};

// A block of sums: one micropanel of all packed rows, whose column n begins n * ld elements on.
template <class T>
struct Product {
  T* data;
  int64_t ld;
  Matrix<T> others;

  explicit Product(const Block<T>& block)
      : data(block.data),
        ld(round_up(block.packed, Simd<T>::lanes)),
        others{data + ld * padded<T>(block.cols), block.rows - block.packed, block.cols,
               padded<T>(block.cols)} {}
};

// ---- rows as they are

template <class P>
void load_rows(const Matrix<P>& to, const Rows& from) {
  const int64_t whole = round_up(to.cols, kLineBytes / sizeof(P));
  with_storage<P>(from.dtype, [&](auto stored) {
    for (int64_t r = 0; r < to.rows; ++r) {
      P* row = to.data + r * to.ld;
      convert_in(row, row_of<decltype(stored)>(from, r), to.cols);
      std::fill(row + to.cols, row + whole, P());
    }
  });
}

template <class T>
void store_rows(const RowsOut& to, const Matrix<T>& from) {
  with_any_storage<T>(to.dtype, [&](auto stored) {
    using S = decltype(stored);
    for (int64_t r = 0; r < from.rows; ++r)
      convert_out(static_cast<S*>(to.data) + r * to.stride, from.data + r * from.ld, from.cols);
  });
}

template <class T>
void unweave(const Block<T>& even, const Block<T>& odd, const Block<T>& both) {
  for (int64_t r = 0; r < both.rows; ++r) {
    const T* from = both.data + r * padded<T>(both.cols);
    T *e = even.data + r * padded<T>(even.cols), *o = odd.data + r * padded<T>(odd.cols);
    for (int64_t i = 0; i < even.cols; ++i) {
      e[i] = from[2 * i];
      o[i] = from[2 * i + 1];
    }
  }
}

// ---- blocks

template <class P>
void load_block(const Block<P>& to, const Rows& from) {
  using L = Lane<P>;
  constexpr int64_t lanes = Simd<L>::lanes, elements = kElements<L>;
  const Micropanels<L> panels(to);
  with_storage<P>(from.dtype, [&](auto stored) {
    using S = decltype(stored);
    panels.for_each([&](int64_t first, int64_t width, int64_t) {
      for (int64_t j = 0; j < width; ++j) {
        const int64_t r0 = (first + j) * lanes, height = std::min(lanes, to.packed - r0);
        const S* row[lanes];
        for (int64_t i = 0; i < lanes; ++i) row[i] = row_of<S>(from, r0 + std::min(i, height - 1));
        for (int64_t k = 0; k < panels.cols; k += lanes) {
          const int64_t count = std::min(lanes, panels.cols - k);
          const int64_t filled = std::min(lanes * elements, to.cols - k * elements);
          V<L> v[lanes];
          for (int64_t i = 0; i < lanes; ++i) {
            if (filled == lanes * elements) {
              v[i] = load_lanes<L>(row[i] + k * elements);
            } else {
              P part[lanes * elements] = {};
              convert_in(part, row[i] + k * elements, filled);
              v[i] = load(reinterpret_cast<const L*>(part));
            }
          }
          transpose_square<L>(v);
          L* column = panels.at(first, width, k) + j * lanes;
          for (int64_t i = 0; i < count; ++i) store(column + i * width * lanes, v[i]);
        }
      }
    });
  });
  const int64_t others = panels.others.rows;
  load_rows<P>({reinterpret_cast<P*>(panels.others.data), others, to.cols, padded<P>(to.cols)},
               from.from_row(to.packed));
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
void store_block(const RowsOut& to, const Block<T>& from, const T* bias) {
  constexpr int64_t lanes = Simd<T>::lanes;
  const int64_t cols = from.cols;
  const Product<T> product(from);
  with_storage<T>(to.dtype, [&](auto stored) {
    using S = decltype(stored);
    const auto row = [&](int64_t r) { return static_cast<S*>(to.data) + r * to.stride; };
    for (int64_t r = 0; r < from.packed; r += lanes) {
      for (int64_t n = 0; n < cols; n += lanes) {
        V<T> v[lanes];
        for (int64_t i = 0; i < lanes; ++i) {
          v[i] = n + i < cols ? load(product.data + (n + i) * product.ld + r) : V<T>{};
        }
        transpose_square<T>(v);
        for (int64_t i = 0; i < std::min(lanes, from.packed - r); ++i) {
          store_part<T>(row(r + i) + n, v[i], bias ? bias + n : nullptr, std::min(lanes, cols - n));
        }
      }
    }
    for (int64_t r = 0; r < product.others.rows; ++r) {
      const T* sums = product.others.data + r * product.others.ld;
      for (int64_t n = 0; n < cols; n += lanes) {
        store_part<T>(row(from.packed + r) + n, load(sums + n), bias ? bias + n : nullptr,
                      std::min(lanes, cols - n));
      }
    }
  });
}

template <class T>
void add_block(const Block<T>& to, const Block<T>& from) {
  const Product<T> sums(to), more(from);
  for (int64_t i = 0; i < sums.ld * to.cols; ++i) sums.data[i] += more.data[i];
  for (int64_t r = 0; r < sums.others.rows; ++r) {
    T* row = sums.others.data + r * sums.others.ld;
    const T* other = more.others.data + r * more.others.ld;
    for (int64_t c = 0; c < to.cols; ++c) row[c] += other[c];
  }
}
