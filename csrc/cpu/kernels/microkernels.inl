// The microkernels, which do all the work of a matrix product: a tile of c in registers.
//
// L is what a lane of their operands holds; `k` and the operands' strides count lanes, but for
// weights across k, whose rows are single elements of k.
//
//   packed_kernel   c^T (R, N vectors) += w (R, K) p (K, N vectors): w's elements are broadcast
//                   from where they lie; p is a micropanel of packed rows of a.
//   nt_kernel       c (M, 8) += a (M, K) w (8, K)^T, both read along k: lane l of a vector sums
//                   k = l mod lanes, and a tree adds the lanes at the end. For rows too few to
//                   fill a micropanel's vectors.
//   nn_kernel       c (M, 2 vectors) = a (M, K) b (K, 2 vectors): a's elements are broadcast;
//                   b is a packed micropanel.
//   wide_kernel     c (M, N vectors) += a (M, K) w (K, N vectors): w is read where it lies.
//   long_kernel     c (M, N) += a (M, 4) w (4, N): w is read where it lies, and the sums wait in
//                   a cache.
//
// While a tile computes, it prefetches weights that come next: a weight is read from memory
// once, and that read would otherwise cost as much as the arithmetic.

constexpr int kWeightRows = 8;

// What comes next: `rows` rows, row_stride bytes apart. A tile goes `step` bytes along them at
// each of its own steps along k.
struct Prefetch {
  const char* at;
  int64_t row_stride, rows, step;
};

// ---- the sums of eight vectors' lanes, as one row of eight

template <class T>
MOE_INLINE void sum_lanes(const V<T> (&v)[kWeightRows], T* out, bool accumulate) {
  constexpr int lanes = Simd<T>::lanes;
  T sums[kWeightRows];
  for (int r = 0; r < kWeightRows; ++r) {
    T part[lanes];
    store(part, v[r]);
    for (int width = lanes / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) part[i] += part[i + width];
    sums[r] = part[0];
  }
  for (int r = 0; r < kWeightRows; ++r) out[r] = accumulate ? out[r] + sums[r] : sums[r];
}

