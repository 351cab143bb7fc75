// How far a token is from all that were picked, as an integer: the farthest has the largest.
#pragma once

#include "keys.cuh"
#include "token_rows_kernel.h"

namespace restore_ext::cuda {

// Below every distance: a token that cannot be compared comes last, a picked one never.
constexpr uint32_t kPicked = 0, kLast = 1;
constexpr uint32_t kFarthest = 0xffffffffu;  // nothing was picked yet that compares

// A distance is 1 - cosine. The cosine itself, turned round, orders alike and has lost no digits to
// the subtraction; of NaN it is kFarthest, which draws nothing nearer.
__device__ __forceinline__ uint32_t reach_of(float cosine) { return ~ordered(cosine); }

// Before the first pick: how far a token is from its nearest neighbour.
__device__ __forceinline__ uint32_t first_reach(const UnitScale& scale, uint32_t nearest) {
  return scale.inverse == scale.inverse ? ~nearest : kLast;  // 0, no neighbour, is kFarthest
}

// After pick number t, counted from 0: the first pick forgets the nearest neighbours.
__device__ __forceinline__ uint32_t reach_after(uint32_t reach, int t, float cosine_to_pick) {
  if (t == 0 && reach > kLast) reach = kFarthest;
  return min(reach, reach_of(cosine_to_pick));
}

// How many tokens of image b are picked, of `count` valid ones.
__device__ __forceinline__ int picks_taken(const int* budget, int K, int64_t b, int count) {
  return max(min(budget ? budget[b] : K, min(K, count)), 0);
}

}  // namespace restore_ext::cuda
