// exp, erf and the sigmoid. For double the library's: float64 is for checking.

// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2)/2, of a float or of a vector of them whose
// bits are I; relative error below 2e-7 where 2^n is a normal number. ln 2 comes in two parts;
// n times the first is exact.
template <class I, class F>
MOE_INLINE F exp_of_normal(F x, float ln2, float ln2_rest) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const F biased = x * 1.44269504f + magic;
  const F n = biased - magic;
  const F r = (x - n * ln2) - n * ln2_rest;
  F p = r * 1.98756915e-4f + 1.39819995e-3f;
  p = p * r + 8.33345205e-3f;
  p = p * r + 4.16657962e-2f;
  p = p * r + 1.66666657e-1f;
  p = p * r + 5.00000012e-1f;
  p = p * r * r + r + 1.0f;
  return p * bit_cast<F>((bit_cast<I>(biased) << 23) + 0x3f800000u);
}

// ---- on vectors, of any x

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

inline V<float> exp(V<float> x) {
  typedef uint32_t I __attribute__((vector_size(MOE_VECTOR_BYTES)));
  const V<float> low = splat(-87.0f), high = splat(88.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  return exp_of_normal<I>(x, 0.693145751953125f, 1.42860677e-6f);
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

// ---- on numbers, in loops that the compiler makes vector code of: for scores, which may be far
//      below one another, and whose last bits decide between experts

// exp(x) for x <= 0, within 1 ulp; 0 below the normal numbers; NaN stays NaN.
MOE_INLINE float exp_nonpositive(float x) {
  // A mask, not a branch around the product: without AVX-512 that would keep loops scalar.
  const uint32_t keep = x < -87.0f ? 0u : ~0u;
  const float y = exp_of_normal<uint32_t>(x, 0.693359375f, -2.12194440e-4f);
  return bit_cast<float>(bit_cast<uint32_t>(y) & keep);
}
MOE_INLINE double exp_nonpositive(double x) { return std::exp(x); }

// Without an exp that could overflow.
template <class A>
MOE_INLINE A sigmoid_of_score(A x) {
  const A e = exp_nonpositive(x < A(0) ? x : -x);
  return (x < A(0) ? e : A(1)) / (A(1) + e);
}
