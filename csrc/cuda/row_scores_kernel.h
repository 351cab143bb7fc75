// The face of the row_scores kernels: what they take and how to launch them. Known to g++ and nvcc.
#pragma once

#include "calibrated_attention_kernel.h"

namespace restore_ext::cuda {

// Of a row, or of a part of it: the maximum of its logits, and the sum of exp(logit - maximum).
struct RowSums {
  float max, sum;
};

template <typename T>
struct RowScoresParams {
  CalibratedAttentionParams<T> attention;  // of R = Lq rows and K = Lk keys; not causal, no values
  const float* weight;                     // [B, R] or nullptr: 1 / R each
  float* score;                            // [B, K]
  RowSums* sums;                           // [B, Hq, R, plan.row_splits] workspace
  float* parts;                            // [B, plan.key_splits, K] workspace, where there are two
  int* arrived;                            // [plan.key_tiles] workspace with it
};

// Follows from what the host knows: the same in every replay of a graph.
struct RowScoresPlan {
  int64_t row_tiles;    // B * Hkv * tiles of the rows that share a key head
  int row_splits;       // of the keys that a tile of rows meets, one block each
  int64_t key_tiles;    // B * tiles of keys
  int key_splits;       // of the tiles of rows that a tile of keys meets, one block each
  int64_t sums, parts;  // elements of the workspaces
};

template <typename T>  // float, __half or __nv_bfloat16; all of params but the workspaces
RowScoresPlan plan_row_scores(const RowScoresParams<T>& params);

// Any head size and number of rows; pointers and strides in packs of 16 bytes, keys not empty.
template <typename T>
cudaError_t launch_row_scores(const RowScoresParams<T>& params, const RowScoresPlan& plan,
                              cudaStream_t stream);

}  // namespace restore_ext::cuda