#if MOE_VECTOR_BYTES == 64
// Each step adds the upper half of every source to its lower half and packs two sources into one.
MOE_INLINE void sum_lanes(const V<float> (&v)[kWeightRows], float* out, bool accumulate) {
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
MOE_INLINE void sum_lanes(const V<float> (&v)[kWeightRows], float* out, bool accumulate) {
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

// ---- of eight rows of weights

// How many of the eight a tile takes at once, each with so many vectors of sums: at most `most`.
constexpr int rows_at_once(int sums, int most) {
  return sums * most > kRegisterSums ? rows_at_once(sums, most / 2) : most;
}

// One sum of a lane covers no more of k than this: long ones lose digits.
constexpr int64_t kLongestSum = 384;

// The rows ahead are R or none; while the tile walks along its R-th part of k, it prefetches one
// of them.
template <class L, int R, int N, class T = LaneSum<L>>
void packed_kernel(T* c, int64_t ldc, bool accumulate, const L* w, int64_t ldw, const L* panel,
                   int64_t k, Prefetch ahead) {
  constexpr int lanes = Simd<L>::lanes;
  // Every third row has a pointer of its own, the others are one or two strides from it:
  // addresses that need no more registers than there are.
  const L *w0 = w, *w3 = w + 3 * ldw, *w6 = w + 6 * ldw;
  // A line is requested once: requests under way take the places that other misses need.
  const int64_t within_line = ahead.step > 0 ? kLineBytes / ahead.step - 1 : -1;
  int64_t parts = R;  // that one sum covers
  while (k * parts > R * kLongestSum) parts /= 2;
  for (int64_t part = 0, i = 0; part < R;) {
    V<T> sum[R][N];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < N; ++j) sum[r][j] = V<T>{};
    for (const int64_t last = part + parts; part < last; ++part) {
      const char* next = ahead.at + part * ahead.row_stride;
#pragma GCC unroll kDepthUnroll
      for (const int64_t end = k * (part + 1) / R; i < end; ++i) {
        if ((i & within_line) == 0) __builtin_prefetch(next, 0, 2);
        next += ahead.step;
        V<L> x[N];
        for (int j = 0; j < N; ++j) x[j] = load(panel + j * lanes);
        panel += N * lanes;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const V<L> weight = splat(((r < 3 ? w0 : r < 6 ? w3 : w6) + r % 3 * ldw)[i]);
          for (int j = 0; j < N; ++j) sum[r][j] = multiply_add(x[j], weight, sum[r][j]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < N; ++j) {
        T* at = c + r * ldc + j * lanes;
        store(at, accumulate ? load(at) + sum[r][j] : sum[r][j]);
      }
    }
    accumulate = true;
  }
}

// A function of its own: conversions of many tiles in one function took each other's registers.
template <class L, int M, bool Prefetches, class S, class T = LaneSum<L>>
__attribute__((noinline)) void nt_kernel(T* c, int64_t ldc, bool accumulate, const L* a,
                                         int64_t lda, const S* w, int64_t ldw, int64_t k,
                                         Prefetch ahead) {
  constexpr int lanes = Simd<L>::lanes, at_once = rows_at_once(M, kWeightRowsAtOnce);
  // The rows ahead come side by side, or one after the other.
  const bool side_by_side = ahead.row_stride > kShortRow;
  const int64_t apart = side_by_side ? ahead.row_stride : ahead.step;
  const int64_t along = side_by_side ? ahead.step : at_once * ahead.step;
  V<T> sum[M][kWeightRows];
#pragma GCC unroll 4
  for (int first = 0; first < kWeightRows; first += at_once) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
      for (int r = 0; r < at_once; ++r) sum[m][first + r] = V<T>{};
    const S *w0 = w + first * ldw, *w3 = w0 + 3 * ldw, *w6 = w0 + 6 * ldw;  // as in packed_kernel
    const char* next = ahead.at + first * ahead.row_stride;
    for (int64_t i = 0; i < k; i += lanes) {
#pragma GCC unroll 8
      for (int r = 0; r < (Prefetches ? at_once : 0); ++r)
        __builtin_prefetch(next + r * apart, 0, 2);
      next += along;
      const auto weight_of = [&](int r) {
        V<L> weight = load_as<L>((r < 3 ? w0 : r < 6 ? w3 : w6) + r % 3 * ldw);
        if (M > 1) MOE_KEEP_IN_REGISTER(weight);
        return weight;
      };
      // The shorter side is held in registers while the longer one passes.
      if constexpr (M > at_once) {
        V<L> weight[at_once];
#pragma GCC unroll 8
        for (int r = 0; r < at_once; ++r) weight[r] = weight_of(r);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          V<L> x = load(a + m * lda + i);
          MOE_KEEP_IN_REGISTER(x);
          for (int r = 0; r < at_once; ++r)
            sum[m][first + r] = multiply_add(x, weight[r], sum[m][first + r]);
        }
      } else {
        V<L> x[M];
        for (int m = 0; m < M; ++m) x[m] = load(a + m * lda + i);
#pragma GCC unroll 8
        for (int r = 0; r < at_once; ++r) {
          const V<L> weight = weight_of(r);
          for (int m = 0; m < M; ++m)
            sum[m][first + r] = multiply_add(x[m], weight, sum[m][first + r]);
        }
      }
      w0 += lanes, w3 += lanes, w6 += lanes;
    }
  }
  for (int m = 0; m < M; ++m) sum_lanes(sum[m], c + m * ldc, accumulate);
}

// ---- of two vectors of columns

// Where a tile goes: to c, on top of `before` (null: of nothing), which may be c itself;
// past the caches where nothing reads it soon.
template <class T>
struct Target {
  T* c;
  int64_t ldc;
  const T* before;
  int64_t ld_before;
  bool past_caches;
};

template <class L, int M, class T = LaneSum<L>>
void nn_kernel(Target<T> to, const L* a, int64_t am, int64_t ak, const L* b, int64_t ldb, int64_t k,
               Prefetch ahead) {
  constexpr int lanes = Simd<L>::lanes;
  V<T> sum[M][2];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) sum[m][0] = sum[m][1] = V<T>{};
