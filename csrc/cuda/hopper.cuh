// Hopper's own instructions (sm_90a): mbarriers, tensor-map copies (TMA), warpgroup products
// (wgmma), registers that change hands. Emulated twins: csrc/emulator/include/cuemu_hopper.h.
#pragma once

#include <cuda.h>  // CUtensorMap

#include <type_traits>

#include "ptx.cuh"

#if defined(CUEMU)
#include "cuemu_hopper.h"
#else
namespace restore_ext::cuda {

// ---- mbarriers: `count` arrivals and all expected bytes complete a phase
// -------------------------

__device__ __forceinline__ void mbar_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_u32(barrier)), "r"(count)
               : "memory");
}

// After the inits, by the thread that made them: TMA knows the barriers then.
__device__ __forceinline__ void fence_mbar_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbar_expect_tx(uint64_t* barrier, int bytes) {  // and arrives
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_u32(barrier)),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void mbar_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_u32(barrier)) : "memory");
}

// Until the phase of that parity is complete: 0 the first, 1 the second, 0 the third, ...
__device__ __forceinline__ void mbar_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "L_%=:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra D_%=;\nbra L_%=;\nD_%=:\n}\n" ::"r"(smem_u32(barrier)),
      "r"(parity)
      : "memory");
}

// ---- who may see what, and who has which registers
// -----------------------------------------------

// What this thread has stored to shared memory, seen by wgmma and TMA too (after a barrier).
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

template <int kCount>
__device__ __forceinline__ void more_registers() {  // by a whole warpgroup, likewise below
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

__device__ __forceinline__ void named_barrier_sync(int id, int threads) {  // 0 is __syncthreads
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- TMA: one thread has a box of a tensor copied; what lies outside of it is zeros
// ---------------

__device__ __forceinline__ void tma_load(void* to, const CUtensorMap* map, uint64_t* barrier,
                                         int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4}], [%2];" ::"r"(smem_u32(to)),
      "l"(map), "r"(smem_u32(barrier)), "r"(c0), "r"(c1)
      : "memory");
}

__device__ __forceinline__ void tma_load(void* to, const CUtensorMap* map, uint64_t* barrier,
                                         int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5}], [%2];" ::"r"(smem_u32(to)),
      "l"(map), "r"(smem_u32(barrier)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

__device__ __forceinline__ void tma_load(void* to, const CUtensorMap* map, uint64_t* barrier,
                                         int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6}], [%2];" ::"r"(smem_u32(to)),
      "l"(map), "r"(smem_u32(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// ---- wgmma: d (64 x N, registers) [+]= a (64 x 16) * b (16 x N), by the 128 threads of a
// warpgroup ----
//
// d: thread t has rows 16 (t / 32) + t / 4 % 8 [+ 8], and of every 8 columns 2 (t % 4) [+ 1].
// a: in shared memory, K-major; or in registers, laid out like 16 columns of d in pairs.
// b: in shared memory, K-major, or with kTransposeB N-major.

// Before the first product of a group: registers written so far are the products' to read.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kGroups>
__device__ __forceinline__ void wgmma_wait() {  // until at most so many groups are under way
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

#define WGMMA_OUT4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_OUT16(i) WGMMA_OUT4(i), WGMMA_OUT4(i + 4), WGMMA_OUT4(i + 8), WGMMA_OUT4(i + 12)

#define WGMMA_REGISTERS_64                                                         \
  "{"                                                                              \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "         \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
  "}"

#define WGMMA_REGISTERS_96                                                           \
  "{"                                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"   \
  "}"

#define WGMMA_REGISTERS_128                                                          \
  "{"                                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"   \
  "}"

#define WGMMA_OUT_64 WGMMA_OUT16(0), WGMMA_OUT16(16)

#define WGMMA_OUT_96 WGMMA_OUT16(0), WGMMA_OUT16(16), WGMMA_OUT16(32)

#define WGMMA_OUT_128 WGMMA_OUT16(0), WGMMA_OUT16(16), WGMMA_OUT16(32), WGMMA_OUT16(48)

#define WGMMA_SHARED_64(type)                                                            \
  asm volatile(                                                                          \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                       \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " WGMMA_REGISTERS_64 \
      ", %32, %33, p, 1, 1, 0, %35;\n}\n"                                                \
      : WGMMA_OUT_64                                                                     \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kTransposeB))

#define WGMMA_IN_REGISTERS_64(type)                                                            \
  asm volatile(                                                                                \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                             \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " WGMMA_REGISTERS_64       \
      ", {%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}\n"                                        \
      : WGMMA_OUT_64                                                                           \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), \
        "n"(kTransposeB))

template <typename T, int kTransposeB>
__device__ __forceinline__ void wgmma(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    WGMMA_SHARED_64("f16");
  } else {
    WGMMA_SHARED_64("bf16");
  }
}

template <typename T, int kTransposeB>
__device__ __forceinline__ void wgmma(float (&d)[32], const uint32_t (&a)[4], uint64_t b,
                                      bool accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    WGMMA_IN_REGISTERS_64("f16");
  } else {
    WGMMA_IN_REGISTERS_64("bf16");
  }
}

