#include "../contracts/match_bipartite.h"
#include "../library.h"

#include <tuple>

#include "similarity.h"

namespace restore_ext::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor> match_bipartite_cpu(const Tensor& metric, int64_t r,
                                                       const std::optional<Tensor>& budget,
                                                       const std::optional<Tensor>& valid,
                                                       bool class_token) {
  const auto [B, N, C, U, R] = contract::match_bipartite(metric, r, budget, valid, class_token);
  const auto indices = [&](int64_t width) {
    Tensor t = torch::stable::new_empty(metric, {B, width}, ScalarType::Long);
    std::fill_n(t.mutable_data_ptr<int64_t>(), B * width, -1);
    return t;
  };
  Tensor unmerged = indices(U), src = indices(R), dst = indices(R);

  const Tokens tokens(metric);
  const Budget allowed(R, budget);
  for (int64_t b = 0; b < B; ++b) {
    int64_t* unmerged_b = unmerged.mutable_data_ptr<int64_t>() + b * U;
    int64_t* src_b = src.mutable_data_ptr<int64_t>() + b * R;
    int64_t* dst_b = dst.mutable_data_ptr<int64_t>() + b * R;

    const UnitRows rows(tokens, N, valid, b);
    // Every even row's most similar odd row. Rows 0, 2, 4, ... are even 0, 1, 2, ...
    const Nearest match({rows, 0, 2, (rows.n + 1) / 2}, {rows, 1, 2, rows.n / 2});
    std::vector<int64_t> order = falling(match.similarity, class_token, (rows.n + 1) / 2);
    const int64_t take = allowed(b, (rows.n - class_token) / 2);
    for (int64_t t = 0; t < take; ++t) {
      src_b[t] = rows.token[2 * order[t]];
      dst_b[t] = rows.token[2 * match.column[order[t]] + 1];
    }
    order.erase(order.begin(), order.begin() + take);
    if (class_token && rows.n > 0) {
      order.push_back(0);
      std::sort(order.begin(), order.end());
    }
    for (const int64_t even : order) *unmerged_b++ = rows.token[2 * even];
  }
  return {unmerged, src, dst};
}

}  // namespace

RESTORE_EXT_CPU_BODY(match_bipartite)

}  // namespace restore_ext::cpu
