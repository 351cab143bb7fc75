// What works must work, in every mode: each kernel counts what it finds wrong in *wrong.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../../cuda/pack.cuh"
#include "selftest.h"

namespace restore_ext::cuda {
namespace {

constexpr unsigned kAll = 0xffffffffu;
#define EXPECT(condition)                  \
  do {                                     \
    if (!(condition)) atomicAdd(wrong, 1); \
  } while (0)

__global__ void warp_kernel(int* wrong) {
  const int lane = threadIdx.x & 31;
  EXPECT(__shfl_sync(kAll, lane, 5) == 5);
  EXPECT(__shfl_sync(kAll, lane, 1, 8) == (lane & ~7) + 1);
  EXPECT(__shfl_up_sync(kAll, lane, 3) == (lane < 3 ? lane : lane - 3));
  EXPECT(__shfl_down_sync(kAll, lane, 2, 16) == ((lane & 15) + 2 > 15 ? lane : lane + 2));
  EXPECT(__shfl_xor_sync(kAll, (long long)lane << 40, 7) == (long long)(lane ^ 7) << 40);
  EXPECT(__shfl_xor_sync(kAll, lane * .5, 1) == (lane ^ 1) * .5);
  EXPECT(__low2float(__shfl_xor_sync(kAll, __float2half2_rn(lane), 1)) == (lane ^ 1));
  EXPECT(__ballot_sync(kAll, lane % 3 == 0) == 0x49249249u);
  EXPECT(__any_sync(kAll, lane == 31) && !__all_sync(kAll, lane == 31));
  EXPECT(__reduce_add_sync(kAll, (unsigned)lane) == 496 && __reduce_max_sync(kAll, -lane) == 0);
  EXPECT(__reduce_min_sync(kAll, -lane) == -31 && __reduce_or_sync(kAll, 1u << lane) == kAll);
  EXPECT(__match_any_sync(kAll, lane / 4) == 0xfu << (lane & ~3));
  if (lane & 1) {  // the halves of a warp on their own ways
    EXPECT(__reduce_add_sync(0xaaaaaaaau, 1u) == 16);
  } else {
    EXPECT(__popc(__ballot_sync(0x55555555u, 1)) == 16);
  }
  __syncwarp();
  float sum = lane;
  for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(kAll, sum, d);
  EXPECT(sum == 496.f);
}

__global__ void block_kernel(int* wrong) {
  STATIC_SHARED(int, alone);
  __shared__ int count[16];
  __shared__ float tile[32][33];
  const int t = threadIdx.x;
  if (t < 16) count[t] = 0;
  if (t == 0) alone = 7;
  __syncthreads();
  EXPECT(alone == 7);
  atomicAdd(&count[t % 16], 1);
  tile[t / 32][t % 32] = t;
  __syncthreads();
  EXPECT(count[t % 16] == (int)blockDim.x / 16);
  EXPECT(tile[t % 8][t / 8] == (t % 8) * 32 + t / 8);
  EXPECT(__syncthreads_count(t < 10) == 10);
  EXPECT(__syncthreads_or(t == 3) && !__syncthreads_and(t == 3));
}

__global__ void grid_kernel(int* wrong, int* last) {
  EXPECT(gridDim.x == 3 && gridDim.y == 2 && gridDim.z == 2 && blockDim.x == 32);
  if (threadIdx.x == 0)
    atomicMax(last, (int)(blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z)));
}

template <int kRounds>
__global__ void __launch_bounds__(128)
    reverse_kernel(int* wrong) {  // through dynamic shared memory
  DYNAMIC_SHARED(memory);
  int* row = reinterpret_cast<int*>(memory);
  const int t = threadIdx.x, other = blockDim.x - 1 - t;
  for (int i = 0; i < kRounds; ++i) {
    row[t] = t + i;
    __syncthreads();
    EXPECT(row[other] == other + i);
    __syncthreads();
  }
}

__global__ void atomic_kernel(int* wrong, unsigned long long* keys, float* sum, unsigned* turns) {
  const unsigned long long key = (unsigned long long)(threadIdx.x * 7 % 64) << 32 | threadIdx.x;
  atomicMax(&keys[0], key);
  atomicMin(&keys[1], key);
  atomicAdd(&keys[2], 1ull << 33);
  atomicAdd(sum, .5f);
  atomicInc(turns, 9);
  atomicXor(turns + 1, threadIdx.x);
  unsigned old = turns[2], seen;
  do {
    seen = old;
    old = atomicCAS(turns + 2, seen, seen + 3);
  } while (old != seen);
}

__global__ void atomic_results_kernel(int* wrong, const unsigned long long* keys, const float* sum,
                                      const unsigned* turns) {
  EXPECT(keys[0] >> 32 == 63 && (unsigned)keys[0] * 7 % 64 == 63 && keys[1] == 0);
  EXPECT(keys[2] == 64ull << 33 && *sum == 32.f && turns[0] == 4 && turns[2] == 192);
  EXPECT(turns[1] == 0);
}

__global__ void packs_kernel(int* wrong, const __half* from, __half* to) {
  float x[8];
  load<8>(x, from + threadIdx.x * 8);
  for (int i = 0; i < 8; ++i) EXPECT(x[i] == (float)((threadIdx.x * 8 + i) % 100));
  store(to + threadIdx.x * 8, x);
  const int4 quad = __ldg(reinterpret_cast<const int4*>(from) + threadIdx.x);
  EXPECT(__half2float(__ushort_as_half(quad.w >> 16)) == x[7]);
}

__global__ void choose_kernel(int* wrong, const int* ways) {  // a jump table, a local array
  int table[6], sum = 0;
  for (int i = 0; i < 6; ++i) table[i] = ways[i] * i;
  for (int i = 0; i < 6; ++i) {
    switch (ways[i]) {
      case 0:
        sum += table[ways[5 - i]];
        break;
      case 1:
        sum -= 3;
        break;
      case 2:
        sum ^= 77;
        break;
      case 3:
        sum *= 5;
        break;
      case 4:
        sum += table[(sum & 3) + 1];
        break;
      default:
        sum += 1000;
    }
  }
  *wrong += sum != 616;
}

// The last block to come adds up what all have left: fence, count, fence.
__global__ void last_block_kernel(int* wrong, float* parts, unsigned* counter, float* total) {
  STATIC_SHARED(bool, last);
  parts[blockIdx.x * 64 + threadIdx.x] = blockIdx.x + 1;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(counter, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  float sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += parts[b * 64 + 63 - threadIdx.x];
  total[threadIdx.x] = sum;
  EXPECT(sum == 15.f);
  if (threadIdx.x == 0) *counter = 0;
}

cudaError_t all(int* wrong) {
  int last = 0;
  unsigned long long keys[3] = {0, ~0ull, 0};
  float sum = 0, parts[5 * 64], total[64];
  unsigned turns[3] = {0, 0, 0}, counter = 0;
  alignas(16) __half halves[64 * 8], copies[64 * 8];
  const int ways[6] = {4, 1, 2, 3, 0, 5};
  for (int i = 0; i < 64 * 8; ++i) halves[i] = __float2half(i % 100);
  cudaError_t error = launch(warp_kernel, dim3(2), dim3(64), 0, nullptr, wrong);
  if (!error) error = launch(block_kernel, dim3(2), dim3(256), 0, nullptr, wrong);
  if (!error) error = launch(grid_kernel, dim3(3, 2, 2), dim3(32), 0, nullptr, wrong, &last);
  *wrong += last != 11;
  if (!error) error = launch(reverse_kernel<3>, dim3(2), dim3(128), 512, nullptr, wrong);
  if (!error) error = launch(reverse_kernel<2>, dim3(1), dim3(128), 200 << 10, nullptr, wrong);
  if (!error)
    error = launch(atomic_kernel, dim3(2), dim3(32), 0, nullptr, wrong, keys, &sum, turns);
  if (!error)
    error = launch(atomic_results_kernel, dim3(1), dim3(1), 0, nullptr, wrong, keys, &sum, turns);
  if (!error) error = launch(packs_kernel, dim3(1), dim3(64), 0, nullptr, wrong, halves, copies);
  *wrong += memcmp(halves, copies, sizeof halves) != 0;
  if (!error) error = launch(choose_kernel, dim3(1), dim3(1), 0, nullptr, wrong, ways);
  if (!error)
    error = launch(last_block_kernel, dim3(5), dim3(64), 0, nullptr, wrong, parts, &counter, total);
  *wrong += counter != 0;
  return error;
}

}  // namespace

extern "C" SELFTEST_EXPORT int selftest_checks(int* wrong) { return all(wrong); }

}  // namespace restore_ext::cuda
