// CUDA C++ for g++: what nvcc has built in, on fibers of the CPU, one for every CUDA thread of a
// block. Found before the toolkit's <cuda_runtime.h>; needs its plain headers, no nvcc and no GPU.
#pragma once
#define CUEMU 1
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>      // cudaError_t, cudaStream_t, cudaLaunchConfig_t, cudaFuncAttribute
#include <vector_functions.h>  // make_float4, ...
#include <vector_types.h>      // dim3, float4, ...
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <tuple>
#include <type_traits>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
// gcc ignores the section of a static in a template (clang honours it): there the object is shared
// but not poisoned.
#define __shared__ static __attribute__((section("cuemu_shared")))
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#undef __cluster_dims__
#undef __maxnreg__
#define __cluster_dims__(...)
#define __maxnreg__(...)
#define __builtin_assume(x) ((void)0)
#define CUEMU_NOSAN __attribute__((no_sanitize("thread")))
// So that the checker's report names the kernel's own line.
#define CUEMU_INL __attribute__((always_inline)) inline
#define CUEMU_LOC const char *file_ = __builtin_FILE(), int line_ = __builtin_LINE()

// Plain variables, threadIdx set at every switch: macros would clash with cudaLaunchConfig_t.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace cuemu {
using CollFn = void (*)(void** args, unsigned mask);
struct Thread {
  uint3 tid;
  int lin, lane, warp;
  void* sp;
  int st;  // 0 runnable, 1 in a warp collective, 2 at a barrier, 3 polling, 4 done
  unsigned mask;
  CollFn fn;
  void* arg;
  int bar;
  const char *what, *file;
  int line;
};
extern Thread* self;
extern int quiet;  // > 0: emulator code runs, the checker ignores its own loads and stores
struct Quiet {
  CUEMU_NOSAN __attribute__((noinline)) Quiet() { quiet++; }
  CUEMU_NOSAN __attribute__((noinline)) ~Quiet() { quiet--; }
};  // never across a fiber switch
void coll(unsigned mask, CollFn fn, void* arg, const char* what, const char* file, int line);
void bar_sync(int id, int expected, bool wait, const char* what, const char* file, int line);
void poll_yield(const char* what, const char* file, int line);  // inside spin loops
[[noreturn]] void fail(const char* fmt, ...);
unsigned char* dyn_smem();
size_t dyn_smem_size();
void* shared_slot(const void* key, size_t bytes, size_t align);
int launch(const void* key, dim3 grid, dim3 block, size_t smem, const std::function<void()>& body);
int set_smem_limit(const void* key, int bytes);
int* bar_red();  // __syncthreads_or/and/count: accumulator, result of the last barrier
void cp_async(void* dst, const void* src, int bytes, int valid);
void cp_commit();
void cp_wait(int n);
// hooks of the checker (weak: absent in the plain build)
void hook_syncwarp(unsigned mask) __attribute__((weak));
void hook_fence() __attribute__((weak));
void hook_access(const void* p, size_t n, bool write, bool atomic, const void* pc)
    __attribute__((weak));
__attribute__((always_inline)) inline const void* pc() {
  const void* p;
  asm volatile("lea 0(%%rip), %0" : "=r"(p));
  return p;
}
}  // namespace cuemu

#include "cuemu_math.h"

constexpr int warpSize = 32;

