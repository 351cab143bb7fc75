// Every device function the emulator knows, on given operands: the exact results must be the same
// bits whether the C++ or nvcc's PTX was run, the approximate ones nearly.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "selftest.h"

namespace restore_ext::cuda {
namespace {

struct Operands {
  float f, g, h;
  double d, e;
  unsigned u, v, w;
  int i, j, k;
  unsigned long long q, r;
  long long s, t;
};

__device__ uint64_t bits(float x) { return __float_as_uint(x); }
__device__ uint64_t bits(double x) { return __double_as_longlong(x); }
__device__ uint64_t bits(int x) { return static_cast<unsigned>(x); }
__device__ uint64_t bits(unsigned x) { return x; }
__device__ uint64_t bits(bool x) { return x; }
__device__ uint64_t bits(long long x) { return x; }
__device__ uint64_t bits(unsigned long long x) { return x; }
__device__ uint64_t bits(__half x) { return __half_as_ushort(x); }
__device__ uint64_t bits(__nv_bfloat16 x) { return __bfloat16_as_ushort(x); }
__device__ uint64_t bits(__half2 x) { return bits(__low2half(x)) << 16 | bits(__high2half(x)); }
__device__ uint64_t bits(__nv_bfloat162 x) {
  return bits(__low2bfloat16(x)) << 16 | bits(__high2bfloat16(x));
}
__device__ uint64_t bits(float2 x) { return bits(x.x) << 32 | bits(x.y); }

__global__ void exact_kernel(const Operands* operands, uint64_t* out, int slots) {
  const Operands o = operands[threadIdx.x];
  uint64_t* to = out + threadIdx.x * slots;
  int at = 0;
#define SAY(x) to[at++] = bits(x)
  SAY(__fmaf_rn(o.f, o.g, o.h)), SAY(__fadd_rn(__fmul_rn(o.f, o.g), o.h)), SAY(__fsub_rn(o.f, o.g));
  SAY(__fdiv_rn(o.f, o.g)), SAY(__fsqrt_rn(fabsf(o.f))), SAY(__frcp_rn(o.f)), SAY(o.f / o.g);
  SAY(fminf(o.f, o.g)), SAY(fmaxf(o.f, o.g)), SAY(min(o.f, o.g)), SAY(fabsf(o.f)), SAY(-o.f);
  SAY(truncf(o.f)), SAY(floorf(o.f)), SAY(ceilf(o.f)), SAY(rintf(o.f)), SAY(copysignf(o.f, o.g));
  SAY(__saturatef(o.f)), SAY(o.f < o.g), SAY(o.f >= o.g), SAY(o.f != o.g), SAY(isnan(o.f));
  SAY(__dadd_rn(o.d, o.e)), SAY(__dmul_rn(o.d, o.e)), SAY(__fma_rn(o.d, o.e, o.d));
  SAY(__ddiv_rn(o.d, o.e)), SAY(sqrt(fabs(o.d))), SAY(__dsub_rn(o.d, o.e)), SAY(fmax(o.d, o.e));
  SAY(__double2float_rn(o.d)), SAY(static_cast<double>(o.f)), SAY(o.d < o.e);
  SAY(__float2int_rn(o.f)), SAY(__float2int_rz(o.f)), SAY(__float2int_rd(o.f));
  SAY(__float2int_ru(o.f)), SAY(__float2uint_rn(o.f)), SAY(__float2ll_rn(o.f));
  SAY(__int2float_rn(o.i)), SAY(__uint2float_rn(o.u)), SAY(__ll2float_rn(o.s));
  SAY(__ull2float_rn(o.q)), SAY(__int2double_rn(o.i)), SAY(__ll2double_rn(o.s));
  SAY(__double2int_rn(o.d)), SAY(__double2ll_rn(o.d)), SAY(static_cast<int>(o.f));
  SAY(static_cast<long long>(o.f)), SAY(static_cast<int>(static_cast<short>(o.i)));
  SAY(static_cast<int>(static_cast<signed char>(o.i))), SAY(static_cast<unsigned>(o.q));
  SAY(static_cast<long long>(o.i)), SAY(static_cast<unsigned long long>(o.u));
  SAY(o.u + o.v), SAY(o.i - o.j), SAY(o.i * o.j), SAY(o.s * o.t), SAY(o.q * o.r + o.q);
  SAY(o.i / o.j), SAY(o.i % o.j), SAY(o.u / o.v), SAY(o.u % o.v), SAY(o.s / o.t), SAY(o.q % o.r);
  SAY(static_cast<long long>(o.i) * o.j), SAY(static_cast<unsigned long long>(o.u) * o.v + o.q);
  SAY(__mulhi(o.i, o.j)), SAY(__umulhi(o.u, o.v)), SAY(__umul64hi(o.q, o.r));
  SAY(__mul64hi(o.s, o.t)), SAY(min(o.i, o.j)), SAY(max(o.u, o.v)), SAY(max(o.s, o.t));
  SAY(min(o.q, o.r)), SAY(abs(o.i)), SAY(llabs(o.s)), SAY(__sad(o.i, o.j, o.u));
  SAY(__usad(o.u, o.v, o.w)), SAY(__dp4a(o.i, o.j, o.k)), SAY(__dp4a(o.u, o.v, o.w));
  SAY((o.u & o.v) | (~o.u & o.w)), SAY((o.u ^ o.v) ^ o.w), SAY(o.q & ~o.r), SAY(o.q | o.r);
  SAY(o.u << (o.v & 31)), SAY(o.u >> (o.v & 31)), SAY(o.i >> (o.v & 31)), SAY(o.q << (o.v & 63));
  SAY(o.s >> (o.v & 63)), SAY(o.q >> 32 | o.q << 32), SAY(__popc(o.u)), SAY(__popcll(o.q));
  SAY(__clz(o.i)), SAY(__clzll(o.s)), SAY(__clz(0)), SAY(__ffs(o.i)), SAY(__ffsll(o.s));
  SAY(__brev(o.u)), SAY(__brevll(o.q)), SAY(__byte_perm(o.u, o.v, o.w));
  SAY(__funnelshift_l(o.u, o.v, o.w)), SAY(__funnelshift_r(o.u, o.v, o.w));
  SAY(__funnelshift_lc(o.u, o.v, o.w & 63)), SAY(__funnelshift_rc(o.u, o.v, o.w & 63));
  SAY(__hiloint2double(o.i, o.j)), SAY(__double2hiint(o.d)), SAY(__double2loint(o.d));
  SAY(o.u >> 5 & 0x3ff), SAY(o.i << 7 >> 20), SAY((o.i > 0 ? o.f : o.g)),
      SAY(o.i < o.j && o.u > o.v);
  const __half a = __float2half_rn(o.f), b = __float2half_rn(o.g), c = __float2half_rn(o.h);
  SAY(a), SAY(__half2float(a)), SAY(__hadd(a, b)), SAY(__hmul(a, b)), SAY(__hsub(a, b));
  SAY(__hfma(a, b, c)), SAY(__hmax(a, b)), SAY(__hmin(a, b)), SAY(__hneg(a)), SAY(__hlt(a, b));
  SAY(__half2int_rn(a)), SAY(__int2half_rn(o.i >> 16)), SAY(__double2half(o.d));
  const __half2 ab = __floats2half2_rn(o.f, o.g), cb = __halves2half2(c, b);
  SAY(ab), SAY(__hadd2(ab, cb)), SAY(__hmul2(ab, cb)), SAY(__hsub2(ab, cb)), SAY(__low2float(ab));
  SAY(__hfma2(ab, cb, ab)), SAY(__hmax2(ab, cb)), SAY(__hmin2(ab, cb)), SAY(__habs2(ab));
  SAY(__half22float2(ab)), SAY(__high2float(ab)), SAY(__float2half2_rn(o.h)), SAY(__hneg2(ab));
  const __nv_bfloat16 x = __float2bfloat16_rn(o.f), y = __float2bfloat16_rn(o.g);
  const __nv_bfloat16 z = __float2bfloat16_rn(o.h);
  SAY(x), SAY(__bfloat162float(x)), SAY(__hadd(x, y)), SAY(__hmul(x, y)), SAY(__hsub(x, y));
  SAY(__hfma(x, y, z)), SAY(__hmax(x, y)), SAY(__hmin(x, y)), SAY(__hneg(x)), SAY(__hgt(x, y));
  const __nv_bfloat162 xy = __floats2bfloat162_rn(o.f, o.g), zy = __halves2bfloat162(z, y);
  SAY(xy), SAY(__hadd2(xy, zy)), SAY(__hmul2(xy, zy)), SAY(__hsub2(xy, zy)), SAY(__low2float(xy));
  SAY(__hfma2(xy, zy, xy)), SAY(__hmax2(xy, zy)), SAY(__hmin2(xy, zy)), SAY(__habs2(xy));
  SAY(__bfloat1622float2(xy)), SAY(__high2float(xy)), SAY(__float2bfloat162_rn(o.h));
#undef SAY
  to[slots - 1] = at;
}

__global__ void approximate_kernel(const Operands* operands, double* out, int slots) {
  const Operands o = operands[threadIdx.x];
  const float p = fabsf(o.f);
  double* to = out + threadIdx.x * slots;
  int at = 0;
#define SAY(x) to[at++] = static_cast<double>(x)
  SAY(expf(o.f)), SAY(exp2f(o.f)), SAY(__expf(o.f)), SAY(logf(p)), SAY(log2f(p)), SAY(__logf(p));
  SAY(__log2f(p)), SAY(rsqrtf(p)), SAY(sqrtf(p)), SAY(__fdividef(o.f, o.g)), SAY(tanhf(o.f));
  SAY(sinf(o.f)), SAY(cosf(o.f)), SAY(__powf(p, .5f)), SAY(log1pf(p)), SAY(expm1f(o.f));
  SAY(erff(o.f)), SAY(rsqrt(fabs(o.d))), SAY(exp(o.d)), SAY(__frsqrt_rn(p)), SAY(1.f / o.f);
#undef SAY
  to[slots - 1] = at;
}

}  // namespace

extern "C" SELFTEST_EXPORT int selftest_functions(const void* operands, int count, uint64_t* exact,
                                                  double* approximate, int slots) {
  const auto* o = static_cast<const Operands*>(operands);
  const cudaError_t error = launch(exact_kernel, dim3(1), dim3(count), 0, nullptr, o, exact, slots);
  if (error != cudaSuccess) return error;
  return launch(approximate_kernel, dim3(1), dim3(count), 0, nullptr, o, approximate, slots);
}

}  // namespace restore_ext::cuda
