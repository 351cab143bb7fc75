#include "../contracts/merge_tokens.h"

#include "entry.h"
#include "merge_tokens_kernel.h"

namespace restore_ext::cuda {
namespace {

OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(torch::stable::contiguous(*t)) : t;
}

std::tuple<Tensor, Tensor, Tensor> merge_tokens_cuda(const Tensor& x, const Tensor& group,
                                                     int64_t num_groups, const OptionalTensor& size,
                                                     const OptionalTensor& position) {
  const auto [B, N, M, C] = contract::merge_tokens(x, group, num_groups, size, position);
  const Launch launch("merge_tokens", x);
  Tensor merged = empty(x, {B, M, C}, x.scalar_type());
  Tensor merged_size = empty(x, {B, M}, ScalarType::Float);
  Tensor merged_position = empty(x, {B, M}, ScalarType::Long);
  if (B == 0) return {merged, merged_size, merged_position};

  const Tensor rows = x.stride(2) == 1 ? x : torch::stable::contiguous(x);
  const Tensor ids = torch::stable::contiguous(group);
  const OptionalTensor sizes = contiguous(size), positions = contiguous(position);
  Tensor first = empty(x, {B, M + 1}, ScalarType::Int);
  Tensor member = empty(x, {B, N}, ScalarType::Int);
  const int64_t chunks = N > kMergeChunk ? (N + kMergeChunk - 1) / kMergeChunk : 0;
  Tensor partial = empty(x, {B, 2, chunks, C}, ScalarType::Float);
  dispatch_floating(x, [&]<typename T>() {
    const MergeTokensParams<T> params{
        .x = in<T>(rows),
        .x_stride_b = rows.stride(0),
        .x_stride_n = rows.stride(1),
        .size = in<float>(sizes),
        .position = in<int64_t>(positions),
        .partial = out<float>(partial),
        .merged = out<T>(merged),
        .merged_size = out<float>(merged_size),
        .merged_position = out<int64_t>(merged_position),
        .C = static_cast<int>(C),
        .groups = {.group = in<int64_t>(ids),
                   .first = out<int>(first),
                   .member = out<int>(member),
                   .B = static_cast<int>(B),
                   .N = static_cast<int>(N),
                   .M = static_cast<int>(M)},
    };
    launch.check(launch_merge_tokens(params, launch.stream()));
  });
  return {merged, merged_size, merged_position};
}

}  // namespace

RESTORE_EXT_CUDA_LIBRARY(m) { m.impl("merge_tokens", TORCH_BOX(&merge_tokens_cuda)); }

}  // namespace restore_ext::cuda
