// Activations and gates, on vectors. Preactivations come in as two blocks of columns,
// gate and up; in memory a row holds them as [gate; up] or interleaved.

// value = phi(g), and its derivative.
template <class T>
struct Phi {
  V<T> value, slope;
};

template <class T, Activation kind>
inline Phi<T> phi(V<T> g, T alpha) {
  const V<T> zero = {};
  if constexpr (kind == Activation::silu) {
    const V<T> s = sigmoid<T>(g * alpha);
    return {g * s, s + g * s * (T(1) - s) * alpha};
  } else if constexpr (kind == Activation::gelu) {
    const V<T> cdf = T(0.5) + T(0.5) * erf(g * T(0.70710678118654752440));
    return {g * cdf, cdf + g * exp(g * g * T(-0.5)) * T(0.39894228040143267794)};
  } else if constexpr (kind == Activation::gelu_tanh) {
    // 0.5 (1 + tanh(u)) = sigmoid(2u)
    const T scale = T(2 * 0.79788456080286535588), cubic = T(0.044715);
    const V<T> s = sigmoid<T>(g * scale * (T(1) + g * g * cubic));
    return {g * s, s + g * s * (T(1) - s) * scale * (T(1) + g * g * (3 * cubic))};
  } else {
    // Comparisons are written so that NaN passes through.
    const V<T> r = g < zero ? zero : g;
    const V<T> step = g > zero ? zero + T(1) : zero;
    if constexpr (kind == Activation::relu) return {r, step};
    return {r * r, T(2) * r};
  }
}

// Calls body(kind) with the activation as a compile-time constant.
template <class Body>
inline void with_activation(Activation kind, Body body) {
  switch (kind) {
    case Activation::silu:
      return body(std::integral_constant<Activation, Activation::silu>());
    case Activation::gelu:
      return body(std::integral_constant<Activation, Activation::gelu>());
    case Activation::gelu_tanh:
      return body(std::integral_constant<Activation, Activation::gelu_tanh>());
    case Activation::relu:
      return body(std::integral_constant<Activation, Activation::relu>());
    case Activation::relu2:
      return body(std::integral_constant<Activation, Activation::relu2>());
  }
}

// The gate's columns i0..i1 and the up-projection's, in a row of preactivations (or of dh).
struct Columns {
  int64_t gate, up, step;
};
inline Columns columns_of(const ActivationSpec& spec, int64_t i0, int64_t intermediate) {
  if (!spec.gated) return {i0, i0, 1};
  if (spec.interleaved) return {2 * i0, 2 * i0 + 1, 2};
  return {i0, intermediate + i0, 1};
}

// The last block also zeroes a row's padding: matmul reads whole vectors along k.
template <class P>
inline void zero_padding(P* row, int64_t cols) {
  std::fill(row + cols, row + round_up(cols, kLineBytes / sizeof(P)), P());
}

// Preactivations of some columns of one row, to memory.
template <class T>
MOE_INLINE void keep(const RowsOut& row, const Columns& at, const T* g, const T* u, int64_t count) {
  with_storage<T>(row.dtype, [&](auto stored) {
    auto* h = static_cast<decltype(stored)*>(row.data);
    if (at.step == 1) {
      convert_out(h + at.gate, g, count);
      if (u) convert_out(h + at.up, u, count);
    } else {
      for (int64_t i = 0; i < count; ++i) {
        from_compute(h[at.gate + 2 * i], g[i]);
        from_compute(h[at.up + 2 * i], u[i]);
      }
    }
  });
}

template <class T, Activation kind>
MOE_INLINE V<T> activated(V<T> x, const T* u, const ActivationSpec& spec) {
  if (!u) return phi<T, kind>(x, T(spec.alpha)).value;
  const V<T> limit = splat(T(spec.limit));
  x = x > limit ? limit : x;
  V<T> v = load(u);
  v = v > limit ? limit : v;
  v = v < -limit ? -limit : v;
  return phi<T, kind>(x, T(spec.alpha)).value * (v + T(spec.up_offset));
}

