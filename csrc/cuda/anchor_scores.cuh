// The score of a token from its two terms.
#pragma once

#include "keys.cuh"

namespace restore_ext::cuda {

// RESTORE, Eq. 5. nearest is `ordered` of the largest cosine with a rival, 0 where there is none:
// then the factor is 1. A token that compares with none has a density that is NaN.
__device__ __forceinline__ float anchor_score(float density, uint32_t nearest) {
  if (density != density) return -INFINITY;
  return nearest == 0 ? density : density * (1.f - from_ordered(nearest));
}

}  // namespace restore_ext::cuda
