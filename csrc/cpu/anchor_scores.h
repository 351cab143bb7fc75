// The arithmetic that score_anchors and select_anchors share.
#pragma once

#include <vector>

#include "rows.h"

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
  each(n, C, [&](int64_t i) { density[i] = dot(rows[i], total.data(), C); });
  return density;
}

// RESTORE, Eq. 5. Every pair is compared once at most: one of the two is the denser.
inline std::vector<float> anchor_scores(const UnitRows& rows, bool against_denser) {
  const std::vector<float> density = densities(rows);
  std::vector<float> score(rows.n, kNever);
  each(rows.n, rows.n * rows.C / 2, [&](int64_t i) {
    if (!rows.comparable[i]) return;
    float nearest = kNever;
    for (int64_t j = 0; j < rows.n; ++j) {
      const bool rival = against_denser ? density[j] > density[i] : density[j] < density[i];
      if (rival) nearest = std::max(nearest, rows.similarity(i, j));
    }
    score[i] = nearest == kNever ? density[i] : density[i] * (1 - nearest);
  });
  return score;
}

}  // namespace restore_ext::cpu
