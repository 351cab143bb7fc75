// Which of many keys are the k largest: found by one block, without a sort.
#pragma once

#include "launch.cuh"

namespace restore_ext::cuda {

// The k largest keys are all above `least`, and the first `equal` of those that are `least`.
struct TopK {
  uint32_t least;
  int equal;
};

struct alignas(16) DigitCounts {
  int of[256];
};

// Digit by digit from the top, the one in which the k-th largest of keys[0 ... n - 1] lies. All
// threads of the block call it, whole warps; 1 <= k <= n. The keys are read four times; counts are
// whole numbers, so nothing depends on how many threads there are or who comes first.
__device__ __forceinline__ TopK top_k(const uint32_t* keys, int n, int k) {
  STATIC_SHARED(DigitCounts, counts);
  constexpr unsigned kAllLanes = 0xffffffffu;
  const int lane = threadIdx.x % 32, threads = static_cast<int>(blockDim.x);
  uint32_t least = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int d = threadIdx.x; d < 256; d += threads) counts.of[d] = 0;
    __syncthreads();
    for (int first = static_cast<int>(threadIdx.x) - lane; first < n; first += threads) {
      const uint32_t key = first + lane < n ? keys[first + lane] : 0;
      // Only keys that agree with `least` in all digits above this one.
      const bool agrees = first + lane < n && (uint64_t{key ^ least} >> shift) < 256;
      const int digit = agrees ? static_cast<int>(key >> shift & 0xff) : -1;
      // Most keys share their first digits: one lane counts for all that have the same.
      const unsigned same = __match_any_sync(kAllLanes, digit);
      if (agrees && __ffs(same) - 1 == lane) atomicAdd(&counts.of[digit], __popc(same));
    }
    __syncthreads();

    // Every warp finds the digit by itself: lane l has the digits 255 - 8 l ... 248 - 8 l.
    const int4* four = reinterpret_cast<const int4*>(counts.of);
    const int4 high = four[63 - 2 * lane], low = four[62 - 2 * lane];
    const int falling[8] = {high.w, high.z, high.y, high.x, low.w, low.z, low.y, low.x};
    int own = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) own += falling[i];
    int before = own;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int lower = __shfl_up_sync(kAllLanes, before, d);
      if (lane >= d) before += lower;
    }
    const bool here = before >= k && before - own < k;
    before -= own;
    int digit = 0, left = k;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (before < k && before + falling[i] >= k) {
        digit = 255 - 8 * lane - i;
        left = k - before;
      }
      before += falling[i];
    }
    const int finder = __ffs(__ballot_sync(kAllLanes, here)) - 1;
    least |= static_cast<uint32_t>(__shfl_sync(kAllLanes, digit, finder)) << shift;
    k = __shfl_sync(kAllLanes, left, finder);
    __syncthreads();  // all have read the counts
  }
  return {least, k};
}

}  // namespace restore_ext::cuda
