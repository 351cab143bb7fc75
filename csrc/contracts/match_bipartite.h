// What match_bipartite accepts, and the sizes that follow. Both devices call this and check no
// more.
#pragma once

#include <algorithm>

#include "require.h"

namespace restore_ext::contract {

struct MatchBipartiteSizes {
  int64_t B, N, C;
  int64_t U, R;  // widths of the outputs: even tokens left, pairs taken
};

inline MatchBipartiteSizes match_bipartite(const Tensor& metric, int64_t r,
                                           const OptionalTensor& budget,
                                           const OptionalTensor& valid, bool class_token) {
  REQUIRE_RANK(metric, 3);
  const int64_t B = metric.size(0), N = metric.size(1), C = metric.size(2);
  REQUIRE_SHAPE(budget, B);
  REQUIRE_SHAPE(valid, B, N);
  REQUIRE(r >= 0, "r must not be negative, got ", r);

  REQUIRE_FLOATING(metric);
  REQUIRE_DTYPE(budget, Int);
  REQUIRE_DTYPE(valid, Bool);
  REQUIRE_SAME_DEVICE(metric, budget);
  REQUIRE_SAME_DEVICE(metric, valid);

  const int64_t R = std::max<int64_t>(std::min(r, (N - class_token) / 2), 0);
  // Where rows differ nobody knows how many even tokens each has left, so there is room for all.
  const int64_t half = (N + 1) / 2, U = budget || valid ? half : half - R;
  return {.B = B, .N = N, .C = C, .U = U, .R = R};
}

}  // namespace restore_ext::contract
