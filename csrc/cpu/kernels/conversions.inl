// Conversions between what memory holds and what is computed with; rounding is to nearest even.
// Those of single elements are integer operations, so that the compiler makes vector code of
// loops over them on every processor.

// Calls body with a value of the type that `dtype` is stored as. Only double is
// computed in double, and nothing else is, and bf16 is an operand of its own tensors
// alone, so half of the pairs never occur.
template <class T, class Body>
inline void with_storage(Dtype dtype, Body body) {
  if constexpr (sizeof(T) == 8) {
    body(double());
  } else if constexpr (__is_same(T, bf16)) {
    body(bf16());
  } else if (dtype == Dtype::f32) {
    body(float());
  } else if (dtype == Dtype::bf16) {
    body(bf16());
  } else {
    body(f16());
  }
}

// The same of the operations that take a float64 beside any other dtype, and add up in it.
template <class T, class Body>
inline void with_any_storage(Dtype dtype, Body body) {
  if constexpr (sizeof(T) == 8) {
    if (dtype != Dtype::f64) return with_storage<float>(dtype, body);
  }
  with_storage<T>(dtype, body);
}

// Row r, as elements of S.
template <class S>
const S* row_of(const Rows& rows, int64_t r) {
  return static_cast<const S*>(rows.data) + (rows.index ? rows.index[r] : r) * rows.stride;
}

inline float to_compute(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
inline float to_compute(float x) { return x; }
inline double to_compute(double x) { return x; }

// A half has 5 bits of exponent: scaling by 2^112 moves its exponent into float's
// range, subnormals included; infinities and NaN are what then still overflows.
inline float to_compute(f16 x) {
  const uint32_t bits = x.bits, magnitude = (bits & 0x7fffu) << 13;
  const uint32_t scaled = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t special = (bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return bit_cast<float>(scaled | special | (bits & 0x8000u) << 16);
}

inline void from_compute(float& y, float x) { y = x; }
inline void from_compute(double& y, double x) { y = x; }
inline void from_compute(bf16& y, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  y.bits = uint16_t(x != x ? 0x7fc0u : rounded);
}
inline void from_compute(f16& y, float x) {
  const uint32_t sign = (bit_cast<uint32_t>(x) >> 16) & 0x8000u;
  const uint32_t bits = bit_cast<uint32_t>(x) & 0x7fffffffu;
  // Normal halves: round the 13 bits that go; a carry may make the next exponent.
  const uint32_t normal = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  // Subnormal halves: adding 0.5 lets the float unit round at the half's last bit.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(bits) + 0.5f) - 0x3f000000u;
  uint32_t half = bits < 0x38800000u ? subnormal : normal;
  half = bits >= 0x477ff000u ? 0x7c00u : half;
  half = bits > 0x7f800000u ? 0x7e00u : half;
  y.bits = uint16_t(half | sign);
}

// One vector of T from as many elements of S.
template <class T, class S>
MOE_INLINE V<T> load_as(const S* p) {
  if constexpr (__is_same(S, T)) {
    return load(p);
#if MOE_VECTOR_BYTES == 64
  } else if constexpr (__is_same(T, float) && __is_same(S, bf16)) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return (V<T>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
  } else if constexpr (__is_same(T, float) && __is_same(S, f16)) {
    return (V<T>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif MOE_VECTOR_BYTES == 32
  } else if constexpr (__is_same(T, float) && __is_same(S, bf16)) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return (V<T>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
  } else if constexpr (__is_same(T, float) && __is_same(S, f16)) {
    return (V<T>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
  } else {
    T wide[Simd<T>::lanes];
    for (int i = 0; i < Simd<T>::lanes; ++i) wide[i] = to_compute(p[i]);
    return load(wide);
  }
}

// A vector of T to as many elements of P, rounded to nearest even.
template <class P, class X>
MOE_INLINE void store_as(P* p, X v) {
#ifdef MOE_MULTIPLIES_BF16
  if constexpr (__is_same(P, bf16)) {
    const __m256i bits = (__m256i)_mm512_cvtneps_pbh((__m512)v);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
  } else
#endif
    store(p, v);
}

// A vector of operands from memory.
template <class L, class S>
MOE_INLINE V<L> load_lanes(const S* p) {
  if constexpr (kElements<L> == 2) {
    return load(reinterpret_cast<const L*>(p));
  } else {
    return load_as<L>(p);
  }
}

#ifdef MOE_MULTIPLIES_BF16
// Lane by lane, both rounded to nearest even.
MOE_INLINE V<bf16_pair> round_pairs(V<float> first, V<float> second) {
  const __m512i even = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)first));
  const __m512i odd = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)second));
  return (V<bf16_pair>)_mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
}

// The columns of two rows as pairs: the first 16 of them, and the others.
MOE_INLINE void weave(__m512i first, __m512i second, V<bf16_pair>& left, V<bf16_pair>& right) {
  const __m512i pairs = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                         8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i later = _mm512_add_epi16(pairs, _mm512_set1_epi16(16));
  left = (V<bf16_pair>)_mm512_permutex2var_epi16(first, pairs, second);
  right = (V<bf16_pair>)_mm512_permutex2var_epi16(first, later, second);
}
#endif

// Two vectors of lanes from weights across k: of the row at p, or of pairs, from that row and the
// next, `stride` elements on.
template <class L, class S>
MOE_INLINE void load_two(const S* p, int64_t stride, V<L>& left, V<L>& right) {
  if constexpr (kElements<L> == 2) {
    weave(_mm512_loadu_si512(p), _mm512_loadu_si512(p + stride), left, right);
  } else {
    left = load_as<L>(p);
    right = load_as<L>(p + Simd<L>::lanes);
  }
}

template <class T, class S>
inline void convert_in(T* dst, const S* src, int64_t n) {
  if constexpr (__is_same(T, bf16)) {
    std::copy(src, src + n, dst);
  } else {
    int64_t i = 0;
    for (; i + Simd<T>::lanes <= n; i += Simd<T>::lanes) store(dst + i, load_as<T>(src + i));
    for (; i < n; ++i) dst[i] = to_compute(src[i]);
  }
}

// Of short rows, too, vector code: a loop left to the compiler begins with more elements.
template <class T, class S>
inline void convert_out(S* dst, const T* src, int64_t n) {
  constexpr int lanes = Simd<T>::lanes;
  int64_t i = 0;
#if MOE_VECTOR_BYTES > 16
  if constexpr (__is_same(T, float) && __is_same(S, f16)) {
    for (; i + lanes <= n; i += lanes) {
#if MOE_VECTOR_BYTES == 64
      const __m256i bits = _mm512_cvtps_ph((__m512)load(src + i), _MM_FROUND_TO_NEAREST_INT);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + i), bits);
#else
      const __m128i bits = _mm256_cvtps_ph((__m256)load(src + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i), bits);
#endif
    }
  }
#endif
#pragma omp simd simdlen(lanes)
  for (int64_t j = i; j < n; ++j) from_compute(dst[j], src[j]);
}
