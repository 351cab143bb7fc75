// The face of the select_diverse kernels: what they take and how to launch them. Known to g++ and
// nvcc.
#pragma once

#include "nearest_rivals_kernel.h"

namespace restore_ext::cuda {

// The matrices of cosines kept at one time take no more; an image whose own takes more has none.
constexpr int64_t kMostCosineBytes = int64_t{1} << 30;

template <typename T>
struct SelectDiverseParams {
  TokenRows<T> rows;         // not yet filled
  const int* budget;         // [B] or nullptr: K
  uint32_t* nearest;         // [B, N] workspace: see nearest_rivals_kernel.h
  float* cosines;            // [kept, N, cosine_stride] workspace, or nullptr if none are kept
  uint32_t* reach;           // [B, N] workspace without cosines, else nullptr
  unsigned long long* best;  // [B, K] workspace without cosines, else nullptr: each pick's key
  int64_t* picks;            // [B, K]
  int64_t cosine_stride;     // see nearest_rivals_kernel.h
  int K, kept;               // of how many images the cosines are kept at one time
};

template <typename T>  // float, __half or __nv_bfloat16
cudaError_t launch_select_diverse(const SelectDiverseParams<T>& params, cudaStream_t stream);

}  // namespace restore_ext::cuda
