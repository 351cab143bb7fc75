// kVec neighbouring channels of a row that may end, or begin, anywhere.
#pragma once

#include "pack.cuh"

namespace restore_ext::cuda {

// Channels c ... c + kVec - 1 of a row of C, zeros behind its end. Wherever the row lies, the same
// channels come to the same lane, so that a sum over them has the same bits.
template <int kVec, typename T>
__device__ __forceinline__ Pack<T, kVec> channels(const T* row, int c, int C) {
  const T* from = row + c;
  if (c + kVec <= C && reinterpret_cast<std::uintptr_t>(from) % sizeof(Pack<T, kVec>) == 0) {
    return pack_at<kVec>(from);
  }
  Pack<T, kVec> pack;
#pragma unroll
  for (int v = 0; v < kVec; ++v) pack.at[v] = c + v < C ? from[v] : from_float<T>(0.f);
  return pack;
}

// The sum over a warp's lanes and their elements, the same in every lane.
template <int kVec>
__device__ __forceinline__ float warp_sum(float (&sum)[kVec]) {
#pragma unroll
  for (int width = kVec / 2; width > 0; width /= 2) {
#pragma unroll
    for (int v = 0; v < width; ++v) sum[v] += sum[v + width];
  }
  float all = sum[0];
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) all += __shfl_xor_sync(0xffffffffu, all, lanes);
  return all;
}

}  // namespace restore_ext::cuda
