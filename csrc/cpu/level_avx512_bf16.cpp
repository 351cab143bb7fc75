// The same with products of bfloat16: Intel's Cooper Lake and its servers since 2023, AMD since
// 2022. What is not a product of pairs is the level below, compiled once more.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <bit>
#include <cstring>
#include <utility>

// From here on, and not before: what the headers above define may be shared with other levels.
#ifdef RESTORE_EXT_LOWERED
#pragma GCC target("avx2,fma,f16c")
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#endif

namespace restore_ext::cpu {
namespace {

#include "vectors_avx512.h"

struct Pairs {
  Bits bits;
};
inline Pairs load(const Pair* p) { return {words<Bits>(p)}; }
inline Pairs broadcast(Pair x) { return {Bits{} + std::bit_cast<uint32_t>(x)}; }

// Two instructions, and for a processor without them what they do bit for bit (Intel's manual: they
// take denormals for zeros and give none, round to nearest, and neither read nor write MXCSR).
#ifdef RESTORE_EXT_LOWERED
inline Floats fma(Pairs a, Pairs b, Floats c) {
  const unsigned given = _mm_getcsr(), own = 0x9fc0;  // flush to zero, denormals are zeros
  __m256 sum[2];
  __m256i x[2], y[2];
  std::memcpy(sum, &c, sizeof(c));
  std::memcpy(x, &a, sizeof(a));
  std::memcpy(y, &b, sizeof(b));
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  for (int i = 0; i < 2; ++i) {
    // In one piece: the compiler does not know that the products depend on MXCSR.
    asm("vldmxcsr %[own]\n\t"
        "vfmadd231ps %[x_odd], %[y_odd], %[sum]\n\t"
        "vfmadd231ps %[x_even], %[y_even], %[sum]\n\t"
        "vldmxcsr %[given]"
        : [sum] "+&x"(sum[i])
        : [x_odd] "x"(_mm256_and_si256(x[i], upper)), [y_odd] "x"(_mm256_and_si256(y[i], upper)),
          [x_even] "x"(_mm256_slli_epi32(x[i], 16)), [y_even] "x"(_mm256_slli_epi32(y[i], 16)),
          [own] "m"(own), [given] "m"(given));
  }
  std::memcpy(&c, sum, sizeof(c));
  return c;
}
inline Words narrow(Floats x) {
  const Bits bits = reinterpret_cast<Bits>(x), exponent = bits & 0x7f800000u;
  const Bits nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Bits finite = exponent == 0u ? bits >> 16 & 0x8000u : nearest;
  return __builtin_convertvector(x == x ? finite : bits >> 16 | 0x40u, Words);
}
#else
inline Floats fma(Pairs a, Pairs b, Floats c) {
  return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a.bits),
                          reinterpret_cast<__m512bh>(b.bits));
}
inline Words narrow(Floats x) { return reinterpret_cast<Words>(_mm512_cvtneps_pbh(x)); }
#endif

// Writes a vector as pairs of neighbours, and returns what became of it.
inline Floats round_vector(Floats x, Pair* to) {
  const Words rounded = narrow(x);
  std::memcpy(to, &rounded, sizeof(rounded));
  return reinterpret_cast<Floats>(__builtin_convertvector(rounded, Bits) << 16);
}

#include "kernels_body.h"

void round(const float* from, int64_t count, Pair* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) round_vector(load(from + i), to + i / 2);
  float rest[kLanes] = {};
  Pair pairs[kLanes / 2];
  std::copy(from + i, from + count, rest);
  round_vector(load(rest), pairs);
  std::copy_n(pairs, (count - i) / 2, to + i / 2);
}

void interleave(const float* even, const float* odd, int64_t count, Pair* to) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Bits low = __builtin_convertvector(narrow(load(even + i)), Bits);
    const Bits both = low | __builtin_convertvector(narrow(load(odd + i)), Bits) << 16;
    std::memcpy(to + i, &both, sizeof(both));
  }
}

constexpr PairKernels kPairs = {.interleave = interleave, .round = round, .attend = attend<Pair>};

}  // namespace

const Kernels kernels_avx512_bf16 = level("avx512_bf16", &kPairs);

}  // namespace restore_ext::cpu
#endif
