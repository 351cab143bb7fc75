// The arithmetic that score_anchors and select_anchors share.
#pragma once

#include <vector>

#include "similarity.h"

namespace restore_ext::cpu {

// density_i = u_i . (sum of all u_j), which is the sum of i's similarities without computing them.
inline std::vector<float> densities(const UnitRows& rows) {
  const int64_t n = rows.n, C = rows.C;
  std::vector<double> sum(C);  // double: what tells two densities apart is small beside them
  torch::stable::parallel_for(0, C, grain(n), [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t c = begin; c < end; ++c) sum[c] += rows[i][c];
    }
  });
  const std::vector<float> total(sum.begin(), sum.end());
  std::vector<float> density(n);
  kernels().dot_rows(total.data(), rows.units.get(), C, n, C, density.data());
  return density;
}

// RESTORE, Eq. 5.
inline std::vector<float> anchor_scores(const UnitRows& rows, bool against_denser) {
  const std::vector<float> density = densities(rows);
  std::vector<float> rank = density;
  if (!against_denser) {
    for (float& x : rank) x = -x;
  }
  const std::vector<float> closest = nearest(rows, std::move(rank), /*all=*/false);
  std::vector<float> score(rows.n, kNever);
  for (int64_t i = 0; i < rows.n; ++i) {
    if (!rows.comparable[i]) continue;
    score[i] = closest[i] == kNever ? density[i] : density[i] * (1 - closest[i]);
  }
  return score;
}

}  // namespace restore_ext::cpu
