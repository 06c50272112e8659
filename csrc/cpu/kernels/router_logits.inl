// router_logits: logits = x W^T + b of a block of tokens and experts, x and W in their own dtypes.
//
// A sum goes over H in slabs of 1024: sixteen lanes add h = i, i + 16, ..., the lanes are added as
// a tree, then slab after slab, so no lane adds more than 64, whatever other tokens there are. The
// lanes are sixteen on every instruction set, where the experts' microkernels have as many as a
// vector: a token takes the same experts on every processor that fuses products and sums. That is
// why the logits have a product of their own.

constexpr int64_t kLogitLanes = 16, kLogitSlab = 1024;
constexpr int64_t kLogitExperts = 4;  // whose rows stay in the first-level cache, converted

// One AVX-512 register of float, several registers elsewhere.
template <class A>
struct SixteenOf {
  typedef A type __attribute__((vector_size(kLogitLanes * sizeof(A))));
};
template <class A>
using Sixteen = typename SixteenOf<A>::type;

// The sum of N lanes, as a tree of halves.
template <class A, int N>
MOE_INLINE A sum_as_tree(const A* lanes) {
  if constexpr (N == 2) {
    return lanes[0] + lanes[1];
  } else {
    typedef A Half __attribute__((vector_size(N / 2 * sizeof(A))));
    Half low, high;
    __builtin_memcpy(&low, lanes, sizeof(low));
    __builtin_memcpy(&high, lanes + N / 2, sizeof(high));
    low += high;
    A part[N / 2];
    __builtin_memcpy(part, &low, sizeof(low));
    return sum_as_tree<A, N / 2>(part);
  }
}

// c (R, C) += a (R, depth) b (C, depth)^T; the depth is a multiple of the lanes.
template <int R, int C, class A>
MOE_INLINE void logits_tile(const Matrix<A>& c, const Matrix<const A>& a,
                            const Matrix<const A>& b) {
  Sixteen<A> sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int e = 0; e < C; ++e) sum[r][e] = Sixteen<A>{};
  for (int64_t k = 0; k < a.cols; k += kLogitLanes) {
    Sixteen<A> right[C];
    for (int e = 0; e < C; ++e)
      __builtin_memcpy(&right[e], b.data + e * b.ld + k, sizeof(right[e]));
    for (int r = 0; r < R; ++r) {
      Sixteen<A> left;
      __builtin_memcpy(&left, a.data + r * a.ld + k, sizeof(left));
      for (int e = 0; e < C; ++e) sum[r][e] += left * right[e];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int e = 0; e < C; ++e)
      c.data[r * c.ld + e] += sum_as_tree<A, kLogitLanes>(reinterpret_cast<const A*>(&sum[r][e]));
}

// All of c, in tiles of MR x MR sums, which stay in registers.
template <class A>
void logits_tiles(const Matrix<A>& c, const Matrix<const A>& a, const Matrix<const A>& b) {
  constexpr int MR = MOE_VECTOR_BYTES == 64 && sizeof(A) == 4 ? 4 : 2;
  const auto row_of_tiles = [&](auto height, int64_t r) {
    int64_t e = 0;
    const auto take = [&](auto width) {
      logits_tile<height, width>(c.from_row(r, height).from_column(e, width), a.from_row(r, height),
                                 b.from_row(e, width));
      e += width;
    };
    while (e + MR <= b.rows) take(std::integral_constant<int, MR>());
    while (e < b.rows) take(std::integral_constant<int, 1>());
  };
  int64_t r = 0;
  for (; r + MR <= a.rows; r += MR) row_of_tiles(std::integral_constant<int, MR>(), r);
  for (; r < a.rows; ++r) row_of_tiles(std::integral_constant<int, 1>(), r);
}

// Converted copies of x's rows and of a few of W's, for a slab.
template <class A>
struct LogitsPieces {
  int64_t ld;
  A *x, *weight;

  LogitsPieces(Scratch& scratch, int64_t tokens, int64_t hidden)
      : ld(round_up(std::min(hidden, kLogitSlab), kLogitLanes)),
        x(scratch.take<A>(tokens * ld)),
        weight(scratch.take<A>(kLogitExperts * ld)) {}
};

template <class A>
int64_t logits_scratch(int64_t tokens, int64_t hidden) {
  return bytes_of([&](Scratch& scratch) { LogitsPieces<A>(scratch, tokens, hidden); });
}

// Rows begin.. of a slab as lanes need them: where they lie, or a copy padded with zeros.
template <class A>
Matrix<const A> lanes_of_slab(const Rows& rows, int64_t count, int64_t hidden, int64_t begin,
                              A* copy) {
  const int64_t size = std::min(kLogitSlab, hidden - begin), depth = round_up(size, kLogitLanes);
  const Rows slab = rows.from_column(begin);
  if (rows.dtype == Operand<A>::dtype && hidden % kLogitLanes == 0)
    return {row_of<A>(slab, 0), count, depth, rows.stride};
  with_any_storage<A>(rows.dtype, [&](auto stored) {
    for (int64_t r = 0; r < count; ++r) {
      convert_in(copy + r * depth, row_of<decltype(stored)>(slab, r), size);
      std::fill(copy + r * depth + size, copy + (r + 1) * depth, A(0));
    }
  });
  return {copy, count, depth, depth};
}

template <class A>
void router_logits(const Matrix<A>& logits, const Rows& x, const Rows& weight, int64_t hidden,
                   const A* bias, Scratch scratch) {
  const LogitsPieces<A> pieces(scratch, logits.rows, hidden);
  for (int64_t t = 0; t < logits.rows; ++t)
    std::fill_n(logits.data + t * logits.ld, logits.cols, A(0));
  for (int64_t begin = 0; begin < hidden; begin += kLogitSlab) {
    const Matrix<const A> a = lanes_of_slab(x, logits.rows, hidden, begin, pieces.x);
    for (int64_t e = 0; e < logits.cols; e += kLogitExperts) {
      const int64_t count = std::min(kLogitExperts, logits.cols - e);
      logits_tiles(logits.from_column(e, count), a,
                   lanes_of_slab(weight.from_row(e), count, hidden, begin, pieces.weight));
    }
  }
  for (int64_t t = 0; bias && t < logits.rows; ++t)
    for (int64_t e = 0; e < logits.cols; ++e) logits.data[t * logits.ld + e] += bias[e];
}
