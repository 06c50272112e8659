// Vectors of MOE_VECTOR_BYTES, loads that convert, and the few functions of
// arithmetic that an activation needs. Compiled once an instruction set.

using std::int64_t;

#define MOE_INLINE inline __attribute__((always_inline))

// A vector that several operations use, loaded once: compilers otherwise fold the load
// into each of them, and the load ports become the limit.
#if defined(__x86_64__)
#define MOE_KEEP_IN_REGISTER(v) asm("" : "+v"(v))
#else
#define MOE_KEEP_IN_REGISTER(v) asm("" : "+w"(v))
#endif

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

// What one lane of a vector holds of an operand: an element, or two bf16 that follow each other
// along k. May lie at any address that a bf16 may have.
struct __attribute__((may_alias)) bf16_pair {
  bf16 first, second;
};
template <class P>
using Lane = std::conditional_t<std::is_same_v<P, bf16>, bf16_pair, P>;
template <class L>
using Element = std::conditional_t<std::is_same_v<L, bf16_pair>, bf16, L>;
template <class L>
constexpr int64_t kElements = sizeof(L) / sizeof(Element<L>);
// The lanes that hold k elements; an odd last one is paired with a zero.
template <class L>
constexpr int64_t lanes_of(int64_t k) {
  return (k + kElements<L> - 1) / kElements<L>;
}
// What products of lanes are added up in.
template <class L>
using LaneSum = std::conditional_t<std::is_same_v<L, double>, double, float>;