// One row as it is: `a` is its activations' first column.
template <class P, class T = Sum<P>>
MOE_INLINE void activate_row(P* a, T* g, T* u, int64_t count, const Columns& at,
                             const Preactivations<T>& h, const RowsOut& kept) {
  constexpr int lanes = Simd<T>::lanes;
  if (h.bias) {
    for (int64_t i = 0; i < count; ++i) g[i] += h.bias[at.gate + i * at.step];
    if (u) {
      for (int64_t i = 0; i < count; ++i) u[i] += h.bias[at.up + i * at.step];
    }
  }
  if (kept.data) keep(kept, at, g, u, count);
  with_activation(h.spec.phi, [&](auto kind) {
    for (int64_t i = 0; i < count; i += lanes) {
      const V<T> y = activated<T, kind>(load(g + i), u ? u + i : nullptr, h.spec);
      if (i + lanes <= count) {
        store_as(a + i, y);
      } else {
        for (int64_t l = 0; i + l < count; ++l) from_compute(a[i + l], y[l]);
      }
    }
  });
}

// Packed rows, column by column.
template <class L, class T = LaneSum<L>>
struct PackedActivation {
  static constexpr int64_t lanes = Simd<T>::lanes;
  const Micropanels<L>& a;
  const Preactivations<T>& h;
  const Product<T>&gate, &up;
  int64_t packed, i0, i1, intermediate;

  void add_bias() const {
    for (int64_t i = i0; h.bias && i < i1; ++i) {
      const Columns at = columns_of(h.spec, i, intermediate);
      T *g = gate.data + (i - i0) * gate.ld, *u = up.data + (i - i0) * gate.ld;
      for (int64_t r = 0; r < gate.ld; ++r) g[r] += h.bias[at.gate];
      for (int64_t r = 0; up.data && r < gate.ld; ++r) u[r] += h.bias[at.up];
    }
  }

  // Rows r.. of columns i.. as they are.
  void unpack(const Product<T>& from, int64_t i, int64_t r, T (&rows)[lanes][lanes]) const {
    V<T> v[lanes];
    for (int64_t j = 0; j < lanes; ++j)
      v[j] = i + j < i1 ? load(from.data + (i + j - i0) * from.ld + r) : V<T>{};
    transpose_square<T>(v);
    for (int64_t j = 0; j < lanes; ++j) store(rows[j], v[j]);
  }

  void keep_rows() const {
    for (int64_t r = 0; h.kept.data && r < packed; r += lanes) {
      for (int64_t i = i0; i < i1; i += lanes) {
        T g[lanes][lanes], u[lanes][lanes];
        unpack(gate, i, r, g);
        if (up.data) unpack(up, i, r, u);
        for (int64_t j = 0; j < std::min(lanes, packed - r); ++j) {
          keep(h.kept.from_row(r + j), columns_of(h.spec, i, intermediate), g[j],
               up.data ? u[j] : nullptr, std::min(lanes, i1 - i));
        }
      }
    }
  }

  void activate() const {
    with_activation(h.spec.phi, [&](auto kind) {
      a.for_each([&](int64_t first, int64_t width, int64_t) {
        for (int64_t i = i0; i < i1; i += kElements<L>) {
          L* to = a.at(first, width, i / kElements<L>);
          for (int64_t j = 0; j < width * lanes; j += lanes) {
            const auto column = [&](int64_t c) {
              const int64_t from = (c - i0) * gate.ld + first * lanes + j;
              return activated<T, kind>(load(gate.data + from), up.data ? up.data + from : nullptr,
                                        h.spec);
            };
            if constexpr (kElements<L> == 1) {
              store(to + j, column(i));
            } else {
              store(to + j, round_pairs(column(i), i + 1 < i1 ? column(i + 1) : V<T>{}));
            }
          }
        }
      });
    });
  }
};

