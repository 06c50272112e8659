// Matrix products of blocks, cut into register tiles (tiles.inl), whose k counts lanes (of
// pairs, where operands are bf16). Every k runs upwards in chunks, so a sum has the same bits
// whichever rows and columns lie beside it, as long as the same kind of tile takes it.

constexpr int64_t kDepthChunkNN = 128;

// ---- c = a W^T, W's rows along k

// Turned rows come as `panels` and go to `product`; `others` rows come as a, and go to
// product.others.
template <class L, class S, class T = LaneSum<L>>
void matmul_nt(const Product<T>& product, int64_t ldc, const Panels<const L>& panels, const L* a,
               int64_t lda, int64_t others, Weight w, int64_t elements, int64_t n0, int64_t n1,
               L* scratch) {
  // What tiles find where weights lie: the lanes of operands, or what they convert to lanes.
  using InPlace = std::conditional_t<kElements<L> == 2, L, S>;
  constexpr bool same = __is_same(InPlace, L);
  constexpr int64_t lanes = Simd<L>::lanes, one = sizeof(InPlace), line = kPadBytes / one;
  const int64_t k = lanes_of<L>(elements), copy_stride = padded<L>(std::min(k, kDepthChunk));
  const bool whole_lanes = w.stride_n % kElements<L> == 0;
  const int64_t stride_n = w.stride_n / kElements<L>;
  const bool turned = panels.vectors > 0;
  // Of few rows memory is the limit: they read weights where they lie, in one or two tall tiles,
  // and to the rows' ends before other rows begin.
  const bool few = !turned && others <= 2 * kTallTileNT;
  const int64_t tallest = few ? kTallTileNT : kTileNT, span = few ? kOctet : n1 - n0;
  // Panels lie in chunks of kDepthChunk; without them chunks are alike, so that a short one never
  // has to prefetch a long one.
  const int64_t chunks = (k + kDepthChunk - 1) / kDepthChunk;
  const int64_t deepest = turned ? kDepthChunk : round_up((k + chunks - 1) / chunks, line);
  for (int64_t begin = n0; begin < n1; begin += span)
    for (int64_t k0 = 0; k0 < k; k0 += deepest) {
      const int64_t depth = std::min(deepest, k - k0), whole = round_up(depth, lanes);
      const bool adds = k0 > 0;
      for (int64_t n = begin, end = std::min(begin + span, n1); n < end; n += kOctet) {
        const int64_t count = std::min<int64_t>(kOctet, n1 - n);
        const S* from = static_cast<const S*>(w.data) + n * w.stride_n + k0 * kElements<L>;
        const InPlace* source = reinterpret_cast<const InPlace*>(from);
        const InPlace* after = source + kOctet * stride_n;
        if (few) after = k0 + depth < k ? source + depth : after - k0;
        const char* next = reinterpret_cast<const char*>(after);
        // Whole lanes of operands, or any for tiles that convert as they read, are taken from
        // where they lie; others through a converted copy, padded with zeros.
        const int64_t filled = std::min(depth * kElements<L>, elements - k0 * kElements<L>);
        const bool in_place =
            count == kOctet && filled == whole * kElements<L> && whole_lanes && (same || few);
        if (!in_place) {
          for (int64_t r = 0; r < kOctet; ++r) {
            auto* copy = reinterpret_cast<Element<L>*>(scratch + r * copy_stride);
            const int64_t columns = r < count ? filled : 0;
            if (columns) convert_in(copy, from + r * w.stride_n, columns);
            std::fill(copy + columns, copy + whole * kElements<L>, Element<L>());
          }
        }
        const L* weight = same && in_place ? reinterpret_cast<const L*>(source) : scratch;
        const int64_t stride = same && in_place ? stride_n : copy_stride;
        panels.for_each([&](int64_t first, int64_t width, int64_t tile) {
          with_height<kPanelVectors>(width, [&](auto v) {
            constexpr int at_once = rows_at_once(v, kOctet);
            for (int64_t r = 0; r < kOctet; r += at_once) {
              const char* next_rows = next + r * stride_n * one;
              const Prefetch ahead =
                  tile == 0 ? Prefetch{next_rows, stride_n * one, at_once, at_once * one}
                            : Prefetch{next, 0, 0, 0};
              panel_tile<L, at_once, v>(product.data + (n - n0 + r) * product.ld + first * lanes,
                                        product.ld, adds, weight + r * stride, stride,
                                        panels.at(first, width, k0), depth, ahead);
            }
          });
        });
        for_even_tiles(others, tallest, [&](int64_t row, int64_t height, int64_t tile) {
          const Prefetch ahead = {next, stride_n * one, kOctet, lanes * one};
          const L* rows = a + row * lda + k0;
          T* to = product.others + row * ldc + (n - n0);
          const auto take = [&](auto h, auto prefetches) {
            if (in_place) {
              nt_tile<L, h, prefetches>(to, ldc, adds, rows, lda, source, stride_n, whole, ahead);
            } else {
              nt_tile<L, h, prefetches>(to, ldc, adds, rows, lda, weight, stride, whole, ahead);
            }
          };
          with_height<kTallTileNT>(height, [&](auto h) {
            if (!turned && tile == 0) {
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

// Reads W where it lies; cols are whole pairs of vectors.
template <class L, class S, class T = LaneSum<L>>
void wide_tiles(T* c, int64_t ldc, bool accumulate, const L* a, int64_t lda, int64_t m, const S* w,
                int64_t stride_k, int64_t k, int64_t cols) {
  constexpr int64_t lanes = Simd<L>::lanes;
  for_even_tiles(m, kTileWide, [&](int64_t row, int64_t height, int64_t) {
    with_height<kTileWide>(height, [&](auto h) {
      constexpr int64_t wide = kTileNN / h * 2 * lanes;
      for (int64_t n = 0; n < cols;) {
        const auto take = [&](auto vectors) {
          wide_tile<L, h, vectors>(c + row * ldc + n, ldc, accumulate, a + row * lda, lda, w + n,
                                   stride_k, k);
          n += vectors * lanes;
        };
        if (n + wide <= cols) {
          take(std::integral_constant<int, kTileNN / h * 2>());
        } else {
          take(std::integral_constant<int, 2>());
        }
      }
    });
  });
}

// The same sums for few rows, four rows of W at a time; `sums` holds kTileWide rows of cols.
template <class T, class S>
void long_tiles(T* c, int64_t ldc, bool accumulate, const T* a, int64_t lda, int64_t m, const S* w,
                int64_t stride_k, int64_t k, int64_t cols, T* sums) {
  constexpr int64_t at_once = 4;
  for_even_tiles(m, kTileWide, [&](int64_t row, int64_t height, int64_t) {
    with_height<kTileWide>(height, [&](auto h) {
      for (int64_t i = 0; i < k; i += at_once) {
        with_height<at_once>(std::min(at_once, k - i), [&](auto rows) {
          long_tile<T, h, rows>(c + row * ldc, ldc, accumulate, sums, i == 0, i + at_once >= k,
                                a + row * lda + i, lda, w + i * stride_k, stride_k, cols);
        });
      }
    });
  });
}

// Rows of lanes i0.. of weights across k, as panels `width` lanes wide, one after the other; a row
// past the last element of k counts as zero.
template <class L, class S>
void pack_panels(L* panels, int64_t panel_size, const S* from, Weight w, int64_t elements,
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

template <class L, class S, class T = LaneSum<L>>
void matmul_nn(T* c, const L* a, int64_t lda, int64_t m, Weight w, int64_t elements, int64_t n0,
               int64_t n1, char* scratch) {
  constexpr int64_t width = 2 * Simd<L>::lanes, line = kPadBytes / sizeof(S), each = kElements<L>;
  const int64_t k = lanes_of<L>(elements), lane_stride = w.stride_k * each;
  const int64_t ldc = padded<T>(n1 - n0), lines = (n1 - n0 + line - 1) / line;
  for (int64_t k0 = 0; k0 < k; k0 += kDepthChunkNN) {
    const int64_t depth = std::min(kDepthChunkNN, k - k0);
    const int64_t filled = std::min(depth * each, elements - k0 * each);
    const S* source = static_cast<const S*>(w.data) + n0 * w.stride_n + k0 * lane_stride;
    // Read by many tiles, weights are better packed, which also converts them once.
    const bool in_place = m <= 2 * kTileWide || (kManyReadInPlace && __is_same(S, L));
    if (w.stride_n == 1 && (n1 - n0) % width == 0 && filled == depth * each && in_place) {
      // Wide tiles take any number of rows; where only few are read in place, long ones do.
      if constexpr (kManyReadInPlace) {
        wide_tiles(c, ldc, k0 > 0, a + k0, lda, m, source, w.stride_k, depth, n1 - n0);
      } else {
        long_tiles(c, ldc, k0 > 0, a + k0, lda, m, source, w.stride_k, depth, n1 - n0,
                   reinterpret_cast<T*>(scratch));
      }
      continue;
    }
    // All panels of these rows at once: W is read along its rows, as memory likes it. A panel has
    // room for a row more, so that panels do not fall into one cache set.
    L* panels = reinterpret_cast<L*>(scratch);
    const int64_t panel_size = (depth + 1) * width;
    pack_panels(panels, panel_size, source, w, filled, n1 - n0);
    // The tiles share out the lines of the rows that come next: the next chunk's, or the
    // first chunk's of the next columns.
    const S* next = k0 + depth < k ? source + depth * lane_stride
                                   : static_cast<const S*>(w.data) + n1 * w.stride_n;
    int64_t turn = 0;
    for (int64_t n = n0; n < n1; n += width) {
      T* column = c + (n - n0);
      const L* b = panels + (n - n0) / width * panel_size;
      for_even_tiles(m, kTileNN, [&](int64_t row, int64_t height, int64_t) {
        const Prefetch ahead = {reinterpret_cast<const char*>(next) + turn++ % lines * kPadBytes, 0,
                                1, int64_t(lane_stride * sizeof(S))};
        T* tile = column + row * ldc;
        const Target<T> to = {tile, ldc, k0 > 0 ? tile : nullptr, ldc, false};
        with_height<kTileNN>(height, [&](auto h) {
          nn_tile<L, h>(to, a + row * lda + k0, lda, 1, b, width, depth, ahead);
        });
      });
    }
  }
}

// ---- of whole blocks, and of rows as they are

template <class P, class T = Sum<P>>
void matmul_block(T* c, const P* a, int64_t m, int64_t turned, Weight w, int64_t k, int64_t n0,
                  int64_t n1, Scratch scratch) {
  using L = Lane<P>;
  if (k == 0) {
    std::fill(c, c + block_size<T>(m, n1 - n0), T(0));
    return;
  }
  const int64_t lda = padded<P>(k) / kElements<L>;
  with_storage<P>(w.dtype, [&](auto stored) {
    using S = decltype(stored);
    if (w.stride_k == 1) {
      const Panels<const L> panels(reinterpret_cast<const L*>(a), turned, lanes_of<L>(k));
      matmul_nt<L, S>(Product<T>(c, turned, n1 - n0), padded<T>(n1 - n0), panels, panels.others(),
                      lda, m - turned, w, k, n0, n1, reinterpret_cast<L*>(scratch.at));
    } else {
      matmul_nn<L, S>(c, reinterpret_cast<const L*>(a), lda, m, w, k, n0, n1, scratch.at);
    }
  });
}

template <class P, class T = Sum<P>>
void matmul(T* c, const P* a, int64_t lda, int64_t m, Weight w, int64_t k, int64_t n0, int64_t n1,
            Scratch scratch) {
  using L = Lane<P>;
  if (w.stride_k != 1 && k > 0) {
    with_storage<P>(w.dtype, [&](auto stored) {
      matmul_nn<L, decltype(stored)>(c, reinterpret_cast<const L*>(a), lda / kElements<L>, m, w, k,
                                     n0, n1, scratch.at);
    });
    return;
  }
  const int64_t turned = turned_rows<P>(m, w.dtype);
  P* rows = scratch.take<P>(block_size<P>(m, k));
  T* product = scratch.take<T>(block_size<T>(m, kMatmulColumns));
  load_block(rows, {a, Operand<P>::dtype, lda, nullptr}, m, turned, k);
  matmul_block(product, rows, m, turned, w, k, n0, n1, scratch);
  store_block<T>(c, Operand<T>::dtype, padded<T>(n1 - n0), product, m, turned, n1 - n0, nullptr);
}

template <class P, class T = Sum<P>>
int64_t matmul_scratch(int64_t m, int64_t k) {
  using L = Lane<P>;
  const int64_t lanes = lanes_of<L>(k);
  const int64_t nt = Scratch::bytes<P>(block_size<P>(m, k)) +
                     Scratch::bytes<T>(block_size<T>(m, kMatmulColumns)) +
                     Scratch::bytes<L>(kOctet * padded<L>(std::min(lanes, kDepthChunk)));
  const int64_t nn = Scratch::bytes<L>(
      kMatmulColumns * std::max<int64_t>(std::min(lanes, kDepthChunkNN) + 1, kTileWide));
  return std::max(nt, nn);
}

// ---- out = p^T q, a weight gradient: k is the row of the expert

// The rows of p that stay packed while all columns of q pass by; of more rows than these
// each column panel packs its own again.
constexpr int64_t kRowsKept = 4 * kRowChunk;

// dst (rows of lanes, ld) = src's rows and columns, converted; pairs are of two rows, an odd last
// one is paired with zeros. Columns up to `whole` are zero.
template <class L>
void load_across(L* dst, int64_t ld, Rows src, int64_t rows, int64_t cols, int64_t whole) {
  with_storage<Element<L>>(src.dtype, [&](auto stored) {
    using S = decltype(stored);
    const auto row = [&](int64_t r) {
      return static_cast<const S*>(src.data) + (src.index ? src.index[r] : r) * src.stride;
    };
    for (int64_t i = 0; i < lanes_of<L>(rows); ++i) {
      L* to = dst + i * ld;
      if constexpr (kElements<L> == 1) {
        convert_in(to, row(i), cols);
        std::fill(to + cols, to + whole, L());
      } else {
        const S *first = row(2 * i), *second = 2 * i + 1 < rows ? row(2 * i + 1) : nullptr;
        int64_t c = 0;
        for (constexpr int64_t two = 2 * Simd<L>::lanes; second && c + two <= cols; c += two) {
          V<L> left, right;
          load_two<L>(first + c, second - first, left, right);
          store(to + c, left);
          store(to + c + two / 2, right);
        }
        for (; c < cols; ++c) to[c] = {first[c], second ? second[c] : S()};
        std::fill(to + cols, to + whole, L());
      }
    }
  });
}

template <class P, class T = Sum<P>>
int64_t outer_scratch(int64_t height) {
  using L = Lane<P>;
  constexpr int64_t width = 2 * Simd<L>::lanes;
  return Scratch::bytes<L>(kRowChunk * width) + Scratch::bytes<L>(kRowsKept * padded<L>(height)) +
         Scratch::bytes<T>(height * width);
}

template <class P, class T = Sum<P>>
void outer(void* out, Dtype dtype, int64_t stride, bool past_caches, Rows p, int64_t m0, int64_t m1,
           Rows q, int64_t n, int64_t rows, Scratch scratch) {
  using L = Lane<P>;
  constexpr int64_t width = 2 * Simd<L>::lanes;
  const int64_t height = m1 - m0, ld_left = padded<L>(height);
  L* panel = scratch.take<L>(kRowChunk * width);   // a chunk of q's rows, (kRowChunk, width)
  L* left = scratch.take<L>(kRowsKept * ld_left);  // p's columns m0..m1, (kRowsKept, ld_left)
  T* sums = scratch.take<T>(height * width);       // (height, width)
  const int64_t chunks = (rows + kRowChunk - 1) / kRowChunk;
  const bool keeps_left = rows <= kRowsKept;
  p.data = static_cast<const char*>(p.data) + m0 * size_of(p.dtype);

  for (int64_t n0 = 0; n0 < n; n0 += width) {
    const int64_t count = std::min(width, n - n0);
    Rows right = q;
    right.data = static_cast<const char*>(q.data) + n0 * size_of(q.dtype);
    // The last chunk's tiles write where they may: into out itself when it takes whole
    // tiles of T.
    const bool direct = rows > 0 && count == width && size_of(dtype) == sizeof(T);
    T* corner = reinterpret_cast<T*>(static_cast<char*>(out) + (m0 * stride + n0) * size_of(dtype));
    const bool streamed =
        past_caches &&
        (reinterpret_cast<uintptr_t>(corner) | uintptr_t(stride * sizeof(T))) % MOE_VECTOR_BYTES ==
            0;
    if (rows == 0) std::fill(sums, sums + height * width, T(0));
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t r0 = rows * chunk / chunks, r1 = rows * (chunk + 1) / chunks;
      const int64_t depth = lanes_of<L>(r1 - r0);
      load_across(panel, width, rows_from(right, r0), r1 - r0, count, width);
      L* columns = keeps_left ? left + r0 * ld_left : left;
      if (n0 == 0 || !keeps_left) {
        load_across(columns, ld_left, rows_from(p, r0), r1 - r0, height, height);
      }
      const bool last = direct && chunk + 1 == chunks;
      for_even_tiles(height, kTileNN, [&](int64_t m, int64_t count_m, int64_t) {
        T* sum = sums + m * width;
        const T* before = chunk > 0 ? sum : nullptr;
        const Target<T> to = last ? Target<T>{corner + m * stride, stride, before, width, streamed}
                                  : Target<T>{sum, width, before, width, false};
        const Prefetch nothing = {reinterpret_cast<const char*>(panel), 0, 0, 0};
        with_height<kTileNN>(count_m, [&](auto h) {
          nn_tile<L, h>(to, columns + m, 1, ld_left, panel, width, depth, nothing);
        });
      });
    }
    if (!direct) store_rows<T>(corner, dtype, stride, sums, width, height, count);
  }
  fence();
}
