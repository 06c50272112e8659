// exp, erf and the sigmoid. For double the library's, lane by lane: float64 is for checking.

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
