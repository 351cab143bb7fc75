// Device functions of CUDA C++ that g++'s headers and the toolkit's host paths do not have: bits,
// conversions, roundings, 16-bit floats. Included by cuemu.h.
#pragma once
#include <math.h>

using std::isfinite, std::isinf, std::isnan, std::signbit;

// ---- bits --------------------------------------------------------------------------------------

template <class D, class S>
inline D cuemu_bits(S s) {
  static_assert(sizeof(D) == sizeof(S));
  D d;
  memcpy(&d, &s, sizeof d);
  return d;
}
inline unsigned __float_as_uint(float x) { return cuemu_bits<unsigned>(x); }
inline int __float_as_int(float x) { return cuemu_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return cuemu_bits<float>(x); }
inline float __int_as_float(int x) { return cuemu_bits<float>(x); }
inline long long __double_as_longlong(double x) { return cuemu_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return cuemu_bits<double>(x); }
inline int __double2loint(double x) { return static_cast<int>(__double_as_longlong(x)); }
inline int __double2hiint(double x) { return static_cast<int>(__double_as_longlong(x) >> 32); }
inline double __hiloint2double(int high, int low) {
  return __longlong_as_double(
      static_cast<long long>(static_cast<uint64_t>(high) << 32 | unsigned(low)));
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline unsigned long long __brevll(unsigned long long x) {
  unsigned long long result = 0;
  for (int i = 0; i < 64; i++) result |= (x >> i & 1) << (63 - i);
  return result;
}
inline unsigned __brev(unsigned x) { return static_cast<unsigned>(__brevll(x) >> 32); }
inline unsigned cuemu_permute(unsigned a, unsigned b, unsigned selector) {  // prmt
  const uint64_t bytes = uint64_t{b} << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned pick = selector >> 4 * i & 15, byte = bytes >> 8 * (pick & 7) & 255;
    const unsigned sign = byte & 128 ? 255u : 0u;
    result |= (pick & 8 ? sign : byte) << 8 * i;
  }
  return result;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  return cuemu_permute(a, b, selector & 0x7777);
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned n) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) << (n & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned n) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (n & 31));
}
inline unsigned __funnelshift_lc(unsigned low, unsigned high, unsigned n) {
  return n >= 32 ? low : __funnelshift_l(low, high, n);
}
inline unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned n) {
  return n >= 32 ? high : __funnelshift_r(low, high, n);
}

// ---- whole numbers -----------------------------------------------------------------------------

inline int __mulhi(int x, int y) { return static_cast<int>(int64_t{x} * y >> 32); }
inline unsigned __umulhi(unsigned x, unsigned y) { return uint64_t{x} * y >> 32; }
inline long long __mul64hi(long long x, long long y) { return static_cast<__int128>(x) * y >> 64; }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
  return static_cast<unsigned __int128>(x) * y >> 64;
}
inline unsigned __sad(int x, int y, unsigned z) {
  return z + (x < y ? unsigned(y) - unsigned(x) : unsigned(x) - unsigned(y));
}
inline unsigned __usad(unsigned x, unsigned y, unsigned z) { return z + (x < y ? y - x : x - y); }
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 32; i += 8) c += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
  return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 32; i += 8) c += (a >> i & 255) * (b >> i & 255);
  return c;
}

#define CUEMU_MINMAX(T)                            \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
CUEMU_MINMAX(int)
CUEMU_MINMAX(unsigned)
CUEMU_MINMAX(long)
CUEMU_MINMAX(long long)
CUEMU_MINMAX(unsigned long)
CUEMU_MINMAX(unsigned long long)
#undef CUEMU_MINMAX
inline unsigned min(int a, unsigned b) { return min(static_cast<unsigned>(a), b); }
inline unsigned min(unsigned a, int b) { return min(a, static_cast<unsigned>(b)); }
inline unsigned max(int a, unsigned b) { return max(static_cast<unsigned>(a), b); }
inline unsigned max(unsigned a, int b) { return max(a, static_cast<unsigned>(b)); }
inline unsigned umin(unsigned a, unsigned b) { return min(a, b); }
inline unsigned umax(unsigned a, unsigned b) { return max(a, b); }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

// ---- floats ------------------------------------------------------------------------------------

// nvcc never fuses a named operation with the next; g++ would, but for the empty statement.
#define CUEMU_ROUNDED(T, name, expression) \
  inline T name##_rn(T x, T y) {           \
    T result = expression;                 \
    asm volatile("" : "+x"(result));       \
    return result;                         \
  }