#define WGMMA_SHARED_96(type)                                                            \
  asm volatile(                                                                          \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %50, 0;\n"                                       \
      "wgmma.mma_async.sync.aligned.m64n96k16.f32." type "." type " " WGMMA_REGISTERS_96 \
      ", %48, %49, p, 1, 1, 0, %51;\n}\n"                                                \
      : WGMMA_OUT_96                                                                     \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kTransposeB))

#define WGMMA_IN_REGISTERS_96(type)                                                            \
  asm volatile(                                                                                \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %53, 0;\n"                                             \
      "wgmma.mma_async.sync.aligned.m64n96k16.f32." type "." type " " WGMMA_REGISTERS_96       \
      ", {%48, %49, %50, %51}, %52, p, 1, 1, %54;\n}\n"                                        \
      : WGMMA_OUT_96                                                                           \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), \
        "n"(kTransposeB))

template <typename T, int kTransposeB>
__device__ __forceinline__ void wgmma(float (&d)[48], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    WGMMA_SHARED_96("f16");
  } else {
    WGMMA_SHARED_96("bf16");
  }
}

template <typename T, int kTransposeB>
__device__ __forceinline__ void wgmma(float (&d)[48], const uint32_t (&a)[4], uint64_t b,
                                      bool accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    WGMMA_IN_REGISTERS_96("f16");
  } else {
    WGMMA_IN_REGISTERS_96("bf16");
  }
}

#define WGMMA_SHARED_128(type)                                                             \
  asm volatile(                                                                            \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                         \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " WGMMA_REGISTERS_128 \
      ", %64, %65, p, 1, 1, 0, %67;\n}\n"                                                  \
      : WGMMA_OUT_128                                                                      \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kTransposeB))

#define WGMMA_IN_REGISTERS_128(type)                                                           \
  asm volatile(                                                                                \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"                                             \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " WGMMA_REGISTERS_128     \
      ", {%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}\n"                                        \
      : WGMMA_OUT_128                                                                          \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), \
        "n"(kTransposeB))

template <typename T, int kTransposeB>
__device__ __forceinline__ void wgmma(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    WGMMA_SHARED_128("f16");
  } else {
    WGMMA_SHARED_128("bf16");
  }
}

template <typename T, int kTransposeB>
__device__ __forceinline__ void wgmma(float (&d)[64], const uint32_t (&a)[4], uint64_t b,
                                      bool accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    WGMMA_IN_REGISTERS_128("f16");
  } else {
    WGMMA_IN_REGISTERS_128("bf16");
  }
}

}  // namespace restore_ext::cuda
#endif

namespace restore_ext::cuda {

// Where an operand of wgmma lies: rows of 2 * kColumns bytes (64 columns: swizzled over 128 bytes;
// 32: over 64), in patterns of 8 rows that follow each other. `next` is, for an operand with the
// columns along N, how many bytes the next kColumns of them lie away.
template <int kColumns>
__device__ __forceinline__ uint64_t wgmma_operand(const void* start, uint32_t next = 16) {
  static_assert(kColumns == 64 || kColumns == 32);
  constexpr uint64_t kPattern = 8 * 2 * kColumns, kSwizzle = kColumns == 64 ? 1 : 2;
  return static_cast<uint64_t>((smem_u32(start) & 0x3ffff) >> 4) |
         static_cast<uint64_t>(next >> 4) << 16 | kPattern >> 4 << 32 | kSwizzle << 62;
}

// A tensor of 16-bit elements for tma_load, in boxes whose first dimension is 64 or 32 dense
// columns, swizzled as wgmma_operand takes them. Strides are those of the further dimensions.
template <typename T, int kRank>
cudaError_t make_tensor_map(CUtensorMap* map, const T* data, const cuuint64_t (&size)[kRank],
                            const cuuint64_t (&stride_in_bytes)[kRank - 1],
                            const cuuint32_t (&box)[kRank]) {
  static_assert(sizeof(T) == 2);
  // Found in the driver at run time: nothing here links libcuda.
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &found);
    return error == cudaSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  cuuint32_t dense[kRank];
  for (cuuint32_t& step : dense) step = 1;
  const CUresult result = encode(
      map,
      std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      kRank, const_cast<T*>(data), size, stride_in_bytes, box, dense, CU_TENSOR_MAP_INTERLEAVE_NONE,
      box[0] == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace restore_ext::cuda
