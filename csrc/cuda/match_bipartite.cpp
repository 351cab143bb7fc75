#include "../contracts/match_bipartite.h"

#include "match_bipartite_kernel.h"
#include "tokens.h"

namespace restore_ext::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> match_bipartite_cuda(const Tensor& metric, int64_t r,
                                                        const OptionalTensor& budget,
                                                        const OptionalTensor& valid,
                                                        bool class_token) {
  const auto [B, N, C, U, R] = contract::match_bipartite(metric, r, budget, valid, class_token);
  const Launch launch("match_bipartite", metric);
  Tensor unmerged = empty(metric, {B, U}, ScalarType::Long);
  Tensor src = empty(metric, {B, R}, ScalarType::Long);
  Tensor dst = empty(metric, {B, R}, ScalarType::Long);
  if (B == 0 || N == 0) return {unmerged, src, dst};

  const TokenRowsOf tokens(metric, valid);
  const OptionalTensor budgets = dense(budget);
  const Tensor best = empty(metric, {B, (N + 1) / 2}, ScalarType::Long);
  const OptionalTensor order =
      class_token ? OptionalTensor(empty(metric, {B, (N + 1) / 2}, ScalarType::Int)) : std::nullopt;
  dispatch_floating(metric, [&]<typename T>() {
    const MatchBipartiteParams<T> params{
        .rows = tokens.as<T>(),
        .budget = in<int>(budgets),
        .best = out<unsigned long long>(best),
        .order = order ? out<int>(*order) : nullptr,
        .unmerged = out<int64_t>(unmerged),
        .src = out<int64_t>(src),
        .dst = out<int64_t>(dst),
        .U = static_cast<int>(U),
        .R = static_cast<int>(R),
        .class_token = class_token,
    };
    launch.check(launch_token_rows(params.rows, launch.stream()));
    launch.check(launch_match_bipartite(params, launch.stream()));
  });
  return {unmerged, src, dst};
}

}  // namespace

RESTORE_EXT_CUDA_LIBRARY(m) { m.impl("match_bipartite", TORCH_BOX(&match_bipartite_cuda)); }

}  // namespace restore_ext::cuda
