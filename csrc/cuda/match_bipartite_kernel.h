// The face of the match_bipartite kernels: what they take and how to launch them. Known to g++ and
// nvcc.
#pragma once

#include "token_rows_kernel.h"

namespace restore_ext::cuda {

template <typename T>
struct MatchBipartiteParams {
  TokenRows<T> rows;         // filled by launch_token_rows
  const int* budget;         // [B] or nullptr: R
  unsigned long long* best;  // [B, ceil(N/2)] workspace: of each even row its best odd one's key
  int* order;                // [B, ceil(N/2)] workspace, or nullptr without a class token
  int64_t* unmerged;         // [B, U]
  int64_t* src;              // [B, R]
  int64_t* dst;              // [B, R]
  int U, R;
  int class_token;  // 1 or 0: so many even rows are never a source
};

template <typename T>  // float, __half or __nv_bfloat16
cudaError_t launch_match_bipartite(const MatchBipartiteParams<T>& params, cudaStream_t stream);

}  // namespace restore_ext::cuda
