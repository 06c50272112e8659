// Matrix products of blocks. Two register tiles do all the work:
//
//   nt_tile  c (M, 8) = a (M, K) w (8, K)^T, both read along k: lane l of a vector sums
//            k = l mod lanes, and a tree adds the lanes at the end. It takes weights as
//            they lie, so it needs no packing.
//   nn_tile  c (M, 2 vectors) = a (M, K) b (K, 2 vectors): a's elements are broadcast;
//            b is a packed panel, or a small matrix where it lies.
//
// Rows of a are independent of each other and every k runs upwards in chunks, so
// a row of c has the same bits whichever rows lie beside it. While a tile computes,
// it prefetches weights that come next: a weight is read from memory once, and
// that read would otherwise cost as much as the arithmetic.

constexpr int64_t kDepthChunkNT = 1024;  // of k; 1024 / lanes terms a lane
constexpr int64_t kDepthChunkNN = 128;
constexpr int64_t kReadInPlace = 64 << 10;  // bytes
constexpr int kOctet = 8;

// Weights that come next: `rows` rows, `stride` bytes apart, each read along its length.
struct Prefetch {
  const char* at;
  int64_t stride, rows;
};

// ---- the sums of eight vectors' lanes, as one row of eight

template <class T>
MOE_INLINE void sum_lanes(const V<T> (&v)[kOctet], T* out, bool accumulate) {
  constexpr int lanes = Simd<T>::lanes;
  T sums[kOctet];
  for (int r = 0; r < kOctet; ++r) {
    T part[lanes];
    store(part, v[r]);
    for (int width = lanes / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) part[i] += part[i + width];
    sums[r] = part[0];
  }
  for (int r = 0; r < kOctet; ++r) out[r] = accumulate ? out[r] + sums[r] : sums[r];
}

#if MOE_VECTOR_BYTES == 64
// Each step adds the upper half of every source to its lower half and packs two sources into one.
MOE_INLINE void sum_lanes(const V<float> (&v)[kOctet], float* out, bool accumulate) {
  auto halves = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
  };
  auto quarters = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
  };
  const __m512 ab = halves((__m512)v[0], (__m512)v[1]), cd = halves((__m512)v[2], (__m512)v[3]);
  const __m512 ef = halves((__m512)v[4], (__m512)v[5]), gh = halves((__m512)v[6], (__m512)v[7]);
  const __m512d abcd = _mm512_castps_pd(quarters(ab, cd)),
                efgh = _mm512_castps_pd(quarters(ef, gh));
  const __m512 pairs = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(abcd, efgh)),
                                     _mm512_castpd_ps(_mm512_unpackhi_pd(abcd, efgh)));
  const __m512i even = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m512i odd = _mm512_setr_epi32(1, 5, 9, 13, 3, 7, 11, 15, 0, 0, 0, 0, 0, 0, 0, 0);
  __m256 sums = _mm256_add_ps(_mm512_castps512_ps256(_mm512_permutexvar_ps(even, pairs)),
                              _mm512_castps512_ps256(_mm512_permutexvar_ps(odd, pairs)));
  if (accumulate) sums = _mm256_add_ps(sums, _mm256_loadu_ps(out));
  _mm256_storeu_ps(out, sums);
}
#elif MOE_VECTOR_BYTES == 32
MOE_INLINE void sum_lanes(const V<float> (&v)[kOctet], float* out, bool accumulate) {
  auto halves = [](__m256 a, __m256 b) {
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  };
  auto pairs = [](__m256 a, __m256 b) {
    const __m256d x = _mm256_castps_pd(a), y = _mm256_castps_pd(b);
    return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)),
                         _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
  };
  const __m256 aceg = pairs(halves((__m256)v[0], (__m256)v[1]), halves((__m256)v[2], (__m256)v[3]));
  const __m256 bdfh = pairs(halves((__m256)v[4], (__m256)v[5]), halves((__m256)v[6], (__m256)v[7]));
  const __m256 sum =
      _mm256_add_ps(_mm256_shuffle_ps(aceg, bdfh, 0x88), _mm256_shuffle_ps(aceg, bdfh, 0xDD));
  // sum holds sources 0 2 4 6 | 1 3 5 7
  __m256 sums = _mm256_permutevar8x32_ps(sum, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  if (accumulate) sums = _mm256_add_ps(sums, _mm256_loadu_ps(out));
  _mm256_storeu_ps(out, sums);
}
#endif

// ---- register tiles

// Where a tile goes: to c, on top of `before` (null: of nothing), which may be c itself;
// past the caches where nobody reads it soon.
template <class T>
struct Target {
  T* c;
  int64_t ldc;
  const T* before;
  int64_t ld_before;
  bool past_caches;
};

