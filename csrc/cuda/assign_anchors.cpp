#include "../contracts/assign_anchors.h"

#include "assign_anchors_kernel.h"
#include "tokens.h"

namespace restore_ext::cuda {
namespace {

Tensor assign_anchors_cuda(const Tensor& x, const Tensor& anchors, const OptionalTensor& valid) {
  const auto [B, N, C, K] = contract::assign_anchors(x, anchors, valid);
  const Launch launch("assign_anchors", x);
  Tensor group = empty(x, {B, N}, ScalarType::Long);
  if (B == 0 || N == 0) return group;

  const TokenRowsOf tokens(x, valid);
  const Tensor listed = dense(anchors);
  const Tensor anchor_rank = empty(x, {B, K}, ScalarType::Int);
  const Tensor own_slot = empty(x, {B, N}, ScalarType::Int);
  const Tensor first_slot = empty(x, {B}, ScalarType::Int);
  dispatch_floating(x, [&]<typename T>() {
    const AssignAnchorsParams<T> params{
        .rows = tokens.as<T>(),
        .anchors = in<int64_t>(listed),
        .anchor_rank = out<int>(anchor_rank),
        .own_slot = out<int>(own_slot),
        .first_slot = out<int>(first_slot),
        .group = out<int64_t>(group),
        .K = static_cast<int>(K),
    };
    launch.check(launch_token_rows(params.rows, launch.stream()));
    launch.check(launch_assign_anchors(params, launch.stream()));
  });
  return group;
}

}  // namespace

RESTORE_EXT_CUDA_LIBRARY(m) { m.impl("assign_anchors", TORCH_BOX(&assign_anchors_cuda)); }

}  // namespace restore_ext::cuda
