#include "device.h"

#include <cuda_runtime.h>

namespace restore_ext::cuda {
namespace {

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, which, device);
  return value;
}

}  // namespace

const char* error_text(cudaError_t error) { return cudaGetErrorString(error); }

int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }

int compute_capability() {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
         attribute(cudaDevAttrComputeCapabilityMinor);
}

int shared_memory_limit() { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

}  // namespace restore_ext::cuda
