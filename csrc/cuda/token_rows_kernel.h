// What the similarity kernels share: the valid tokens of each image, one after another, and what
// makes each a unit vector. Working on these ranks alone is what makes the result with `valid` that
// of the image without the others.
#pragma once

#include <driver_types.h>

#include <cstdint>

namespace restore_ext::cuda {

// The unit vector of a row x is (power * x) * inverse. power is 1 but for rows so large or so small
// that their products leave float32's range: then it is the power of two that brings their largest
// element near 1. inverse is 0 for a row of zeros, NaN for one with NaN or Inf: it compares with
// none. Rows of the same bits get the same bits.
struct alignas(8) UnitScale {
  float power, inverse;
};

template <typename T>
struct TokenRows {
  const T* x;         // [B, N, C], the last dimension dense
  const bool* valid;  // [B, N] dense, or nullptr: all are
  int* token;         // [B, N] rank to token, ascending; -1 from count on
  int* count;         // [B]
  UnitScale* scale;   // [B, N] by rank; not written from count on
  int B, N, C;
  int64_t stride_b, stride_n;  // of x
};

// Fills token, count and scale. T is float, __half or __nv_bfloat16.
template <typename T>
cudaError_t launch_token_rows(const TokenRows<T>& rows, cudaStream_t stream);

}  // namespace restore_ext::cuda
