// Products of blocks with weights, over microkernels.inl; k counts lanes (of pairs, where operands
// are bf16). Every k runs upwards in chunks, so a sum has the same bits whichever rows and columns
// lie beside it, as long as the same microkernel takes it.

constexpr int64_t KC_NN = 128;

// ---- c = a W^T, W's rows along k

template <class L>
constexpr int64_t weight_copy_stride(int64_t k) {
  return padded<L>(std::min(k, KC));
}

// `copy` holds kWeightRows rows of weights, copy_stride apart.
template <class L, class S, class T = LaneSum<L>>
void matmul_nt(const Product<T>& c, const Micropanels<L>& a, const Weight& w, int64_t elements,
               int64_t n0, int64_t n1, L* copy) {
  // What microkernels find where weights lie: the lanes of operands, or what they convert to lanes.
  using InPlace = std::conditional_t<kElements<L> == 2, L, S>;
  constexpr bool same = __is_same(InPlace, L);
  constexpr int64_t lanes = Simd<L>::lanes, one = sizeof(InPlace), line = kLineBytes / one;
  const int64_t k = lanes_of<L>(elements), copy_stride = weight_copy_stride<L>(k);
  const bool whole_lanes = w.stride_n % kElements<L> == 0;
  const int64_t stride_n = w.stride_n / kElements<L>;
  const bool packed = a.vectors > 0;
  // Of few rows memory is the limit: they read weights where they lie, in one or two tall tiles,
  // and to the rows' ends before other rows begin.
  const bool few = !packed && a.others.rows <= 2 * MR_NT_FEW;
  const int64_t tallest = few ? MR_NT_FEW : MR_NT, span = few ? kWeightRows : n1 - n0;
  // Micropanels lie in chunks of KC; without them chunks are alike, so that a short one never
  // has to prefetch a long one.
  const int64_t chunks = (k + KC - 1) / KC;
  const int64_t deepest = packed ? KC : round_up((k + chunks - 1) / chunks, line);
  for (int64_t begin = n0; begin < n1; begin += span)
    for (int64_t k0 = 0; k0 < k; k0 += deepest) {
      const int64_t depth = std::min(deepest, k - k0), whole = round_up(depth, lanes);
      const bool adds = k0 > 0;
      for (int64_t n = begin, end = std::min(begin + span, n1); n < end; n += kWeightRows) {
        const int64_t count = std::min<int64_t>(kWeightRows, n1 - n);
        const S* from = static_cast<const S*>(w.data) + n * w.stride_n + k0 * kElements<L>;
        const InPlace* source = reinterpret_cast<const InPlace*>(from);
        const InPlace* after = source + kWeightRows * stride_n;
        if (few) after = k0 + depth < k ? source + depth : after - k0;
        const char* next = reinterpret_cast<const char*>(after);
        // Whole lanes of operands, or any for microkernels that convert as they read, are taken
        // from where they lie; others through a converted copy, padded with zeros.
        const int64_t filled = std::min(depth * kElements<L>, elements - k0 * kElements<L>);
        const bool in_place =
            count == kWeightRows && filled == whole * kElements<L> && whole_lanes && (same || few);
        if (!in_place) {
          for (int64_t r = 0; r < kWeightRows; ++r) {
            auto* to = reinterpret_cast<Element<L>*>(copy + r * copy_stride);
            const int64_t columns = r < count ? filled : 0;
            if (columns) convert_in(to, from + r * w.stride_n, columns);
            std::fill(to + columns, to + whole * kElements<L>, Element<L>());
          }
        }
        const L* weight = same && in_place ? reinterpret_cast<const L*>(source) : copy;
        const int64_t stride = same && in_place ? stride_n : copy_stride;
        a.for_each([&](int64_t first, int64_t width, int64_t tile) {
          with_height<NR_VECTORS>(width, [&](auto v) {
            constexpr int at_once = rows_at_once(v, kWeightRows);
            for (int64_t r = 0; r < kWeightRows; r += at_once) {
              const char* next_rows = next + r * stride_n * one;
              const Prefetch ahead =
                  tile == 0 ? Prefetch{next_rows, stride_n * one, at_once, at_once * one}
                            : Prefetch{next, 0, 0, 0};
              packed_kernel<L, at_once, v>(c.data + (n - n0 + r) * c.ld + first * lanes, c.ld, adds,
                                           weight + r * stride, stride, a.at(first, width, k0),
                                           depth, ahead);
            }
          });
        });
        for_even_tiles(a.others.rows, tallest, [&](int64_t row, int64_t height, int64_t tile) {
          const Prefetch ahead = {next, stride_n * one, kWeightRows, lanes * one};
          const int64_t lda = a.others.ld, ldc = c.others.ld;
          const L* rows = a.others.data + row * lda + k0;
          T* to = c.others.data + row * ldc + (n - n0);
          const auto take = [&](auto h, auto prefetches) {
            if (in_place) {
              nt_kernel<L, h, prefetches>(to, ldc, adds, rows, lda, source, stride_n, whole, ahead);
            } else {
              nt_kernel<L, h, prefetches>(to, ldc, adds, rows, lda, weight, stride, whole, ahead);
            }
          };
          with_height<MR_NT_FEW>(height, [&](auto h) {
            if (!packed && tile == 0) {
              take(h, std::true_type());
            } else {
              take(h, std::false_type());
            }
          });
        });
      }
    }
}

