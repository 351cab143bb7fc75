// What assign_anchors accepts, and the sizes that follow. Both devices call this and check no more.
#pragma once

#include "require.h"

namespace restore_ext::contract {

struct AssignAnchorsSizes {
  int64_t B, N, C, K;
};

inline AssignAnchorsSizes assign_anchors(const Tensor& x, const Tensor& anchors,
                                         const OptionalTensor& valid) {
  REQUIRE_RANK(x, 3);
  REQUIRE_RANK(anchors, 2);
  const int64_t B = x.size(0), N = x.size(1), C = x.size(2), K = anchors.size(1);
  REQUIRE_SHAPE(anchors, B, K);
  REQUIRE_SHAPE(valid, B, N);

  REQUIRE_FLOATING(x);
  REQUIRE_DTYPE(anchors, Long);
  REQUIRE_DTYPE(valid, Bool);
  REQUIRE_SAME_DEVICE(x, anchors);
  REQUIRE_SAME_DEVICE(x, valid);
  return {.B = B, .N = N, .C = C, .K = K};
}

}  // namespace restore_ext::contract
