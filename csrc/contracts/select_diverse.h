// What select_diverse accepts, and the sizes that follow. Both devices call this and check no more.
#pragma once

#include "require.h"

namespace restore_ext::contract {

struct SelectDiverseSizes {
  int64_t B, N, C, K;
};

inline SelectDiverseSizes select_diverse(const Tensor& x, int64_t k, const OptionalTensor& budget,
                                         const OptionalTensor& valid) {
  REQUIRE_RANK(x, 3);
  const int64_t B = x.size(0), N = x.size(1), C = x.size(2);
  REQUIRE_SHAPE(budget, B);
  REQUIRE_SHAPE(valid, B, N);
  REQUIRE_AT_MOST(k, N);

  REQUIRE_FLOATING(x);
  REQUIRE_DTYPE(budget, Int);
  REQUIRE_DTYPE(valid, Bool);
  REQUIRE_SAME_DEVICE(x, budget);
  REQUIRE_SAME_DEVICE(x, valid);
  return {.B = B, .N = N, .C = C, .K = k};
}

}  // namespace restore_ext::contract
