// Eight lanes and fused multiply-add: Intel since 2013, AMD since 2015.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <bit>

// From here on, and not before: what the headers above define may be shared with other levels.
#pragma GCC target("avx2,fma,f16c")

namespace restore_ext::cpu {
namespace {

constexpr int kLanes = 8, kVectors = 2;
typedef __m256 Floats;
typedef uint32_t Bits __attribute__((vector_size(32)));
typedef int32_t Integers __attribute__((vector_size(32)));

inline __m128i words(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline Floats load(const Half* p) { return _mm256_cvtph_ps(words(p)); }
inline Floats load(const Bfloat16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words(p)), 16));
}
inline float scalar(const float* p) { return *p; }
inline float scalar(const Half* p) { return _cvtsh_ss(p->bits); }
inline float scalar(const Bfloat16* p) { return std::bit_cast<float>(uint32_t{p->bits} << 16); }
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
inline Floats broadcast(float x) { return _mm256_set1_ps(x); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

// Squares of 1, of 2 and of 4 change places across the diagonal.
inline void transpose(Floats (&x)[kLanes]) {
  for (int i = 0; i < kLanes; i += 2) {
    const __m256 low = _mm256_unpacklo_ps(x[i], x[i + 1]);
    x[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    x[i] = low;
  }
  Floats y[kLanes];
  for (int i = 0; i < kLanes; i += 4) {
    y[i] = _mm256_shuffle_ps(x[i], x[i + 2], 0x44);
    y[i + 1] = _mm256_shuffle_ps(x[i], x[i + 2], 0xee);
    y[i + 2] = _mm256_shuffle_ps(x[i + 1], x[i + 3], 0x44);
    y[i + 3] = _mm256_shuffle_ps(x[i + 1], x[i + 3], 0xee);
  }
  for (int i = 0; i < kLanes / 2; ++i) {
    x[i] = _mm256_permute2f128_ps(y[i], y[i + 4], 0x20);
    x[i + 4] = _mm256_permute2f128_ps(y[i], y[i + 4], 0x31);
  }
}

#include "kernels_body.h"

}  // namespace

const Kernels kernels_avx2 = level("avx2");

}  // namespace restore_ext::cpu
#endif
