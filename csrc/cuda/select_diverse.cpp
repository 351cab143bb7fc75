#include "../contracts/select_diverse.h"

#include <algorithm>

#include "select_diverse_kernel.h"
#include "tokens.h"

namespace restore_ext::cuda {
namespace {

Tensor select_diverse_cuda(const Tensor& x, int64_t k, const OptionalTensor& budget,
                           const OptionalTensor& valid) {
  const auto [B, N, C, K] = contract::select_diverse(x, k, budget, valid);
  const Launch launch("select_diverse", x);
  Tensor picks = empty(x, {B, K}, ScalarType::Long);
  if (B == 0 || K == 0) return picks;

  const TokenRowsOf tokens(x, valid);
  const OptionalTensor budgets = dense(budget);
  const int64_t cosine_stride = (N + 3) / 4 * 4;
  const int64_t kept = std::min(B, kMostCosineBytes / (4 * N * cosine_stride));
  const int64_t stepped = kept > 0 ? 0 : B;
  const Tensor nearest = empty(x, {B, N}, ScalarType::Int);
  const Tensor cosines = empty(x, {kept, N, cosine_stride}, ScalarType::Float);
  const Tensor reach = empty(x, {stepped, N}, ScalarType::Int);
  const Tensor best = empty(x, {stepped, K}, ScalarType::Long);
  dispatch_floating(x, [&]<typename T>() {
    const SelectDiverseParams<T> params{
        .rows = tokens.as<T>(),
        .budget = in<int>(budgets),
        .nearest = out<uint32_t>(nearest),
        .cosines = kept > 0 ? out<float>(cosines) : nullptr,
        .reach = stepped > 0 ? out<uint32_t>(reach) : nullptr,
        .best = stepped > 0 ? out<unsigned long long>(best) : nullptr,
        .picks = out<int64_t>(picks),
        .cosine_stride = cosine_stride,
        .K = static_cast<int>(K),
        .kept = static_cast<int>(kept),
    };
    launch.check(launch_select_diverse(params, launch.stream()));
  });
  return picks;
}

}  // namespace

RESTORE_EXT_CUDA_LIBRARY(m) { m.impl("select_diverse", TORCH_BOX(&select_diverse_cuda)); }

}  // namespace restore_ext::cuda
