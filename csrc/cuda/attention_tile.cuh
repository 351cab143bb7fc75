// Attention by mma.sync: tiles of 64 lines of queries, keys or values in shared memory, and the two
// products of a warp's 16 queries with 64 keys.
#pragma once

#include <type_traits>

#include "pack.cuh"
#include "ptx.cuh"

namespace restore_ext::cuda {

constexpr int kTileLines = 64, kTileThreads = 128;

template <typename T>
__device__ __forceinline__ uint32_t pack_two(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 two = __floats2half2_rn(low, high);
    memcpy(&bits, &two, 4);
  } else {
    const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &two, 4);
  }
  return bits;
}

// 64 lines of kD elements. Their 16-byte pieces are permuted such that the same piece of 8
// neighbouring lines meets no bank twice.
template <typename T, int kD>
struct AttentionTile {
  static constexpr int kPieces = kD / 8;
  T element[kTileLines * kD];

  static __device__ __forceinline__ int place(int line, int piece) {
    const int twist = kPieces % 8 == 0 ? line & 7 : line >> 1 & 3;
    return line * kD + ((piece ^ twist) << 3);
  }
  __device__ __forceinline__ const T* at(int line, int piece) const {
    return element + place(line, piece);
  }
  __device__ __forceinline__ T* at(int line, int piece) { return element + place(line, piece); }

  // By all threads, asynchronously: lines from[0], from[stride], ...; zeros where not wanted(line).
  template <class Wanted>
  __device__ __forceinline__ void fetch(const T* from, int64_t stride, const Wanted& wanted) {
#pragma unroll
    for (int i = 0; i < kTileLines * kPieces / kTileThreads; ++i) {
      const int at_thread = i * kTileThreads + static_cast<int>(threadIdx.x);
      const int line = at_thread / kPieces, piece = at_thread % kPieces;
      const bool valid = wanted(line);
      cp_async_16(at(line, piece), valid ? from + line * stride + piece * 8 : from, valid);
    }
  }
};

// What a thread holds of its warp's 16 queries: rows lane / 4 and lane / 4 + 8.
template <typename T, int kD>
__device__ __forceinline__ void load_queries(uint32_t (&q)[kD / 16][4],
                                             const AttentionTile<T, kD>& tile, int row) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kD / 16; ++k) ldmatrix_x4(q[k], tile.at(row + lane % 16, 2 * k + lane / 16));
}

// s[n] are columns 8n + 2 (lane % 4) and the next, of the thread's first row and of its second.
template <typename T, int kD>
__device__ __forceinline__ void score(float (&s)[kTileLines / 8][4],
                                      const uint32_t (&q)[kD / 16][4],
                                      const AttentionTile<T, kD>& key) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < kTileLines / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[n][e] = 0.f;
  }
#pragma unroll
  for (int k = 0; k < kD / 16; ++k) {
#pragma unroll
    for (int n = 0; n < kTileLines / 8; n += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, key.at(8 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
      mma_m16n8k16<T>(s[n], q[k], b[0], b[1]);
      mma_m16n8k16<T>(s[n + 1], q[k], b[2], b[3]);
    }
  }
}

// o += weight . value, the weights rounded to T.
template <typename T, int kD>
__device__ __forceinline__ void add_values(float (&o)[kD / 8][4],
                                           const float (&weight)[kTileLines / 8][4],
                                           const AttentionTile<T, kD>& value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kTileLines / 16; ++k) {
    const float (&left)[4] = weight[2 * k];
    const float (&right)[4] = weight[2 * k + 1];
    const uint32_t a[4] = {pack_two<T>(left[0], left[1]), pack_two<T>(left[2], left[3]),
                           pack_two<T>(right[0], right[1]), pack_two<T>(right[2], right[3])};
#pragma unroll
    for (int d = 0; d < kD / 8; d += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, value.at(16 * k + lane % 16, d + lane / 16));
      mma_m16n8k16<T>(o[d], a, b[0], b[1]);
      mma_m16n8k16<T>(o[d + 1], a, b[2], b[3]);
    }
  }
}

}  // namespace restore_ext::cuda