// The tile prefetches ahead.rows of the weights' next rows: OneAhead says that it is one,
// which costs nothing; any other number is for tiles so few that memory is the limit.
template <class T, int M, bool OneAhead>
void nt_tile(T* c, int64_t ldc, bool accumulate, const T* a, int64_t lda, const T* w, int64_t ldw,
             int64_t k, Prefetch ahead, int64_t ahead_step) {
  constexpr int lanes = Simd<T>::lanes;
  V<T> sum[M][kOctet];
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < kOctet; ++r) sum[m][r] = V<T>{};
  // Every third row has a pointer of its own, the others are one or two strides from it:
  // addresses that need no more registers than there are.
  const T *w0 = w, *w3 = w + 3 * ldw, *w6 = w + 6 * ldw;
  for (int64_t i = 0; i < k; i += lanes) {
    if (OneAhead) {
      __builtin_prefetch(ahead.at, 0, 2);
    } else {
      for (int64_t r = 0; r < ahead.rows; ++r)
        __builtin_prefetch(ahead.at + r * ahead.stride, 0, 2);
    }
    ahead.at += ahead_step;
    V<T> x[M];
    for (int m = 0; m < M; ++m) x[m] = load(a + m * lda);
#pragma GCC unroll 8
    for (int r = 0; r < kOctet; ++r) {
      V<T> weight = load((r < 3 ? w0 : r < 6 ? w3 : w6) + r % 3 * ldw);
      if (M > 1) MOE_KEEP_IN_REGISTER(weight);
      for (int m = 0; m < M; ++m) sum[m][r] += x[m] * weight;
    }
    a += lanes, w0 += lanes, w3 += lanes, w6 += lanes;
  }
  for (int m = 0; m < M; ++m) sum_lanes(sum[m], c + m * ldc, accumulate);
}

template <class T, int M>
void nn_tile(Target<T> to, const T* a, int64_t am, int64_t ak, const T* b, int64_t ldb, int64_t k,
             Prefetch ahead) {
  constexpr int lanes = Simd<T>::lanes;
  V<T> sum[M][2];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) sum[m][0] = sum[m][1] = V<T>{};
  for (int64_t i = 0; i < k; ++i) {
    __builtin_prefetch(ahead.at, 0, 2);
    ahead.at += ahead.stride;
    const V<T> left = load(b), right = load(b + lanes);
    b += ldb;
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const V<T> x = splat(a[m * am]);
      sum[m][0] += x * left;
      sum[m][1] += x * right;
    }
    a += ak;
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
    T* row = to.c + m * to.ldc;
    if (to.before) {
      const T* before = to.before + m * to.ld_before;
      sum[m][0] += load(before);
      sum[m][1] += load(before + lanes);
    }
    if (to.past_caches) {
      stream(row, sum[m][0]);
      stream(row + lanes, sum[m][1]);
    } else {
      store(row, sum[m][0]);
      store(row + lanes, sum[m][1]);
    }
  }
}

// A tile of run-time height is one call of the tile of that height.
template <class T, int M, bool OneAhead>
inline void nt_rows(int m, T* c, int64_t ldc, bool accumulate, const T* a, int64_t lda, const T* w,
                    int64_t ldw, int64_t k, Prefetch ahead, int64_t ahead_step) {
  if constexpr (M > 1) {
    if (m < M) {
      return nt_rows<T, M - 1, OneAhead>(m, c, ldc, accumulate, a, lda, w, ldw, k, ahead,
                                         ahead_step);
    }
  }
  nt_tile<T, M, OneAhead>(c, ldc, accumulate, a, lda, w, ldw, k, ahead, ahead_step);
}
template <class T, int M>
inline void nn_rows(int m, Target<T> to, const T* a, int64_t am, int64_t ak, const T* b,
                    int64_t ldb, int64_t k, Prefetch ahead) {
  if constexpr (M > 1) {
    if (m < M) return nn_rows<T, M - 1>(m, to, a, am, ak, b, ldb, k, ahead);
  }
  nn_tile<T, M>(to, a, am, ak, b, ldb, k, ahead);
}

// Tiles of nearly equal height: 13 rows go as 7 and 6, not as 12 and a slow 1.
template <class Body>
inline void for_even_tiles(int64_t rows, int64_t most, Body body) {
  const int64_t tiles = (rows + most - 1) / most;
  for (int64_t i = 0, begin = 0; i < tiles; ++i) {
    const int64_t end = rows * (i + 1) / tiles;
    body(begin, end - begin, i);
    begin = end;
  }
}

// ---- c = a W^T

