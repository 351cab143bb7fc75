#include "../contracts/select_anchors.h"

#include "anchor_scores.h"
#include "select_anchors_kernel.h"

namespace restore_ext::cuda {
namespace {

Tensor select_anchors_cuda(const Tensor& x, int64_t k, const OptionalTensor& budget,
                           const std::string& mode, const OptionalTensor& valid) {
  const auto [B, N, C, K] = contract::select_anchors(x, k, budget, mode, valid);
  const Launch launch("select_anchors", x);
  Tensor anchors = empty(x, {B, K}, ScalarType::Long);
  if (B == 0 || K == 0) return anchors;

  const AnchorScoresOf scores(x, mode, valid);
  const OptionalTensor budgets = dense(budget);
  dispatch_floating(x, [&]<typename T>() {
    const SelectAnchorsParams<T> params{
        .scores = scores.as<T>(),
        .budget = in<int>(budgets),
        .anchors = out<int64_t>(anchors),
        .K = static_cast<int>(K),
    };
    launch.check(launch_select_anchors(params, launch.stream()));
  });
  return anchors;
}

}  // namespace

RESTORE_EXT_CUDA_LIBRARY(m) { m.impl("select_anchors", TORCH_BOX(&select_anchors_cuda)); }

}  // namespace restore_ext::cuda
