// What merge_tokens accepts, and the sizes that follow. Both devices call this and check no more.
#pragma once

#include "require.h"

namespace restore_ext::contract {

struct MergeTokensSizes {
  int64_t B, N, M, C;
};

inline MergeTokensSizes merge_tokens(const Tensor& x, const Tensor& group, int64_t num_groups,
                                     const OptionalTensor& size, const OptionalTensor& position) {
  REQUIRE_RANK(x, 3);
  const int64_t B = x.size(0), N = x.size(1), C = x.size(2);
  REQUIRE_SHAPE(group, B, N);
  REQUIRE_SHAPE(size, B, N);
  REQUIRE_SHAPE(position, B, N);
  REQUIRE(num_groups >= 1, "num_groups must be at least 1, got ", num_groups);

  REQUIRE_FLOATING(x);
  REQUIRE_DTYPE(group, Long);
  REQUIRE_DTYPE(size, Float);
  REQUIRE_DTYPE(position, Long);
  REQUIRE_SAME_DEVICE(x, group);
  REQUIRE_SAME_DEVICE(x, size);
  REQUIRE_SAME_DEVICE(x, position);
  return {.B = B, .N = N, .M = num_groups, .C = C};
}

}  // namespace restore_ext::contract