CUEMU_ROUNDED(float, __fadd, x + y)
CUEMU_ROUNDED(float, __fsub, x - y)
CUEMU_ROUNDED(float, __fmul, x* y)
CUEMU_ROUNDED(float, __fdiv, x / y)
CUEMU_ROUNDED(double, __dadd, x + y)
CUEMU_ROUNDED(double, __dsub, x - y)
CUEMU_ROUNDED(double, __dmul, x* y)
CUEMU_ROUNDED(double, __ddiv, x / y)
#undef CUEMU_ROUNDED
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline double __fma_rn(double x, double y, double z) { return fma(x, y, z); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline double __dsqrt_rn(double x) { return sqrt(x); }
inline float __frcp_rn(float x) { return 1.f / x; }
inline double __drcp_rn(double x) { return 1. / x; }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline double rsqrt(double x) { return 1. / sqrt(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1. / sqrt(double{x})); }
inline float rcbrtf(float x) { return 1.f / cbrtf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float fdividef(float x, float y) { return x / y; }
inline float __saturatef(float x) { return x > 0 ? fminf(x, 1.f) : 0.f; }
inline float sinpif(float x) { return static_cast<float>(sin(M_PI * x)); }
inline float cospif(float x) { return static_cast<float>(cos(M_PI * x)); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __expf(float x) { return exp2f(x * 1.44269504f); }
#define __exp10f(x) exp10f(x)
#define __exp2f(x) exp2f(x)
#define __logf(x) logf(x)
#define __log10f(x) log10f(x)
#define __log2f(x) log2f(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanf(x) tanf(x)

template <class To, class From>
inline To cuemu_to_whole(From x) {  // stops at the ends, as the device does; NaN becomes 0
  if (x != x) return 0;
  if (x >= std::ldexp(From(1), std::numeric_limits<To>::digits))
    return std::numeric_limits<To>::max();
  if (x <= From(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
  return static_cast<To>(x);
}
#define CUEMU_TO_WHOLE(From, from, To, to)                                             \
  inline To __##from##2##to##_rn(From x) { return cuemu_to_whole<To>(std::rint(x)); }  \
  inline To __##from##2##to##_rz(From x) { return cuemu_to_whole<To>(std::trunc(x)); } \
  inline To __##from##2##to##_rd(From x) { return cuemu_to_whole<To>(std::floor(x)); } \
  inline To __##from##2##to##_ru(From x) { return cuemu_to_whole<To>(std::ceil(x)); }
CUEMU_TO_WHOLE(float, float, int, int)
CUEMU_TO_WHOLE(float, float, unsigned, uint)
CUEMU_TO_WHOLE(float, float, long long, ll)
CUEMU_TO_WHOLE(float, float, unsigned long long, ull)
CUEMU_TO_WHOLE(double, double, int, int)
CUEMU_TO_WHOLE(double, double, unsigned, uint)
CUEMU_TO_WHOLE(double, double, long long, ll)
CUEMU_TO_WHOLE(double, double, unsigned long long, ull)
#undef CUEMU_TO_WHOLE
inline float __double2float_rn(double x) { return static_cast<float>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }
inline float __ull2float_rn(unsigned long long x) { return static_cast<float>(x); }
inline double __int2double_rn(int x) { return x; }
inline double __uint2double_rn(unsigned x) { return x; }
inline double __ll2double_rn(long long x) { return static_cast<double>(x); }
inline double __ull2double_rn(unsigned long long x) { return static_cast<double>(x); }

// ---- 16-bit floats: what the toolkit's headers leave out for a host compiler
// ----------------------

inline __half __hfma(__half x, __half y, __half z) {
  return __double2half(fma(double{__half2float(x)}, __half2float(y), __half2float(z)));
}
inline __nv_bfloat16 __hfma(__nv_bfloat16 x, __nv_bfloat16 y, __nv_bfloat16 z) {
  return __double2bfloat16(
      fma(double{__bfloat162float(x)}, __bfloat162float(y), __bfloat162float(z)));
}
inline __half2 __hfma2(__half2 x, __half2 y, __half2 z) {
  return __halves2half2(__hfma(x.x, y.x, z.x), __hfma(x.y, y.y, z.y));
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 x, __nv_bfloat162 y, __nv_bfloat162 z) {
  return __halves2bfloat162(__hfma(x.x, y.x, z.x), __hfma(x.y, y.y, z.y));
}
inline int __half2int_rn(__half x) { return __float2int_rn(__half2float(x)); }
inline int __bfloat162int_rn(__nv_bfloat16 x) { return __float2int_rn(__bfloat162float(x)); }
#define CUEMU_HALF(name, function)                                                          \
  inline __half h##name(__half x) { return __float2half_rn(function(__half2float(x))); }    \
  inline __nv_bfloat16 h##name(__nv_bfloat16 x) {                                           \
    return __float2bfloat16_rn(function(__bfloat162float(x)));                              \
  }                                                                                         \
  inline __half2 h2##name(__half2 x) { return __halves2half2(h##name(x.x), h##name(x.y)); } \
  inline __nv_bfloat162 h2##name(__nv_bfloat162 x) {                                        \
    return __halves2bfloat162(h##name(x.x), h##name(x.y));                                  \
  }
CUEMU_HALF(exp, expf)
CUEMU_HALF(exp2, exp2f)
CUEMU_HALF(log, logf)
CUEMU_HALF(log2, log2f)
CUEMU_HALF(sqrt, sqrtf)
CUEMU_HALF(rsqrt, rsqrtf)
CUEMU_HALF(rcp, __frcp_rn)
CUEMU_HALF(sin, sinf)
CUEMU_HALF(cos, cosf)
#undef CUEMU_HALF
