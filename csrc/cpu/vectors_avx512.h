// Sixteen lanes, for the levels with AVX-512. Compiled once a level, like kernels_body.h and before
// it, so there is no include guard. GCC's vectors, and not intrinsics: with RESTORE_EXT_LOWERED,
// which processors without AVX-512 run, the compiler makes the same of vectors half as wide.

constexpr int kLanes = 16, kVectors = 4;
typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));
typedef uint16_t Words __attribute__((vector_size(32)));

template <typename T>
inline T words(const void* p) {
  T all;
  std::memcpy(&all, p, sizeof(T));
  return all;
}
inline float scalar(const float* p) { return *p; }
inline float scalar(const Half* p) { return _cvtsh_ss(p->bits); }
inline float scalar(const Bfloat16* p) { return std::bit_cast<float>(uint32_t{p->bits} << 16); }
inline Floats load(const float* p) { return words<Floats>(p); }
inline Floats load(const Half* p) {
#ifdef RESTORE_EXT_LOWERED
  float x[kLanes];
  for (int i = 0; i < kLanes; i += 8)
    _mm256_storeu_ps(x + i, _mm256_cvtph_ps(words<__m128i>(p + i)));
  return load(x);
#else
  return _mm512_maskz_cvtph_ps(0xffff, words<__m256i>(p));  // all, and no warning of GCC's (105593)
#endif
}
inline Floats load(const Bfloat16* p) {
  return reinterpret_cast<Floats>(__builtin_convertvector(words<Words>(p), Bits) << 16);
}
inline void store(float* p, Floats x) { std::memcpy(p, &x, sizeof(x)); }
inline Floats broadcast(float x) { return Floats{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
// One instruction: GCC contracts what stands in one expression.
inline Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }

// The two squares of `width` beside the diagonal change places.
template <int width, int... lane>
inline void exchange(Floats& upper, Floats& lower, std::integer_sequence<int, lane...>) {
  const Floats left =
      __builtin_shuffle(upper, lower, Bits{(lane & width ? kLanes + lane - width : lane)...});
  lower = __builtin_shuffle(upper, lower, Bits{(lane & width ? kLanes + lane : lane + width)...});
  upper = left;
}

template <int width>
inline void exchange_all(Floats (&x)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & width) continue;
    exchange<width>(x[i], x[i + width], std::make_integer_sequence<int, kLanes>());
  }
}

inline void transpose(Floats (&x)[kLanes]) {
  exchange_all<1>(x);
  exchange_all<2>(x);
  exchange_all<4>(x);
  exchange_all<8>(x);
}
