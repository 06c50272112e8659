// Products whose k is the row of an expert: out = p^T q, a weight's gradient, of at most KC_TN
// rows at a time.

// The rows of p that stay packed while all columns of q pass by; of more rows than these
// each micropanel of q packs its own again.
constexpr int64_t kRowsKept = 4 * KC_TN;

// dst (rows of lanes, ld) = src's rows and columns, converted; pairs are of two rows, an odd last
// one is paired with zeros. Columns up to `whole` are zero.
template <class L>
void load_across(L* dst, int64_t ld, const Rows& src, int64_t rows, int64_t cols, int64_t whole) {
  with_any_storage<Element<L>>(src.dtype, [&](auto stored) {
    using S = decltype(stored);
    const auto row = [&](int64_t r) { return row_of<S>(src, r); };
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

// The pieces of scratch that a product takes.
template <class P, class T = Sum<P>>
struct OuterPieces {
  using L = Lane<P>;
  static constexpr int64_t width = 2 * Simd<L>::lanes;
  L* panel;  // a chunk of q's rows, (KC_TN, width)
  L* left;   // p's columns, (kRowsKept, ld_left)
  T* sums;   // (m, width)

  OuterPieces(Scratch& scratch, int64_t m)
      : panel(scratch.take<L>(KC_TN * width)),
        left(scratch.take<L>(kRowsKept * padded<L>(m))),
        sums(scratch.take<T>(m * width)) {}
};

template <class P>
int64_t outer_scratch(int64_t m) {
  return bytes_of([&](Scratch& scratch) { OuterPieces<P>(scratch, m); });
}

template <class P, class T = Sum<P>>
void outer(const OuterProduct& product, Scratch scratch) {
  using L = Lane<P>;
  const auto& [out, past_caches, p, q, height, n, rows, even_chunks] = product;
  constexpr int64_t width = OuterPieces<P>::width;
  // Rows of p that lie end to end are packed already.
  const bool in_place =
      kElements<L> == 1 && !p.index && p.stride == height && p.dtype == Operand<Element<L>>::dtype;
  const int64_t ld_left = in_place ? height : padded<L>(height);
  const auto [panel, left, sums] = OuterPieces<P>(scratch, height);
  const int64_t chunks = (rows + KC_TN - 1) / KC_TN;
  const auto cut = [&, rows = rows, even = even_chunks](int64_t chunk) {
    return even ? rows * chunk / chunks : std::min(rows, chunk * KC_TN);
  };
  const bool keeps_left = rows <= kRowsKept;

  for (int64_t n0 = 0; n0 < n; n0 += width) {
    const int64_t count = std::min(width, n - n0);
    const Rows right = q.from_column(n0);
    const RowsOut corner = out.from_column(n0);
    // The last chunk's tiles write where they may: into out itself when it takes whole
    // tiles of T.
    const bool direct = rows > 0 && count == width && size_of(out.dtype) == sizeof(T);
    const auto address =
        reinterpret_cast<uintptr_t>(corner.data) | uintptr_t(out.stride * sizeof(T));
    const bool streamed = past_caches && address % MOE_VECTOR_BYTES == 0;
    if (rows == 0) std::fill(sums, sums + height * width, T(0));
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t r0 = cut(chunk), r1 = cut(chunk + 1);
      const int64_t depth = lanes_of<L>(r1 - r0);
      load_across(panel, width, right.from_row(r0), r1 - r0, count, width);
      L* copy = keeps_left ? left + r0 * ld_left : left;
      if (!in_place && (n0 == 0 || !keeps_left)) {
        load_across(copy, ld_left, p.from_row(r0), r1 - r0, height, height);
      }
      const L* columns = in_place ? row_of<L>(p, r0) : copy;
      const bool last = direct && chunk + 1 == chunks;
      for_even_tiles(height, MR_NN,
                     [&, past = streamed, b = panel, sums = sums, stride = out.stride](
                         int64_t m, int64_t count_m, int64_t) {
                       T* sum = sums + m * width;
                       const T* before = chunk > 0 ? sum : nullptr;
                       const Target<T> to =
                           last ? Target<T>{static_cast<T*>(corner.data) + m * stride, stride,
                                            before, width, past}
                                : Target<T>{sum, width, before, width, false};
                       const Prefetch nothing = {reinterpret_cast<const char*>(b), 0, 0, 0};
                       with_height<MR_NN>(count_m, [&](auto h) {
                         nn_kernel<L, h>(to, columns + m, 1, ld_left, b, width, depth, nothing);
                       });
                     });
    }
    if (!direct) store_rows<T>(corner, {sums, height, count, width});
  }
  fence();
}
