#include "../contracts/calibrated_attention_paged.h"

#include <cmath>
#include <tuple>

#include "calibrated_attention_decode.h"
#include "entry.h"

namespace restore_ext::cuda {
namespace {

CacheStrides strides(const Tensor& t, int outer, int h, int l) {
  return {t.stride(outer), t.stride(h), t.stride(l), t.stride(3)};
}

std::tuple<Tensor, Tensor> calibrated_attention_paged_cuda(
    const Tensor& query, const Tensor& key_cache, const Tensor& value_cache, Tensor block_table,
    Tensor seqlens, OptionalTensor log_size, OptionalTensor query_position,
    OptionalTensor key_position, OptionalTensor decay, double softcap,
    std::optional<double> scale) {
  const auto size =
      contract::calibrated_attention_paged(query, key_cache, value_cache, block_table, seqlens,
                                           log_size, query_position, key_position, decay, softcap);
  const Launch launch("calibrated_attention_paged", query);
  Tensor attended = empty(query, {size.B, size.Hq, size.Lq, size.D}, query.scalar_type());
  Tensor lse = empty(query, {size.B, size.Hq, size.Lq}, ScalarType::Float);
  // Small beside the caches, which are read where they lie.
  for (auto* t : {&log_size, &query_position, &key_position, &decay}) {
    if (*t) *t = torch::stable::contiguous(**t);
  }
  for (auto* t : {&block_table, &seqlens}) *t = torch::stable::contiguous(*t);
  // A position without axes is the same on each.
  const bool query_axes = query_position && query_position->dim() == 3;
  const bool key_axes = key_position && key_position->dim() == 3;

  dispatch_floating(query, [&]<typename T>() {
    const CalibratedAttentionDecodeParams<T> params{
        .query = in<T>(query),
        .key = in<T>(key_cache),
        .value = in<T>(value_cache),
        .block_table = in<int32_t>(block_table),
        .seqlens = in<int32_t>(seqlens),
        .log_size = in<float>(log_size),
        .query_position = in<int32_t>(query_position),
        .key_position = in<int32_t>(key_position),
        .decay = in<float>(decay),
        .key_range = nullptr,
        .out = out<T>(attended),
        .lse = out<float>(lse),
        .query_stride = strides(query, 0, 1, 2),
        .key_stride = strides(key_cache, 0, 2, 1),
        .value_stride = strides(value_cache, 0, 2, 1),
        .query_axis = {query_axes ? size.G * size.Lq : size.Lq, query_axes ? size.Lq : 0},
        .key_axis = {size.page, key_axes ? size.pages * size.page : 0},
        .B = static_cast<int>(size.B),
        .Hq = static_cast<int>(size.Hq),
        .Hkv = static_cast<int>(size.Hkv),
        .Lq = static_cast<int>(size.Lq),
        .D = static_cast<int>(size.D),
        .pages = static_cast<int>(size.pages),
        .page = static_cast<int>(size.page),
        .max_pages = static_cast<int>(size.max_pages),
        .G = static_cast<int>(size.G),
        .P = static_cast<int>(size.P),
        .causal = true,
        .softcap = static_cast<float>(softcap),
        .scale = static_cast<float>(scale.value_or(1 / std::sqrt(static_cast<double>(size.D)))),
        .parts = nullptr,
        .arrived = nullptr,
    };
    launch.check(decode(params, query, launch.stream()));
  });
  return {attended, lse};
}

}  // namespace

RESTORE_EXT_CUDA_LIBRARY(m) {
  m.impl("calibrated_attention_paged", TORCH_BOX(&calibrated_attention_paged_cuda));
}

}  // namespace restore_ext::cuda