template <class P, class T = Sum<P>>
void activate_block(const Block<P>& a, const Preactivations<T>& h, int64_t i0) {
  using L = Lane<P>;
  const int64_t count = h.gate.cols, intermediate = a.cols;
  const Micropanels<L> panels(a);
  const Product<T> gate(h.gate), up(h.up);
  const PackedActivation<L> packed{panels, h, gate, up, a.packed, i0, i0 + count, intermediate};
  packed.add_bias();
  packed.keep_rows();
  packed.activate();
  const Columns at = columns_of(h.spec, i0, intermediate);
  for (int64_t r = 0; r < gate.others.rows; ++r) {
    P* row = reinterpret_cast<P*>(panels.others.data) + r * padded<P>(intermediate);
    T *g = gate.others.data + r * gate.others.ld, *u = up.others.data + r * up.others.ld;
    const RowsOut kept = h.kept.data ? h.kept.from_row(a.packed + r) : h.kept;
    activate_row(row + i0, g, h.up.data ? u : nullptr, count, at, h, kept);
    if (i0 + count == intermediate) zero_padding(row, intermediate);
  }
}

template <class P, class T = Sum<P>>
void activate_backward(const ActivationBackward<P>& to, const Matrix<T>& da, int64_t i0) {
  constexpr int lanes = Simd<T>::lanes;
  const ActivationSpec& spec = to.spec;
  const int64_t count = da.cols, intermediate = to.wa.cols;
  const Columns at = columns_of(spec, i0, intermediate);
  const V<T> limit = splat(T(spec.limit)), zero = {};
  // A vector may hang over the block's end.
  T g[kActivateColumns + lanes] = {}, u[kActivateColumns + lanes] = {},
                         d[kActivateColumns + lanes] = {};
  T dg[kActivateColumns + lanes], du[kActivateColumns + lanes], scaled[kActivateColumns + lanes];
  for (int64_t r = 0; r < da.rows; ++r) {
    with_storage<T>(to.h.dtype, [&](auto stored) {
      const auto* row = row_of<decltype(stored)>(to.h, r);
      if (at.step == 1) {
        convert_in(g, row + at.gate, count);
        if (spec.gated) convert_in(u, row + at.up, count);
      } else {
        for (int64_t i = 0; i < count; ++i) {
          g[i] = to_compute(row[at.gate + 2 * i]);
          u[i] = to_compute(row[at.up + 2 * i]);
        }
      }
    });
    std::copy(da.data + r * da.ld, da.data + r * da.ld + count, d);
    const V<T> w = splat(to.weight ? to.weight[r] : T(1));
    V<T> inner = zero;
    with_activation(spec.phi, [&](auto kind) {
      for (int64_t i = 0; i < count; i += lanes) {
        const V<T> upstream = load(d + i), x = load(g + i);
        if (spec.gated) {
          const Phi<T> f = phi<T, kind>(x > limit ? limit : x, T(spec.alpha));
          const V<T> v = load(u + i);
          const V<T> clamped = v > limit ? limit : v < -limit ? -limit : v;
          const V<T> factor = clamped + T(spec.up_offset);
          const V<T> value = f.value * factor;
          const V<T> weighted = upstream * w;
          inner += upstream * value;
          store(scaled + i, value * w);
          const V<T> slope = f.slope * factor;
          store(dg + i, weighted * (x > limit ? zero : slope));
          store(du + i, weighted * (v > limit ? zero : v < -limit ? zero : f.value));
        } else {
          const Phi<T> f = phi<T, kind>(x, T(spec.alpha));
          inner += upstream * f.value;
          store(scaled + i, f.value * w);
          store(dg + i, upstream * w * f.slope);
        }
      }
    });
    if (to.score) {
      T sum = 0;
      for (int l = 0; l < lanes; ++l) sum += inner[l];
      to.score[r] += sum;
    }
    P *dh = to.dh.data + r * to.dh.ld, *wa = to.wa.data + r * to.wa.ld;
    convert_out(wa + i0, scaled, count);
    for (int64_t i = 0; i < count; ++i) from_compute(dh[at.gate + i * at.step], dg[i]);
    if (spec.gated) {
      for (int64_t i = 0; i < count; ++i) from_compute(dh[at.up + i * at.step], du[i]);
    }
    if (i0 + count == intermediate) {
      zero_padding(dh, to.dh.cols);
      zero_padding(wa, intermediate);
    }
  }
}
