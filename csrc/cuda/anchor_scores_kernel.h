// What score_anchors and select_anchors share: the two terms of every token's score.
#pragma once

#include "token_rows_kernel.h"

namespace restore_ext::cuda {

constexpr int kUnitsSummed = 64;  // that one block sums; an image has a partial sum for each

template <typename T>
struct AnchorScoresParams {
  TokenRows<T> rows;   // not yet filled
  float* partial;      // [B, ceil(N / kUnitsSummed), sum_stride] workspace
  float* total;        // [B, sum_stride] workspace: the sum of all unit vectors
  float* density;      // [B, N] by rank: the sum of a token's cosines; NaN where not comparable
  uint32_t* nearest;   // [B, N] by rank: see nearest_rivals_kernel.h
  int64_t sum_stride;  // C or more, a multiple of 8, so that every sum begins where 32 bytes do
  bool denser;         // mode "paper": the rivals of a token are the denser ones
};

// Fills rows, density and nearest.
template <typename T>  // float, __half or __nv_bfloat16
cudaError_t launch_anchor_scores(const AnchorScoresParams<T>& params, cudaStream_t stream);

}  // namespace restore_ext::cuda
