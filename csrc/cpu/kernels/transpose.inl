// Matrices turned over, a square of vectors at a time.

// v[i] lane j becomes v[j] lane i.
template <class T>
MOE_INLINE void transpose_square(V<T> (&v)[Simd<T>::lanes]) {
  constexpr int lanes = Simd<T>::lanes;
  T from[lanes][lanes], to[lanes][lanes];
  for (int i = 0; i < lanes; ++i) store(from[i], v[i]);
  for (int i = 0; i < lanes; ++i)
    for (int j = 0; j < lanes; ++j) to[j][i] = from[i][j];
  for (int i = 0; i < lanes; ++i) v[i] = load(to[i]);
}

// Pairs of rows, then pairs of pairs, are woven inside each 128 bits; whole 128 bits last.
#if MOE_VECTOR_BYTES == 64
template <>
MOE_INLINE void transpose_square<float>(V<float> (&v)[16]) {
  __m512 four[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512 a = (__m512)v[i], b = (__m512)v[i + 1], c = (__m512)v[i + 2], d = (__m512)v[i + 3];
    const __m512d ab = _mm512_castps_pd(_mm512_unpacklo_ps(a, b)),
                  ab_high = _mm512_castps_pd(_mm512_unpackhi_ps(a, b)),
                  cd = _mm512_castps_pd(_mm512_unpacklo_ps(c, d)),
                  cd_high = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
    four[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
    four[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
    four[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab_high, cd_high));
    four[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab_high, cd_high));
  }
  for (int j = 0; j < 4; ++j) {  // four[4g + j] holds rows 4g.. of columns j, 4 + j, 8 + j, 12 + j
    const __m512 even = _mm512_shuffle_f32x4(four[j], four[4 + j], 0x88),
                 even_high = _mm512_shuffle_f32x4(four[8 + j], four[12 + j], 0x88),
                 odd = _mm512_shuffle_f32x4(four[j], four[4 + j], 0xDD),
                 odd_high = _mm512_shuffle_f32x4(four[8 + j], four[12 + j], 0xDD);
    v[j] = (V<float>)_mm512_shuffle_f32x4(even, even_high, 0x88);
    v[4 + j] = (V<float>)_mm512_shuffle_f32x4(odd, odd_high, 0x88);
    v[8 + j] = (V<float>)_mm512_shuffle_f32x4(even, even_high, 0xDD);
    v[12 + j] = (V<float>)_mm512_shuffle_f32x4(odd, odd_high, 0xDD);
  }
}
template <>
MOE_INLINE void transpose_square<bf16_pair>(V<bf16_pair> (&v)[16]) {
  V<float> bits[16];
  for (int i = 0; i < 16; ++i) bits[i] = (V<float>)v[i];
  transpose_square<float>(bits);
  for (int i = 0; i < 16; ++i) v[i] = (V<bf16_pair>)bits[i];
}
#elif MOE_VECTOR_BYTES == 32
template <>
MOE_INLINE void transpose_square<float>(V<float> (&v)[8]) {
  __m256 four[8];
  for (int i = 0; i < 8; i += 4) {
    const __m256 a = (__m256)v[i], b = (__m256)v[i + 1], c = (__m256)v[i + 2], d = (__m256)v[i + 3];
    const __m256d ab = _mm256_castps_pd(_mm256_unpacklo_ps(a, b)),
                  ab_high = _mm256_castps_pd(_mm256_unpackhi_ps(a, b)),
                  cd = _mm256_castps_pd(_mm256_unpacklo_ps(c, d)),
                  cd_high = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
    four[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd));
    four[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd));
    four[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab_high, cd_high));
    four[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(ab_high, cd_high));
  }
  for (int j = 0; j < 4; ++j) {
    v[j] = (V<float>)_mm256_permute2f128_ps(four[j], four[4 + j], 0x20);
    v[4 + j] = (V<float>)_mm256_permute2f128_ps(four[j], four[4 + j], 0x31);
  }
}
#endif