template <class T>
struct Simd {
  static constexpr int lanes = MOE_VECTOR_BYTES / sizeof(T);
  typedef T V __attribute__((vector_size(MOE_VECTOR_BYTES)));
  typedef T Unaligned __attribute__((vector_size(MOE_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};
template <>
struct Simd<bf16_pair> {
  static constexpr int lanes = MOE_VECTOR_BYTES / 4;
  typedef int32_t V __attribute__((vector_size(MOE_VECTOR_BYTES)));
  typedef int32_t Unaligned
      __attribute__((vector_size(MOE_VECTOR_BYTES), aligned(sizeof(bf16)), may_alias));
};
template <class T>
using V = typename Simd<T>::V;

template <class T>
MOE_INLINE V<T> load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::Unaligned*>(p);
}
template <class T>
MOE_INLINE void store(T* p, V<T> v) {
  *reinterpret_cast<typename Simd<T>::Unaligned*>(p) = v;
}
// Without reading the line first, and without keeping it. p is aligned to the vector.
template <class T>
MOE_INLINE void stream(T* p, V<T> v) {
#if MOE_VECTOR_BYTES == 64
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif MOE_VECTOR_BYTES == 32
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#else
  store(p, v);
#endif
}
// Streamed stores are seen by other threads after this.
MOE_INLINE void fence() {
#if MOE_VECTOR_BYTES > 16
  _mm_sfence();
#endif
}
template <class T>
MOE_INLINE V<T> splat(T s) {
  return s - V<T>{};
}

MOE_INLINE V<bf16_pair> splat(bf16_pair s) {
  int32_t bits;
  __builtin_memcpy(&bits, &s, 4);
  return bits - V<bf16_pair>{};
}

// sum + x w, lane by lane.
template <class X, class S>
MOE_INLINE S multiply_add(X x, X w, S sum) {
  return sum + x * w;
}
#ifdef MOE_MULTIPLIES_BF16
// Both products of a lane. Subnormal numbers count as zero, by the instruction's definition.
MOE_INLINE V<float> multiply_add(V<bf16_pair> x, V<bf16_pair> w, V<float> sum) {
  return (V<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
}
#endif

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// ---- conversions. Loops that the compiler turns into vector code.

inline float to_compute(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
inline float to_compute(float x) { return x; }
inline double to_compute(double x) { return x; }

// A half has 5 bits of exponent: scaling by 2^112 moves its exponent into float's
// range, subnormals included; infinities and NaN are what then still overflows.
inline float to_compute(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  uint32_t bits = uint32_t(x.bits & 0x7fffu) << 13;
  float magnitude;
  __builtin_memcpy(&magnitude, &bits, 4);
  magnitude *= 0x1p112f;
  __builtin_memcpy(&bits, &magnitude, 4);
  bits |= (x.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  bits |= sign;
  __builtin_memcpy(&magnitude, &bits, 4);
  return magnitude;
}

inline void from_compute(float& y, float x) { y = x; }
inline void from_compute(double& y, double x) { y = x; }
inline void from_compute(bf16& y, float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  y.bits = uint16_t(x != x ? 0x7fc0u : rounded);
}
inline void from_compute(f16& y, float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  // Normal halves: round the 13 bits that go; a carry may make the next exponent.
  const uint32_t normal = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  // Subnormal halves: adding 0.5 lets the float unit round at the half's last bit.
  float magnitude;
  __builtin_memcpy(&magnitude, &bits, 4);
  const float shifted = magnitude + 0.5f;
  uint32_t subnormal;
  __builtin_memcpy(&subnormal, &shifted, 4);
  subnormal -= 0x3f000000u;
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
  } else if constexpr (__is_same(S, bf16)) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return (V<T>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
  } else if constexpr (__is_same(S, f16)) {
    return (V<T>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif MOE_VECTOR_BYTES == 32
  } else if constexpr (__is_same(S, bf16)) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return (V<T>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
  } else if constexpr (__is_same(S, f16)) {
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

template <class T, class S>
inline void convert_out(S* dst, const T* src, int64_t n) {
  for (int64_t i = 0; i < n; ++i) from_compute(dst[i], src[i]);
}

// ---- exp and erf. For double the library's, lane by lane: float64 is for checking.

template <class F>
inline V<double> each_lane(V<double> x, F f) {
  for (int i = 0; i < Simd<double>::lanes; ++i) x[i] = f(x[i]);
  return x;
}

inline V<double> exp(V<double> x) {
  return each_lane(x, [](double v) { return std::exp(v); });
}
inline V<double> erf(V<double> x) {
  return each_lane(x, [](double v) { return std::erf(v); });
}

// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2)/2; relative error below 2e-7.
inline V<float> exp(V<float> x) {
  typedef int32_t I __attribute__((vector_size(MOE_VECTOR_BYTES)));
  const V<float> low = splat(-87.0f), high = splat(88.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const V<float> magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const V<float> biased = x * 1.44269504f + magic;
  const V<float> n = biased - magic;
  const V<float> r = (x - n * 0.693145751953125f) - n * 1.42860677e-6f;
  V<float> p = r * 1.98756915e-4f + 1.39819995e-3f;
  p = p * r + 8.33345205e-3f;
  p = p * r + 4.16657962e-2f;
  p = p * r + 1.66666657e-1f;
  p = p * r + 5.00000012e-1f;
  p = p * r * r + r + 1.0f;
  const I exponent = ((I)biased - (I)magic + 127) << 23;
  return p * (V<float>)exponent;
}

// A rational function of x^2 times x, as in Eigen's float erf; error below 4 units in the last
// place.
inline V<float> erf(V<float> x) {
  const V<float> bound = splat(4.0f);
  x = x > bound ? bound : x;
  x = x < -bound ? -bound : x;
  const V<float> s = x * x;
  V<float> p = s * -2.72614225801306e-10f + 2.77068142495902e-08f;
  p = p * s + -2.10102402082508e-06f;
  p = p * s + -5.69250639462346e-05f;
  p = p * s + -7.34990630326855e-04f;
  p = p * s + -2.95459980854025e-03f;
  p = p * s + -1.60960333262415e-02f;
  V<float> q = s * -1.45660718464996e-05f + -2.13374055278905e-04f;
  q = q * s + -1.68282697438203e-03f;
  q = q * s + -7.37332916720468e-03f;
  q = q * s + -1.42647390514189e-02f;
  return x * p / q;
}

template <class T>
inline V<T> sigmoid(V<T> x) {
  return T(1) / (T(1) + exp(-x));
}
