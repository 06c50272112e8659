// Matrix products of blocks, cut into register tiles (tiles.inl). Every k runs upwards in
// chunks, so a sum has the same bits whichever rows and columns lie beside it, as long as
// the same kind of tile takes it.

constexpr int64_t kDepthChunkNN = 128;

// ---- c = a W^T, W's rows along k

// Turned rows come as `panels` and go to `product`; `others` rows come as a, and go to
// product.others.
template <class T, class S>
void matmul_nt(const Product<T>& product, int64_t ldc, const Panels<const T>& panels, const T* a,
               int64_t lda, int64_t others, Weight w, int64_t k, int64_t n0, int64_t n1,
               T* scratch) {
  constexpr int64_t lanes = Simd<T>::lanes, one = sizeof(S), line = kPadBytes / one;
  const int64_t copy_stride = padded<T>(std::min(k, kDepthChunk));
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
        const int64_t count = std::min<int64_t>(kOctet, n1 - n), stride_n = w.stride_n;
        const S* source = static_cast<const S*>(w.data) + n * stride_n + k0;
        const S* after = source + kOctet * stride_n;
        if (few) after = k0 + depth < k ? source + depth : after - k0;
        const char* next = reinterpret_cast<const char*>(after);
        // Whole weights of T, or any for tiles that convert as they read, are taken from where
        // they lie; others through a converted copy, padded with zeros.
        constexpr bool same = __is_same(S, T);
        const bool in_place = count == kOctet && whole == depth && (same || few);
        if (!in_place) {
          for (int64_t r = 0; r < kOctet; ++r) {
            const int64_t filled = r < count ? depth : 0;
            if (filled) convert_in(scratch + r * copy_stride, source + r * stride_n, depth);
            std::fill(scratch + r * copy_stride + filled, scratch + r * copy_stride + whole, T(0));
          }
        }
        const T* weight = same && in_place ? reinterpret_cast<const T*>(source) : scratch;
        const int64_t stride = same && in_place ? stride_n : copy_stride;
        panels.for_each([&](int64_t first, int64_t width, int64_t tile) {
          with_height<kPanelVectors>(width, [&](auto v) {
            constexpr int at_once = rows_at_once(v, kOctet);
            for (int64_t r = 0; r < kOctet; r += at_once) {
              const char* next_rows = next + r * stride_n * one;
              const Prefetch ahead =
                  tile == 0 ? Prefetch{next_rows, stride_n * one, at_once, at_once * one}
                            : Prefetch{next, 0, 0, 0};
              panel_tile<T, at_once, v>(product.data + (n - n0 + r) * product.ld + first * lanes,
                                        product.ld, adds, weight + r * stride, stride,
                                        panels.at(first, width, k0), depth, ahead);
            }
          });
        });
        for_even_tiles(others, tallest, [&](int64_t row, int64_t height, int64_t tile) {
          const Prefetch ahead = {next, stride_n * one, kOctet, lanes * one};
          const T* rows = a + row * lda + k0;
          T* to = product.others + row * ldc + (n - n0);
          const auto take = [&](auto h, auto prefetches) {
            if (in_place) {
              nt_tile<T, h, prefetches>(to, ldc, adds, rows, lda, source, stride_n, whole, ahead);
            } else {
              nt_tile<T, h, prefetches>(to, ldc, adds, rows, lda, weight, stride, whole, ahead);
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
template <class T, class S>
void wide_tiles(T* c, int64_t ldc, bool accumulate, const T* a, int64_t lda, int64_t m, const S* w,
                int64_t stride_k, int64_t k, int64_t cols) {
  constexpr int64_t lanes = Simd<T>::lanes;
  for_even_tiles(m, kTileWide, [&](int64_t row, int64_t height, int64_t) {
    with_height<kTileWide>(height, [&](auto h) {
      constexpr int64_t wide = kTileNN / h * 2 * lanes;
      for (int64_t n = 0; n < cols;) {
        const auto take = [&](auto vectors) {
          wide_tile<T, h, vectors>(c + row * ldc + n, ldc, accumulate, a + row * lda, lda, w + n,
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

template <class T, class S>
void matmul_nn(T* c, const T* a, int64_t lda, int64_t m, Weight w, int64_t k, int64_t n0,
               int64_t n1, T* scratch) {
  constexpr int64_t width = 2 * Simd<T>::lanes, line = kPadBytes / sizeof(S);
  const int64_t ldc = padded<T>(n1 - n0), lines = (n1 - n0 + line - 1) / line;
  for (int64_t k0 = 0; k0 < k; k0 += kDepthChunkNN) {
    const int64_t depth = std::min(kDepthChunkNN, k - k0);
    const S* source = static_cast<const S*>(w.data) + n0 * w.stride_n + k0 * w.stride_k;
    // Read by many tiles, weights are better packed, which also converts them once.
    const bool in_place = m <= 2 * kTileWide || (kManyReadInPlace && __is_same(S, T));
    if (w.stride_n == 1 && (n1 - n0) % width == 0 && in_place) {
      // Wide tiles take any number of rows; where only few are read in place, long ones do.
      if constexpr (kManyReadInPlace) {
        wide_tiles(c, ldc, k0 > 0, a + k0, lda, m, source, w.stride_k, depth, n1 - n0);
      } else {
        long_tiles(c, ldc, k0 > 0, a + k0, lda, m, source, w.stride_k, depth, n1 - n0, scratch);
      }
      continue;
    }
    // All panels of these rows at once: W is read along its rows, as memory likes it. A panel has
    // room for a row more, so that panels do not fall into one cache set.
    for (int64_t i = 0; i < depth; ++i) {
      for (int64_t n = n0; n < n1; n += width) {
        const int64_t count = std::min(width, n1 - n);
        const S* from = source + i * w.stride_k + (n - n0) * w.stride_n;
        T* row = scratch + (n - n0) * (depth + 1) + i * width;
        if (count == width && w.stride_n == 1) {
          convert_in(row, from, width);
        } else {
          for (int64_t j = 0; j < width; ++j) {
            row[j] = j < count ? T(to_compute(from[j * w.stride_n])) : T(0);
          }
        }
      }
    }
    // The tiles share out the lines of the rows that come next: the next chunk's, or the
    // first chunk's of the next columns.
    const S* next = k0 + depth < k ? source + depth * w.stride_k
                                   : static_cast<const S*>(w.data) + n1 * w.stride_n;
    int64_t turn = 0;
    for (int64_t n = n0; n < n1; n += width) {
      T* column = c + (n - n0);
      const T* b = scratch + (n - n0) * (depth + 1);
      for_even_tiles(m, kTileNN, [&](int64_t row, int64_t height, int64_t) {
        const Prefetch ahead = {reinterpret_cast<const char*>(next) + turn++ % lines * kPadBytes, 0,
                                1, int64_t(w.stride_k * sizeof(S))};
        T* tile = column + row * ldc;
        const Target<T> to = {tile, ldc, k0 > 0 ? tile : nullptr, ldc, false};
        with_height<kTileNN>(height, [&](auto h) {
          nn_tile<T, h>(to, a + row * lda + k0, lda, 1, b, width, depth, ahead);
        });
      });
    }
  }
}

// ---- of whole blocks, and of rows as they are

template <class T>
void matmul_block(T* c, const T* a, int64_t m, int64_t turned, Weight w, int64_t k, int64_t n0,
                  int64_t n1, T* scratch) {
  if (k == 0) {
    std::fill(c, c + block_size<T>(m, n1 - n0), T(0));
    return;
  }
  with_storage<T>(w.dtype, [&](auto stored) {
    using S = decltype(stored);
    if (w.stride_k == 1) {
      const Panels<const T> panels(a, turned, k);
      matmul_nt<T, S>(Product<T>(c, turned, n1 - n0), padded<T>(n1 - n0), panels, panels.others(),
                      padded<T>(k), m - turned, w, k, n0, n1, scratch);
    } else {
      matmul_nn<T, S>(c, a, padded<T>(k), m, w, k, n0, n1, scratch);
    }
  });
}

template <class T>
void matmul(T* c, const T* a, int64_t lda, int64_t m, Weight w, int64_t k, int64_t n0, int64_t n1,
            T* scratch) {
  if (w.stride_k != 1 && k > 0) {
    with_storage<T>(w.dtype, [&](auto stored) {
      matmul_nn<T, decltype(stored)>(c, a, lda, m, w, k, n0, n1, scratch);
    });
    return;
  }
  constexpr Dtype compute = sizeof(T) == 8 ? Dtype::f64 : Dtype::f32;
  const int64_t turned = turned_rows<T>(m, w.dtype);
  T *rows = scratch, *product = rows + block_size<T>(m, k);
  load_block(rows, {a, compute, lda, nullptr}, m, turned, k);
  matmul_block(product, rows, m, turned, w, k, n0, n1, product + block_size<T>(m, kMatmulColumns));
  store_block<T>(c, compute, padded<T>(n1 - n0), product, m, turned, n1 - n0, nullptr);
}

template <class T>
int64_t matmul_scratch(int64_t m, int64_t k) {
  const int64_t nt = block_size<T>(m, k) + block_size<T>(m, kMatmulColumns) +
                     kOctet * padded<T>(std::min(k, kDepthChunk));
  const int64_t nn = kMatmulColumns * std::max<int64_t>(std::min(k, kDepthChunkNN) + 1, kTileWide);
  return std::max(nt, nn);
}

// ---- out = p^T q, a weight gradient: k is the row of the expert

// The rows of p that stay packed while all columns of q pass by; of more rows than these
// each column panel packs its own again.
constexpr int64_t kRowsKept = 4 * kRowChunk;

template <class T>
int64_t outer_scratch(int64_t height) {
  const int64_t width = 2 * Simd<T>::lanes;
  return kRowChunk * width + kRowsKept * padded<T>(height) + height * width;
}

template <class T>
void outer(void* out, Dtype dtype, int64_t stride, bool past_caches, Rows p, int64_t m0, int64_t m1,
           Rows q, int64_t n, int64_t rows, T* scratch) {
  constexpr int64_t width = 2 * Simd<T>::lanes;
  const int64_t height = m1 - m0, ld_left = padded<T>(height);
  T* panel = scratch;                    // a chunk of q's rows, (kRowChunk, width)
  T* left = panel + kRowChunk * width;   // p's columns m0..m1, (kRowsKept, ld_left)
  T* sums = left + kRowsKept * ld_left;  // (height, width)
  const int64_t chunks = (rows + kRowChunk - 1) / kRowChunk;
  const bool keeps_left = rows <= kRowsKept;
  p.data = static_cast<const char*>(p.data) + m0 * size_of(p.dtype);

  for (int64_t n0 = 0; n0 < n; n0 += width) {
    const int64_t count = std::min(width, n - n0);
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
      const int64_t r0 = rows * chunk / chunks, r1 = rows * (chunk + 1) / chunks, depth = r1 - r0;
      with_storage<T>(q.dtype, [&](auto stored) {
        using S = decltype(stored);
        for (int64_t r = 0; r < depth; ++r) {
          const int64_t from = q.index ? q.index[r0 + r] : r0 + r;
          convert_in(panel + r * width, static_cast<const S*>(q.data) + from * q.stride + n0,
                     count);
          std::fill(panel + r * width + count, panel + (r + 1) * width, T(0));
        }
      });
      T* columns = keeps_left ? left + r0 * ld_left : left;
      if (n0 == 0 || !keeps_left) load_rows<T>(columns, rows_from(p, r0), depth, height);
      const bool last = direct && chunk + 1 == chunks;
      for_even_tiles(height, kTileNN, [&](int64_t m, int64_t count_m, int64_t) {
        T* sum = sums + m * width;
        const T* before = chunk > 0 ? sum : nullptr;
        const Target<T> to = last ? Target<T>{corner + m * stride, stride, before, width, streamed}
                                  : Target<T>{sum, width, before, width, false};
        const Prefetch nothing = {reinterpret_cast<const char*>(panel), 0, 0, 0};
        with_height<kTileNN>(count_m, [&](auto h) {
          nn_tile<T, h>(to, columns + m, 1, ld_left, panel, width, depth, nothing);
        });
      });
    }
    if (!direct) store_rows<T>(corner, dtype, stride, sums, width, height, count);
  }
  fence();
}
