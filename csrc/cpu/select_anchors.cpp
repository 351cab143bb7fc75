#include "../contracts/select_anchors.h"
#include "../library.h"

#include "anchor_scores.h"

namespace restore_ext::cpu {
namespace {

Tensor select_anchors_cpu(const Tensor& x, int64_t k, const std::optional<Tensor>& budget,
                          const std::string& mode, const std::optional<Tensor>& valid) {
  const auto [B, N, C, K] = contract::select_anchors(x, k, budget, mode, valid);
  Tensor anchors = torch::stable::new_empty(x, {B, K}, ScalarType::Long);
  int64_t* out = anchors.mutable_data_ptr<int64_t>();
  std::fill_n(out, B * K, -1);

  const Tokens tokens(x);
  const Budget allowed(K, budget);
  for (int64_t b = 0; b < B; ++b) {
    const UnitRows rows(tokens, N, valid, b);
    const std::vector<float> scores = anchor_scores(rows, /*against_denser=*/mode == "paper");
    std::vector<int64_t> best = falling(scores, 0, rows.n);
    best.resize(allowed(b, rows.n));
    std::sort(best.begin(), best.end());
    for (const int64_t i : best) *out++ = rows.token[i];
    out += K - static_cast<int64_t>(best.size());
  }
  return anchors;
}

}  // namespace

RESTORE_EXT_CPU_BODY(select_anchors)

}  // namespace restore_ext::cpu