// ---- barriers -----------------------------------------------------------------------------------
CUEMU_NOSAN inline void __syncthreads(CUEMU_LOC) {
  cuemu::bar_sync(0, 0, true, "__syncthreads", file_, line_);
}
CUEMU_NOSAN inline int cuemu_sync_red(int v, const char* f, int l) {
  cuemu::bar_red()[0] += v;
  cuemu::bar_sync(0, 0, true, "__syncthreads_red", f, l);
  return cuemu::bar_red()[1];
}
CUEMU_NOSAN inline int __syncthreads_or(int p, CUEMU_LOC) {
  return cuemu_sync_red(p != 0, file_, line_) != 0;
}
CUEMU_NOSAN inline int __syncthreads_count(int p, CUEMU_LOC) {
  return cuemu_sync_red(p != 0, file_, line_);
}
CUEMU_NOSAN inline int __syncthreads_and(int p, CUEMU_LOC) {
  return cuemu_sync_red(p == 0, file_, line_) == 0;
}
CUEMU_NOSAN inline void __syncwarp(unsigned m = 0xffffffffu, CUEMU_LOC) {
  cuemu::coll(
      m,
      [](void**, unsigned mm) {
        if (cuemu::hook_syncwarp) cuemu::hook_syncwarp(mm);
      },
      nullptr, "__syncwarp", file_, line_);
}
CUEMU_NOSAN inline void __threadfence() {
  if (cuemu::hook_fence) cuemu::hook_fence();
}
CUEMU_NOSAN inline void __threadfence_system() { __threadfence(); }
inline void __threadfence_block() {}
inline void cudaGridDependencySynchronize() {}
inline void cudaTriggerProgrammaticLaunchCompletion() {}
inline void __nanosleep(unsigned, CUEMU_LOC) { cuemu::poll_yield("__nanosleep", file_, line_); }
inline long long clock64() {
  static long long c;
  return c += 16;
}

// ---- warp collectives ---------------------------------------------------------------------------
namespace cuemu {
template <class T>
struct ShflArg {
  T in, out;
  int src;
};
template <class T>
CUEMU_NOSAN inline T shfl(unsigned mask, T v, int src, const char* f, int l) {
  ShflArg<T> a{v, v, src};
  coll(
      mask,
      [](void** p, unsigned m) {
        for (int i = 0; i < 32; i++)
          if (m >> i & 1) {
            auto& x = *(ShflArg<T>*)p[i];
            if (m >> x.src & 1)
              x.out = ((ShflArg<T>*)p[x.src])->in;
            else
              memset((void*)&x.out, 0xff, sizeof(T));  // undefined: poison
          }
      },
      &a, "__shfl_sync", f, l);
  return a.out;
}
inline int seg(int lane, int w) { return lane & ~(w - 1); }
}  // namespace cuemu
template <class T>
CUEMU_NOSAN inline T __shfl_sync(unsigned m, T v, int s, int w = 32, CUEMU_LOC) {
  int l = cuemu::self->lane;
  return cuemu::shfl(m, v, cuemu::seg(l, w) | (s & (w - 1)), file_, line_);
}
template <class T>
CUEMU_NOSAN inline T __shfl_xor_sync(unsigned m, T v, int x, int w = 32, CUEMU_LOC) {
  int l = cuemu::self->lane, s = l ^ x;
  return cuemu::shfl(m, v, s >= cuemu::seg(l, w) + w ? l : s, file_, line_);
}
template <class T>
CUEMU_NOSAN inline T __shfl_up_sync(unsigned m, T v, unsigned d, int w = 32, CUEMU_LOC) {
  int l = cuemu::self->lane, s = l - (int)d;
  return cuemu::shfl(m, v, s < cuemu::seg(l, w) ? l : s, file_, line_);
}
template <class T>
CUEMU_NOSAN inline T __shfl_down_sync(unsigned m, T v, unsigned d, int w = 32, CUEMU_LOC) {
  int l = cuemu::self->lane, s = l + (int)d;
  return cuemu::shfl(m, v, s >= cuemu::seg(l, w) + w ? l : s, file_, line_);
}

