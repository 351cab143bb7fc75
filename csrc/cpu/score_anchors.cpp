#include "../contracts/score_anchors.h"
#include "../library.h"

#include "anchor_scores.h"

namespace restore_ext::cpu {
namespace {

Tensor score_anchors_cpu(const Tensor& x, const std::string& mode,
                         const std::optional<Tensor>& valid) {
  const auto [B, N, C] = contract::score_anchors(x, mode, valid);
  Tensor score = torch::stable::new_empty(x, {B, N}, ScalarType::Float);
  float* out = score.mutable_data_ptr<float>();
  std::fill_n(out, B * N, kNever);

  const Tokens tokens(x);
  for (int64_t b = 0; b < B; ++b) {
    const UnitRows rows(tokens, N, valid, b);
    const std::vector<float> scores = anchor_scores(rows, /*against_denser=*/mode == "paper");
    for (int64_t i = 0; i < rows.n; ++i) out[b * N + rows.token[i]] = scores[i];
  }
  return score;
}

}  // namespace

RESTORE_EXT_CPU_BODY(score_anchors)

}  // namespace restore_ext::cpu
