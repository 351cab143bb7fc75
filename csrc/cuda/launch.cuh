// How a kernel is launched and how it declares shared memory, so that nvcc and the emulator's plain
// C++ compiler read the same file.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#if defined(CUEMU)
#include "cuemu_ptx.h"
#else
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#define STATIC_SHARED(T, name) __shared__ T name
#endif

namespace restore_ext::cuda {

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Without <<<>>>, which only nvcc can parse. More than 48 KiB of dynamic shared memory is asked
// for.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                   A&&... arguments) {
  if (shared > 48 << 10) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
}

}  // namespace restore_ext::cuda