#pragma GCC unroll kDepthUnroll
  for (int64_t i = 0; i < k; ++i) {
    __builtin_prefetch(ahead.at, 0, 2);
    ahead.at += ahead.step;
    const V<L> left = load(b), right = load(b + lanes);
    b += ldb;
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const V<L> x = splat(a[m * am]);
      sum[m][0] = multiply_add(x, left, sum[m][0]);
      sum[m][1] = multiply_add(x, right, sum[m][1]);
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

// As wide as registers allow: what lies far apart in memory is best read in long pieces.
template <class L, int M, int N, class S, class T = LaneSum<L>>
void wide_kernel(T* c, int64_t ldc, bool accumulate, const L* a, int64_t lda, const S* w,
                 int64_t stride_k, int64_t k) {
  constexpr int lanes = Simd<L>::lanes, line = kLineBytes / sizeof(S), rows_ahead = 8;
  V<T> sum[M][N];
#pragma GCC unroll 24
  for (int j = 0; j < N; ++j)
    for (int m = 0; m < M; ++m) sum[m][j] = V<T>{};
  for (int64_t i = 0; i < k; ++i) {
#pragma GCC unroll 24
    for (int j = 0; j < N * lanes; j += line)
      for (int e = 0; e < kElements<L>; ++e)
        __builtin_prefetch(w + (rows_ahead + e) * stride_k + j, 0, 2);
    V<L> x[M];
    for (int m = 0; m < M; ++m) x[m] = splat(a[m * lda + i]);
#pragma GCC unroll 24
    for (int j = 0; j < N; j += 2) {
      V<L> left, right;
      load_two<L>(w + j * lanes, stride_k, left, right);
      for (int m = 0; m < M; ++m) {
        sum[m][j] = multiply_add(x[m], left, sum[m][j]);
        sum[m][j + 1] = multiply_add(x[m], right, sum[m][j + 1]);
      }
    }
    w += kElements<L> * stride_k;
  }
#pragma GCC unroll 24
  for (int j = 0; j < N; ++j) {
    for (int m = 0; m < M; ++m) {
      T* at = c + m * ldc + j * lanes;
      store(at, accumulate ? load(at) + sum[m][j] : sum[m][j]);
    }
  }
}

// Reads Rows rows of w from end to end and prefetches as many; sums (M, cols) holds what the rows
// before them gave, unless these are the first. The last ones' sums go to c.
template <class T, int M, int Rows, class S>
void long_kernel(T* c, int64_t ldc, bool accumulate, T* sums, bool first, bool last, const T* a,
                 int64_t lda, const S* w, int64_t stride_k, int64_t cols) {
  constexpr int lanes = Simd<T>::lanes;
  V<T> x[M][Rows];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < Rows; ++r) x[m][r] = splat(a[m * lda + r]);
  for (int64_t n = 0; n < cols; n += lanes) {
    V<T> sum[M];
    for (int m = 0; m < M; ++m) sum[m] = first ? V<T>{} : load(sums + m * cols + n);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      __builtin_prefetch(w + (Rows + r) * stride_k + n, 0, 2);
      const V<T> weight = load_as<T>(w + r * stride_k + n);
      for (int m = 0; m < M; ++m) sum[m] = multiply_add(x[m][r], weight, sum[m]);
    }
    for (int m = 0; m < M; ++m) {
      T* at = c + m * ldc + n;
      if (!last) {
        store(sums + m * cols + n, sum[m]);
      } else {
        store(at, accumulate ? load(at) + sum[m] : sum[m]);
      }
    }
  }
}

// ---- tiles whose height is known at run time

// body(std::integral_constant<int, height>()), for a height of 1 to Most.
template <int Most, class Body>
inline void with_height(int64_t height, Body body) {
  if constexpr (Most > 1) {
    if (height < Most) return with_height<Most - 1>(height, body);
  }
  body(std::integral_constant<int, Most>());
}

// Tiles of nearly equal height: 13 rows go as 7 and 6, not as 12 and a slow 1. `body` takes
// where a tile begins, its height, and the tile's number.
template <class Body>
inline void for_even_tiles(int64_t rows, int64_t most, Body body) {
  const int64_t tiles = (rows + most - 1) / most;
  for (int64_t i = 0, begin = 0; i < tiles; ++i) {
    const int64_t end = rows * (i + 1) / tiles;
    body(begin, end - begin, i);
    begin = end;
  }
}
