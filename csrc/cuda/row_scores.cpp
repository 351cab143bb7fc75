#include "../contracts/row_scores.h"

#include "attention_arguments.h"
#include "row_scores_kernel.h"

namespace restore_ext::cuda {
namespace {

Tensor row_scores_cuda(const Tensor& query, const Tensor& key, const OptionalTensor& weight,
                       const OptionalTensor& log_size, const OptionalTensor& query_position,
                       const OptionalTensor& key_position, const OptionalTensor& decay,
                       const OptionalTensor& key_range, double softcap,
                       std::optional<double> scale) {
  const auto size = contract::row_scores(query, key, weight, log_size, query_position, key_position,
                                         decay, key_range, softcap);
  const Launch launch("row_scores", query);
  Tensor score = empty(key, {size.B, size.Lk}, ScalarType::Float);
  if (size.B == 0 || size.Lk == 0) return score;

  const AttentionArguments given(size, query, key, log_size, query_position, key_position, decay,
                                 key_range);
  const OptionalTensor weights = contiguous(weight);
  dispatch_floating(query, [&]<typename T>() {
    RowScoresParams<T> params{
        .attention = given.params<T>(softcap, scale),
        .weight = in<float>(weights),
        .score = out<float>(score),
        .sums = nullptr,
        .parts = nullptr,
        .arrived = nullptr,
    };
    const RowScoresPlan plan = plan_row_scores(params);
    const Tensor sums = empty(key, {plan.sums, 2}, ScalarType::Float);
    const Tensor parts = empty(key, {plan.parts}, ScalarType::Float);
    const Tensor arrived = empty(key, {plan.parts ? plan.key_tiles : 0}, ScalarType::Int);
    params.sums = out<RowSums>(sums);
    params.parts = out<float>(parts);
    params.arrived = out<int>(arrived);
    launch.check(launch_row_scores(params, plan, launch.stream()));
  });
  return score;
}

}  // namespace

RESTORE_EXT_CUDA_LIBRARY(m) { m.impl("row_scores", TORCH_BOX(&row_scores_cuda)); }

}  // namespace restore_ext::cuda
