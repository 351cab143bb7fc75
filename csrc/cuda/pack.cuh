// Loads and stores of kVec neighbouring elements, seen as floats.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "launch.cuh"

namespace restore_ext::cuda {

template <typename T>
constexpr int kWidestPack = 16 / sizeof(T);  // one 128-bit transaction

template <typename T, int kVec>
struct alignas(sizeof(T) * kVec) Pack {
  T at[kVec];
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

template <int kVec, typename T>
__device__ __forceinline__ Pack<T, kVec> pack_at(const T* from) {
  return *reinterpret_cast<const Pack<T, kVec>*>(from);
}

template <int kVec, typename T>
__device__ __forceinline__ void load(float (&to)[kVec], const T* from) {
  const Pack<T, kVec> pack = pack_at<kVec>(from);
#pragma unroll
  for (int i = 0; i < kVec; ++i) to[i] = to_float(pack.at[i]);
}

template <int kVec, typename T>
__device__ __forceinline__ void store(T* to, const float (&from)[kVec]) {
  Pack<T, kVec> pack;
#pragma unroll
  for (int i = 0; i < kVec; ++i) pack.at[i] = from_float<T>(from[i]);
  *reinterpret_cast<Pack<T, kVec>*>(to) = pack;
}

// Whether all that lies at ptr plus multiples of these distances can be read in widest packs.
template <typename T, typename... Distance>
__host__ __device__ bool packs(const T* ptr, Distance... in_elements) {
  return reinterpret_cast<std::uintptr_t>(ptr) % 16 == 0 &&
         ((in_elements % kWidestPack<T> == 0) && ...);
}

}  // namespace restore_ext::cuda
