#include "../contracts/score_anchors.h"

#include "anchor_scores.h"
#include "score_anchors_kernel.h"

namespace restore_ext::cuda {
namespace {

Tensor score_anchors_cuda(const Tensor& x, const std::string& mode, const OptionalTensor& valid) {
  const auto [B, N, C] = contract::score_anchors(x, mode, valid);
  const Launch launch("score_anchors", x);
  Tensor score = empty(x, {B, N}, ScalarType::Float);
  if (B == 0 || N == 0) return score;

  const AnchorScoresOf scores(x, mode, valid);
  dispatch_floating(x, [&]<typename T>() {
    const ScoreAnchorsParams<T> params{.scores = scores.as<T>(), .score = out<float>(score)};
    launch.check(launch_score_anchors(params, launch.stream()));
  });
  return score;
}

}  // namespace

RESTORE_EXT_CUDA_LIBRARY(m) { m.impl("score_anchors", TORCH_BOX(&score_anchors_cuda)); }

}  // namespace restore_ext::cuda
