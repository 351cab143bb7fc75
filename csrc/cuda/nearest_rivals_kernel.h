// Of every token the largest cosine with its rivals: what scoring anchors and selecting diverse
// tokens have in common.
#pragma once

#include "token_rows_kernel.h"

namespace restore_ext::cuda {

template <typename T>
struct NearestRivalsParams {
  TokenRows<T> rows;      // filled by launch_token_rows
  const float* density;   // [B, N] by rank, NaN where not comparable; or nullptr: all are rivals
  bool denser;            // the rivals of a token are the denser ones; else the less dense ones
  uint32_t* nearest;      // [B, N] by rank: `ordered` of the largest cosine; 0 without a rival
  float* cosines;         // [B, N, cosine_stride] by ranks, or nullptr: kept nowhere. NaN where not
                          // comparable, and from count[b] up to the next multiple of 4
  int64_t cosine_stride;  // N or more, a multiple of 4, so that every row begins where 16 bytes do
};

template <typename T>  // float, __half or __nv_bfloat16
cudaError_t launch_nearest_rivals(const NearestRivalsParams<T>& params, cudaStream_t stream);

}  // namespace restore_ext::cuda