template <class T, class S>
void matmul_nt(T* c, const T* a, int64_t lda, int64_t m, Weight w, int64_t k, int64_t n0,
               int64_t n1, T* scratch) {
  const int64_t ldc = padded<T>(n1 - n0);
  const int64_t tiles = (m + kTileNT - 1) / kTileNT, ahead_rows = (kOctet + tiles - 1) / tiles;
  for (int64_t k0 = 0; k0 < k; k0 += kDepthChunkNT) {
    const int64_t depth = std::min(kDepthChunkNT, k - k0), whole = round_up(depth, Simd<T>::lanes);
    const int64_t copy_stride = padded<T>(depth);
    for (int64_t n = n0; n < n1; n += kOctet) {
      const int64_t count = std::min<int64_t>(kOctet, n1 - n);
      const S* source = static_cast<const S*>(w.data) + n * w.stride_n + k0;
      // Weights of T are read where they lie; others, and edges, through a converted copy.
      const T* weight = scratch;
      int64_t stride = copy_stride;
      bool in_place = false;
      if constexpr (__is_same(S, T)) {
        if (count == kOctet && whole == depth) {
          weight = source;
          stride = w.stride_n;
          in_place = true;
        }
      }
      if (!in_place) {
        for (int64_t r = 0; r < kOctet; ++r) {
          const int64_t filled = r < count ? depth : 0;
          if (filled) convert_in(scratch + r * copy_stride, source + r * w.stride_n, depth);
          std::fill(scratch + r * copy_stride + filled, scratch + r * copy_stride + whole, T(0));
        }
      }
      T* column = c + (n - n0);
      for_even_tiles(m, kTileNT, [&](int64_t row, int64_t height, int64_t tile) {
        // The tiles share out the next octet's rows.
        const int64_t first = tile * ahead_rows % kOctet;
        const Prefetch ahead = {
            reinterpret_cast<const char*>(source + (kOctet + first) * w.stride_n),
            int64_t(w.stride_n * sizeof(S)), tile * ahead_rows < kOctet ? ahead_rows : 0};
        (ahead_rows == 1 ? nt_rows<T, kTileNT, true>
                         : nt_rows<T, kTileNT, false>)(int(height), column + row * ldc, ldc, k0 > 0,
                                                       a + row * lda + k0, lda, weight, stride,
                                                       whole, ahead, Simd<T>::lanes * sizeof(S));
      });
    }
  }
}

template <class T, class S>
void matmul_nn(T* c, const T* a, int64_t lda, int64_t m, Weight w, int64_t k, int64_t n0,
               int64_t n1, T* scratch) {
  constexpr int64_t width = 2 * Simd<T>::lanes, line = kPadBytes / sizeof(S);
  const int64_t ldc = padded<T>(n1 - n0), lines = (n1 - n0 + line - 1) / line;
  for (int64_t k0 = 0; k0 < k; k0 += kDepthChunkNN) {
    const int64_t depth = std::min(kDepthChunkNN, k - k0);
    const S* source = static_cast<const S*>(w.data) + n0 * w.stride_n + k0 * w.stride_k;
    // Packing costs as much as a tile's arithmetic: a single tile reads W where it lies,
    // unless its rows are so far apart that memory would wait.
    bool in_place = false;
    if constexpr (__is_same(S, T)) {
      in_place = m <= kTileNN && w.stride_n == 1 && (n1 - n0) % width == 0 &&
                 depth * w.stride_k * int64_t(sizeof(T)) <= kReadInPlace;
    }
    // All panels of these rows at once: W is read along its rows, as memory likes it.
    for (int64_t i = 0; i < depth && !in_place; ++i) {
      for (int64_t n = n0; n < n1; n += width) {
        const int64_t count = std::min(width, n1 - n);
        const S* from = source + i * w.stride_k + (n - n0) * w.stride_n;
        T* row = scratch + (n - n0) * depth + i * width;
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
      const T* b =
          in_place ? reinterpret_cast<const T*>(source) + (n - n0) : scratch + (n - n0) * depth;
      const int64_t ldb = in_place ? w.stride_k : width;
      for_even_tiles(m, kTileNN, [&](int64_t row, int64_t height, int64_t) {
        const Prefetch ahead = {reinterpret_cast<const char*>(next) + turn++ % lines * kPadBytes,
                                int64_t(w.stride_k * sizeof(S)), 1};
        T* tile = column + row * ldc;
        nn_rows<T, kTileNN>(int(height), {tile, ldc, k0 > 0 ? tile : nullptr, ldc, false},
                            a + row * lda + k0, lda, 1, b, ldb, depth, ahead);
      });
    }
  }
}

template <class T>
void matmul(T* c, const T* a, int64_t lda, int64_t m, Weight w, int64_t k, int64_t n0, int64_t n1,
            T* scratch) {
  if (k == 0) {
    std::fill(c, c + m * padded<T>(n1 - n0), T(0));
    return;
  }
  with_storage<T>(w.dtype, [&](auto stored) {
    using S = decltype(stored);
    if (w.stride_k == 1) {
      matmul_nt<T, S>(c, a, lda, m, w, k, n0, n1, scratch);
    } else {
      matmul_nn<T, S>(c, a, lda, m, w, k, n0, n1, scratch);
    }
  });
}

template <class T>
int64_t matmul_scratch(int64_t k) {
  const int64_t nt = kOctet * padded<T>(std::min(k, kDepthChunkNT));
  const int64_t nn = kMatmulColumns * std::min(k, kDepthChunkNN);
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
        nn_rows<T, kTileNN>(int(count_m), to, columns + m, 1, ld_left, panel, width, depth,
                            {reinterpret_cast<const char*>(panel), 0, 1});
      });
    }
    if (!direct) store_rows<T>(corner, dtype, stride, sums, width, height, count);
  }
  fence();
}