#define CUEMU_REDUCE(name, T, init, expr)                 \
  CUEMU_NOSAN inline T name(unsigned m, T v, CUEMU_LOC) { \
    cuemu::coll(                                          \
        m,                                                \
        [](void** p, unsigned mm) {                       \
          T r = init;                                     \
          (void)r;                                        \
          for (int i = 0; i < 32; i++)                    \
            if (mm >> i & 1) {                            \
              T x = *(T*)p[i];                            \
              r = expr;                                   \
            }                                             \
          for (int i = 0; i < 32; i++)                    \
            if (mm >> i & 1) *(T*)p[i] = r;               \
        },                                                \
        &v, #name, file_, line_);                         \
    return v;                                             \
  }
CUEMU_REDUCE(__reduce_add_sync, unsigned, 0u, r + x)
CUEMU_REDUCE(__reduce_add_sync, int, 0, r + x)
CUEMU_REDUCE(__reduce_min_sync, unsigned, ~0u, (x < r ? x : r))
CUEMU_REDUCE(__reduce_min_sync, int, INT32_MAX, (x < r ? x : r))
CUEMU_REDUCE(__reduce_max_sync, unsigned, 0u, (x > r ? x : r))
CUEMU_REDUCE(__reduce_max_sync, int, INT32_MIN, (x > r ? x : r))
CUEMU_REDUCE(__reduce_and_sync, unsigned, ~0u, r& x)
CUEMU_REDUCE(__reduce_or_sync, unsigned, 0u, r | x)
CUEMU_REDUCE(__reduce_xor_sync, unsigned, 0u, r ^ x)
#undef CUEMU_REDUCE
CUEMU_NOSAN inline unsigned __ballot_sync(unsigned m, int pred, CUEMU_LOC) {
  unsigned v = pred != 0;
  cuemu::coll(
      m,
      [](void** p, unsigned mm) {
        unsigned r = 0;
        for (int i = 0; i < 32; i++)
          if (mm >> i & 1) r |= *(unsigned*)p[i] << i;
        for (int i = 0; i < 32; i++)
          if (mm >> i & 1) *(unsigned*)p[i] = r;
      },
      &v, "__ballot_sync", file_, line_);
  return v;
}
inline int __any_sync(unsigned m, int p, CUEMU_LOC) {
  return __ballot_sync(m, p, file_, line_) != 0;
}
inline int __uni_sync(unsigned m, int p, CUEMU_LOC) {
  unsigned v = __ballot_sync(m, p, file_, line_);
  return v == m || v == 0;
}
inline int __all_sync(unsigned m, int p, CUEMU_LOC) {
  return __ballot_sync(m, p, file_, line_) == m;
}
template <class T>
CUEMU_NOSAN inline unsigned __match_any_sync(unsigned m, T v, CUEMU_LOC) {
  struct A {
    T v;
    unsigned r;
  } a{v, 0};
  cuemu::coll(
      m,
      [](void** p, unsigned mm) {
        for (int i = 0; i < 32; i++)
          if (mm >> i & 1)
            for (int j = 0; j < 32; j++)
              if ((mm >> j & 1) && !memcmp(&((A*)p[i])->v, &((A*)p[j])->v, sizeof(T)))
                ((A*)p[i])->r |= 1u << j;
      },
      &a, "__match_any_sync", file_, line_);
  return a.r;
}
template <class T>
CUEMU_NOSAN inline unsigned __match_all_sync(unsigned m, T v, int* all, CUEMU_LOC) {
  *all = __match_any_sync(m, v, file_, line_) == m;
  return *all ? m : 0;
}
[[noreturn]] inline void __trap() { cuemu::fail("__trap()"); }
inline size_t __cvta_generic_to_shared(const void* p) {
  return (const unsigned char*)p - cuemu::dyn_smem();
}
inline unsigned __activemask() { cuemu::fail("__activemask() is not emulated: do not rely on it"); }

// ---- atomics: one OS thread, so plain; the checker is told that they are atomic -----------------
#define CUEMU_ATOMIC(name, expr)                                                                   \
  template <class T>                                                                               \
  CUEMU_NOSAN __attribute__((noinline)) T name(T* p, std::type_identity_t<T> v) {                  \
    cuemu::hook_access ? cuemu::hook_access(p, sizeof(T), true, true, __builtin_return_address(0)) \
                       : (void)0;                                                                  \
    T o = *p;                                                                                      \
    *p = (T)(expr);                                                                                \
    return o;                                                                                      \
  }
CUEMU_ATOMIC(atomicAdd, o + v)
CUEMU_ATOMIC(atomicSub, o - v)
CUEMU_ATOMIC(atomicExch, v)
CUEMU_ATOMIC(atomicMin, v < o ? v : o)
CUEMU_ATOMIC(atomicMax, v > o ? v : o)
CUEMU_ATOMIC(atomicAnd, o& v)
CUEMU_ATOMIC(atomicOr, o | v)
CUEMU_ATOMIC(atomicXor, o ^ v)
CUEMU_ATOMIC(atomicInc, o >= v ? 0 : o + 1)
CUEMU_ATOMIC(atomicDec, o == 0 || o > v ? v : o - 1)
#undef CUEMU_ATOMIC
template <class T>
CUEMU_NOSAN __attribute__((noinline)) T atomicCAS(T* p, std::type_identity_t<T> c,
                                                  std::type_identity_t<T> v) {
  cuemu::hook_access ? cuemu::hook_access(p, sizeof(T), true, true, __builtin_return_address(0))
                     : (void)0;
  T o = *p;
  if (o == c) *p = v;
  return o;
}

// ---- loads and stores with a cache hint ---------------------------------------------------------
#define CUEMU_LD(n)                                                \
  template <class T>                                               \
  CUEMU_INL T n(const T* p) {                                      \
    if ((uintptr_t)p % alignof(T)) cuemu::fail(#n ": misaligned"); \
    return *p;                                                     \
  }
CUEMU_LD(__ldg)
CUEMU_LD(__ldcs)
CUEMU_LD(__ldca)
CUEMU_LD(__ldcg)
CUEMU_LD(__ldlu)
CUEMU_LD(__ldcv)
#undef CUEMU_LD
#define CUEMU_ST(n)                                                \
  template <class T>                                               \
  CUEMU_INL void n(T* p, std::type_identity_t<T> v) {              \
    if ((uintptr_t)p % alignof(T)) cuemu::fail(#n ": misaligned"); \
    *p = v;                                                        \
  }
CUEMU_ST(__stcs)
CUEMU_ST(__stcg)
CUEMU_ST(__stwt)
CUEMU_ST(__stwb)
#undef CUEMU_ST

// ---- the host's side, as launchers use it -------------------------------------------------------

extern "C" {
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
cudaError_t cudaGetDevice(int*);
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int);
cudaError_t cudaMalloc(void**, size_t);
cudaError_t cudaFree(void*);
cudaError_t cudaMemcpy(void*, const void*, size_t, cudaMemcpyKind);
cudaError_t cudaMemset(void*, int, size_t);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t);
const char* cudaGetErrorString(cudaError_t);
}
template <class F>
inline cudaError_t cudaFuncSetAttribute(F* f, cudaFuncAttribute a, int v) {
  return a == cudaFuncAttributeMaxDynamicSharedMemorySize
             ? (cudaError_t)cuemu::set_smem_limit((const void*)f, v)
             : cudaSuccess;
}
template <class F>
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, F*, int, size_t) {
  *n = 2;
  return cudaSuccess;
}
namespace cuemu {
int ptx_launch(const void* key, dim3 g, dim3 b, size_t smem, const unsigned char* params,
               size_t n);  // -1: no PTX for this kernel
}
template <class... P, class... A>
inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*k)(P...), A&&... a) {
  std::tuple<std::decay_t<P>...> t(static_cast<std::decay_t<P>>(a)...);
  alignas(128) unsigned char buf[4096];
  size_t n = 0;  // parameters laid out as PTX does
  std::apply(
      [&](const auto&... x) {
        ((n = (n + alignof(std::decay_t<decltype(x)>) - 1) / alignof(std::decay_t<decltype(x)>) *
              alignof(std::decay_t<decltype(x)>),
          memcpy(buf + n, &x, sizeof x), n += sizeof x),
         ...);
      },
      t);
  int r = cuemu::ptx_launch((const void*)k, c->gridDim, c->blockDim, c->dynamicSmemBytes, buf, n);
  if (r >= 0) return (cudaError_t)r;
  return (cudaError_t)cuemu::launch((const void*)k, c->gridDim, c->blockDim, c->dynamicSmemBytes,
                                    [&] {
                                      auto u = t;
                                      std::apply(k, u);
                                    });
}
