// What is wrong must be named: one planted fault a kernel. python_tests/emulator/test_emulator.py
// says which words the report of each must hold, and in which modes.
#include "../../cuda/ptx.cuh"
#include "selftest.h"

namespace restore_ext::cuda {
namespace {

constexpr unsigned kAll = 0xffffffffu;

__global__ void race_shared(int* out) {
  STATIC_SHARED(int, word);
  if (threadIdx.x == 0) word = 3;
  out[threadIdx.x] = word;
}

__global__ void race_global(int* out) { out[threadIdx.x / 2] = threadIdx.x; }

__global__ void race_between_warps(int* out) {  // __syncwarp is not enough
  DYNAMIC_SHARED(memory);
  int* row = reinterpret_cast<int*>(memory);
  row[threadIdx.x] = 0;
  __syncthreads();
  row[threadIdx.x] = threadIdx.x;
  __syncwarp();
  out[threadIdx.x] = row[threadIdx.x ^ 32];
}

__global__ void out_of_bounds(int* out) { out[threadIdx.x + 1] = 1; }

__global__ void out_of_bounds_shared(int* out) {
  DYNAMIC_SHARED(memory);
  reinterpret_cast<int*>(memory)[threadIdx.x + 1] = 1;
  out[threadIdx.x] = 1;
}

__global__ void uninitialised_shared(int* out) {
  DYNAMIC_SHARED(memory);
  int* row = reinterpret_cast<int*>(memory);
  if (threadIdx.x != 5) row[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = row[threadIdx.x];
}

__global__ void uninitialised_output(int* out) { out[threadIdx.x] += 1; }

__global__ void copy_not_waited_for(int* out, const int* in) {
  DYNAMIC_SHARED(memory);
  int* row = reinterpret_cast<int*>(memory);
  cp_async_16(row + 4 * threadIdx.x, in + 4 * threadIdx.x, true);
  cp_async_commit();
  out[threadIdx.x] = row[4 * threadIdx.x];
  cp_async_wait<0>();
}

__global__ void copy_left_open(int* out, const int* in) {
  DYNAMIC_SHARED(memory);
  cp_async_16(memory + 16 * threadIdx.x, in + 4 * threadIdx.x, true);
  cp_async_commit();
  out[threadIdx.x] = 0;
}

__global__ void copy_without_barrier(int* out,
                                     const int* in) {  // waited for, but by another thread
  DYNAMIC_SHARED(memory);
  int* row = reinterpret_cast<int*>(memory);
  row[4 * threadIdx.x] = 0;
  __syncthreads();
  cp_async_16(row + 4 * threadIdx.x, in + 4 * threadIdx.x, true);
  cp_async_commit();
  cp_async_wait<0>();
  out[threadIdx.x] = row[4 * (threadIdx.x ^ 1)];
}

__global__ void misaligned(int* out, const int* in) {
  DYNAMIC_SHARED(memory);
  cp_async_16(memory + 16 * threadIdx.x, in + 4 * threadIdx.x + 1, true);
  cp_async_commit();
  cp_async_wait<0>();
  out[threadIdx.x] = 0;
}

__global__ void divergent_barrier(int* out) {
  if (threadIdx.x < 40) {
    __syncthreads();
    out[threadIdx.x] = 1;
  } else {
    out[threadIdx.x] = 2;
    __syncthreads();
  }
}

__global__ void exit_before_barrier(int* out) {
  if (threadIdx.x == 7) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void missing_lane(int* out) {
  if (threadIdx.x % 32 != 9)
    out[threadIdx.x] = __shfl_sync(kAll, threadIdx.x, 0);
  else
    __syncthreads();
}

__global__ void exited_lane(int* out) {
  if (threadIdx.x == 3) return;
  out[threadIdx.x] = __shfl_sync(kAll, threadIdx.x, 0);
}

__global__ void endless_wait(int* out) {
  volatile int* word = out;
  *word = 0;
  while (*word != 12345) __nanosleep(100);
}

__global__ void __launch_bounds__(64) nothing(int* out) { out[threadIdx.x + 64 * blockIdx.x] = 0; }

// The last block without one of its fences, or without the barrier before the count.
template <bool kFenceBefore, bool kFenceAfter, bool kBarrier>
__global__ void last_block(int* out, int* parts, unsigned* counter) {
  STATIC_SHARED(bool, last);
  parts[blockIdx.x * 64 + threadIdx.x] = blockIdx.x;
  if (kBarrier) __syncthreads();
  if (threadIdx.x == 0) {
    if (kFenceBefore) __threadfence();
    last = atomicAdd(counter, 1u) == gridDim.x - 1;
    if (kFenceAfter) __threadfence();
  }
  __syncthreads();
  if (!last) return;
  int sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += parts[b * 64 + (threadIdx.x ^ 1)];
  out[threadIdx.x] = sum;
}

// Every thread fences for itself before the barrier: right, too, for the fences are fence.sc.
__global__ void last_block_all_fence(int* out, int* parts, unsigned* counter) {
  STATIC_SHARED(bool, last);
  parts[blockIdx.x * 64 + threadIdx.x] = blockIdx.x;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(counter, 1u) == gridDim.x - 1;
  __syncthreads();
  __threadfence();
  if (!last) return;
  int sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += parts[b * 64 + (threadIdx.x ^ 1)];
  out[threadIdx.x] = sum;
}

}  // namespace

#define RUN(name, blocks, threads, shared, ...) \
  if (!strcmp(fault, #name))                    \
  return launch(name, dim3(blocks), dim3(threads), shared, nullptr, ##__VA_ARGS__)

// out, parts and in hold 64, 192 and 260 ints.
extern "C" SELFTEST_EXPORT int selftest_fault(const char* fault, int* out, int* parts,
                                              const int* in, unsigned* counter) {
  RUN(race_shared, 1, 64, 0, out);
  RUN(race_global, 1, 64, 0, out);
  RUN(race_between_warps, 1, 64, 256, out);
  RUN(out_of_bounds, 1, 64, 0, out);
  RUN(out_of_bounds_shared, 1, 64, 256, out);
  RUN(uninitialised_shared, 1, 64, 256, out);
  RUN(uninitialised_output, 1, 64, 0, out);
  RUN(copy_not_waited_for, 1, 64, 1024, out, in);
  RUN(copy_left_open, 1, 64, 1024, out, in);
  RUN(copy_without_barrier, 1, 64, 1024, out, in);
  RUN(misaligned, 1, 64, 1024, out, in);
  RUN(divergent_barrier, 1, 64, 0, out);
  RUN(exit_before_barrier, 1, 64, 0, out);
  RUN(missing_lane, 1, 64, 0, out);
  RUN(exited_lane, 1, 32, 0, out);
  RUN(endless_wait, 1, 1, 0, out);
  if (!strcmp(fault, "too_many_threads"))
    return launch(uninitialised_output, dim3(1), dim3(1056), 0, nullptr, out);
  if (!strcmp(fault, "more_than_launch_bounds"))
    return launch(nothing, dim3(1), dim3(96), 0, nullptr, out);
  if (!strcmp(fault, "too_much_shared"))
    return launch(nothing, dim3(1), dim3(64), 300 << 10, nullptr, out);
  if (!strcmp(fault, "grid_too_high"))
    return launch(nothing, dim3(1, 65536), dim3(64), 0, nullptr, out);
  if (!strcmp(fault, "last_block"))
    return launch(last_block<true, true, true>, dim3(3), dim3(64), 0, nullptr, out, parts, counter);
  if (!strcmp(fault, "last_block_no_release"))
    return launch(last_block<false, true, true>, dim3(3), dim3(64), 0, nullptr, out, parts,
                  counter);
  if (!strcmp(fault, "last_block_no_acquire"))
    return launch(last_block<true, false, true>, dim3(3), dim3(64), 0, nullptr, out, parts,
                  counter);
  if (!strcmp(fault, "last_block_no_barrier"))
    return launch(last_block<true, true, false>, dim3(3), dim3(64), 0, nullptr, out, parts,
                  counter);
  RUN(last_block_all_fence, 3, 64, 0, out, parts, counter);
  return -1;
}

}  // namespace restore_ext::cuda