// ---- c = a W^T, W's columns along k

// Reads W where it lies; its columns are whole pairs of vectors.
template <class L, class S, class T = LaneSum<L>>
void wide_tiles(const Matrix<T>& c, bool accumulate, const Matrix<L>& a, const S* w,
                int64_t stride_k) {
  constexpr int64_t lanes = Simd<L>::lanes;
  for_even_tiles(a.rows, MR_WIDE, [&](int64_t row, int64_t height, int64_t) {
    with_height<MR_WIDE>(height, [&](auto h) {
      constexpr int64_t wide = MR_NN / h * 2 * lanes;
      for (int64_t n = 0; n < c.cols;) {
        const auto take = [&](auto vectors) {
          wide_kernel<L, h, vectors>(c.data + row * c.ld + n, c.ld, accumulate, a.data + row * a.ld,
                                     a.ld, w + n, stride_k, a.cols);
          n += vectors * lanes;
        };
        if (n + wide <= c.cols) {
          take(std::integral_constant<int, MR_NN / h * 2>());
        } else {
          take(std::integral_constant<int, 2>());
        }
      }
    });
  });
}

// The same sums for few rows, four rows of W at a time; `sums` holds MR_WIDE rows of cols.
template <class T, class S>
void long_tiles(const Matrix<T>& c, bool accumulate, const Matrix<T>& a, const S* w,
                int64_t stride_k, T* sums) {
  constexpr int64_t at_once = 4;
  for_even_tiles(a.rows, MR_WIDE, [&](int64_t row, int64_t height, int64_t) {
    with_height<MR_WIDE>(height, [&](auto h) {
      for (int64_t i = 0; i < a.cols; i += at_once) {
        with_height<at_once>(std::min(at_once, a.cols - i), [&](auto rows) {
          long_kernel<T, h, rows>(c.data + row * c.ld, c.ld, accumulate, sums, i == 0,
                                  i + at_once >= a.cols, a.data + row * a.ld + i, a.ld,
                                  w + i * stride_k, stride_k, c.cols);
        });
      }
    });
  });
}

// Rows of weights across k as micropanels, two vectors wide, one after the other; a row past the
// last element of k counts as zero.
template <class L, class S>
void pack_weights(L* panels, int64_t panel_size, const S* from, const Weight& w, int64_t elements,
                  int64_t cols) {
  constexpr int64_t width = 2 * Simd<L>::lanes, each = kElements<L>;
  for (int64_t i = 0; i < lanes_of<L>(elements); ++i) {
    const S* row = from + i * each * w.stride_k;
    for (int64_t n = 0; n < cols; n += width) {
      const int64_t count = std::min(width, cols - n);
      L* to = panels + n / width * panel_size + i * width;
      const S* at = row + n * w.stride_n;
      if (count == width && w.stride_n == 1 && (i + 1) * each <= elements) {
        V<L> left, right;
        load_two<L>(at, w.stride_k, left, right);
        store(to, left);
        store(to + width / 2, right);
        continue;
      }
      auto* element = reinterpret_cast<Element<L>*>(to);
      std::fill(element, element + width * each, Element<L>());
      for (int64_t e = 0; e < std::min(each, elements - i * each); ++e)
        for (int64_t j = 0; j < count; ++j)
          convert_in(element + j * each + e, at + e * w.stride_k + j * w.stride_n, 1);
    }
  }
}

