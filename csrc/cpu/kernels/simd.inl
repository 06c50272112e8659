// Vectors of MOE_VECTOR_BYTES. Compiled once an instruction set.

using std::int64_t;

#define MOE_INLINE inline __attribute__((always_inline))

template <class To, class From>
MOE_INLINE To bit_cast(From from) {
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// A vector that several operations use, loaded once: compilers otherwise fold the load
// into each of them, and the load ports become the limit.
#if defined(__x86_64__)
#define MOE_KEEP_IN_REGISTER(v) asm("" : "+v"(v))
#else
#define MOE_KEEP_IN_REGISTER(v) asm("" : "+w"(v))
#endif

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