// `scratch` is for the packed weights, or for long_tiles' sums.
template <class L, class S, class T = LaneSum<L>>
void matmul_nn(const Matrix<T>& c, const Matrix<L>& a, const Weight& w, int64_t elements,
               int64_t n0, L* scratch) {
  constexpr int64_t width = 2 * Simd<L>::lanes, line = kLineBytes / sizeof(S), each = kElements<L>;
  const int64_t m = a.rows, n1 = n0 + c.cols;
  const int64_t k = lanes_of<L>(elements), lane_stride = w.stride_k * each;
  const int64_t lines = (c.cols + line - 1) / line;
  for (int64_t k0 = 0; k0 < k; k0 += KC_NN) {
    const int64_t depth = std::min(KC_NN, k - k0);
    const int64_t filled = std::min(depth * each, elements - k0 * each);
    const S* source = static_cast<const S*>(w.data) + n0 * w.stride_n + k0 * lane_stride;
    // Read by many tiles, weights are better packed, which also converts them once.
    const bool in_place = m <= 2 * MR_WIDE || (kManyReadInPlace && __is_same(S, L));
    if (w.stride_n == 1 && c.cols % width == 0 && filled == depth * each && in_place) {
      const Matrix<L> part = a.from_column(k0, depth);
      // Wide tiles take any number of rows; where only few are read in place, long ones do.
      if constexpr (kManyReadInPlace) {
        wide_tiles(c, k0 > 0, part, source, w.stride_k);
      } else {
        long_tiles(c, k0 > 0, part, source, w.stride_k, scratch);
      }
      continue;
    }
    // All micropanels of these rows at once: W is read along its rows, as memory likes it. Each has
    // room for a row more, so that they do not fall into one cache set.
    const int64_t panel_size = (depth + 1) * width;
    pack_weights(scratch, panel_size, source, w, filled, c.cols);
    // The tiles share out the lines of the rows that come next: the next chunk's, or the
    // first chunk's of the next columns.
    const S* next = k0 + depth < k ? source + depth * lane_stride
                                   : static_cast<const S*>(w.data) + n1 * w.stride_n;
    int64_t turn = 0;
    for (int64_t n = n0; n < n1; n += width) {
      const L* b = scratch + (n - n0) / width * panel_size;
      for_even_tiles(m, MR_NN, [&](int64_t row, int64_t height, int64_t) {
        const Prefetch ahead = {reinterpret_cast<const char*>(next) + turn++ % lines * kLineBytes,
                                0, 1, int64_t(lane_stride * sizeof(S))};
        T* tile = c.data + row * c.ld + (n - n0);
        const Target<T> to = {tile, c.ld, k0 > 0 ? tile : nullptr, c.ld, false};
        with_height<MR_NN>(height, [&](auto h) {
          nn_kernel<L, h>(to, a.data + row * a.ld + k0, a.ld, 1, b, width, depth, ahead);
        });
      });
    }
  }
}

// ---- of whole blocks, and of rows as they are

template <class L>
L* take_weight_copy(Scratch& scratch, int64_t k) {
  return scratch.take<L>(kWeightRows * weight_copy_stride<L>(k));
}
template <class L>
L* take_packed_weights(Scratch& scratch, int64_t k) {
  return scratch.take<L>(NC * std::max<int64_t>(std::min(k, KC_NN) + 1, MR_WIDE));
}

template <class P, class T = Sum<P>>
void matmul_block(const Block<T>& c, const Block<P>& a, const Weight& w, int64_t n0,
                  Scratch scratch) {
  using L = Lane<P>;
  if (a.cols == 0) {
    std::fill(c.data, c.data + block_size<T>(c.rows, c.cols), T(0));
    return;
  }
  const Micropanels<L> rows(a);
  const Product<T> product(c);
  with_storage<P>(w.dtype, [&](auto stored) {
    using S = decltype(stored);
    if (w.stride_k == 1) {
      matmul_nt<L, S>(product, rows, w, a.cols, n0, n0 + c.cols,
                      take_weight_copy<L>(scratch, rows.cols));
    } else {
      matmul_nn<L, S>(product.others, rows.others, w, a.cols, n0,
                      take_packed_weights<L>(scratch, rows.cols));
    }
  });
}

// What a product of rows needs to go through blocks.
template <class P, class T = Sum<P>>
struct BlocksOfRows {
  P* rows;
  T* product;

  BlocksOfRows(Scratch& scratch, int64_t m, int64_t k)
      : rows(scratch.take<P>(block_size<P>(m, k))),
        product(scratch.take<T>(block_size<T>(m, NC))) {}
};

template <class P, class T = Sum<P>>
void matmul(const Matrix<T>& c, const Matrix<P>& a, const Weight& w, int64_t n0, Scratch scratch) {
  using L = Lane<P>;
  const int64_t k = a.cols;
  if (w.stride_k != 1 && k > 0) {
    const Matrix<L> rows = {reinterpret_cast<L*>(a.data), a.rows, lanes_of<L>(k),
                            a.ld / kElements<L>};
    with_storage<P>(w.dtype, [&](auto stored) {
      matmul_nn<L, decltype(stored)>(c, rows, w, k, n0, take_packed_weights<L>(scratch, rows.cols));
    });
    return;
  }
  const BlocksOfRows<P> blocks(scratch, a.rows, k);
  const int64_t packed = packed_rows<P>(a.rows, w.dtype);
  const Block<P> rows = {blocks.rows, a.rows, packed, k};
  const Block<T> product = {blocks.product, a.rows, packed, c.cols};
  load_block(rows, {a.data, Operand<P>::dtype, a.ld});
  matmul_block<P>(product, rows, w, n0, scratch);
  store_block<T>({c.data, Operand<T>::dtype, c.ld}, product, nullptr);
}

template <class P>
int64_t matmul_scratch(int64_t rows, int64_t k) {
  using L = Lane<P>;
  const int64_t lanes = lanes_of<L>(k);
  return std::max(bytes_of([&](Scratch& scratch) {
                    BlocksOfRows<P>(scratch, rows, k);
                    take_weight_copy<L>(scratch, lanes);
                  }),
                  bytes_of([&](Scratch& scratch) { take_packed_weights<L>(scratch, lanes); }));
}
