// calibrated_attention where the keys of a row of the batch lie in the pages that its block table
// lists: attention_decode.cpp reads them there.

#include "../contracts/calibrated_attention_paged.h"

#include "../library.h"
#include "attention.h"

namespace restore_ext::cpu {
namespace {

using contract::OptionalTensor;

// [pages, Hkv, page, D], the axes that the loops read; a view.
Tensor heads_first(const Tensor& cache) { return torch::stable::transpose(cache, 1, 2); }

std::tuple<Tensor, Tensor> calibrated_attention_paged_cpu(
    Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor seqlens,
    OptionalTensor log_size, OptionalTensor query_position, OptionalTensor key_position,
    OptionalTensor decay, double softcap, std::optional<double> scale) {
  const contract::CalibratedAttentionPagedSizes size =
      contract::calibrated_attention_paged(query, key_cache, value_cache, block_table, seqlens,
                                           log_size, query_position, key_position, decay, softcap);
  const Tensor out = torch::stable::new_empty(query, {size.B, size.Hq, size.Lq, size.D});
  const Tensor lse = torch::stable::new_empty(query, {size.B, size.Hq, size.Lq}, ScalarType::Float);
  if (size.B * size.Hq * size.Lq == 0) return {out, lse};
  for (auto* t : {&block_table, &seqlens}) *t = torch::stable::contiguous(*t);

  AttentionArguments given{log_size, query_position, key_position, decay, std::nullopt, {}};
  AttentionParams params =
      given.params({.B = size.B,
                    .Hq = size.Hq,
                    .Hkv = size.Hkv,
                    .Lq = size.Lq,
                    .Lk = size.page,  // of a page
                    .D = size.D,
                    .G = size.G,
                    .P = size.P},
                   query, heads_first(key_cache), heads_first(value_cache), softcap, scale);
  params.pages = {
      .page = size.page,
      .block_table = block_table.const_data_ptr<int32_t>(),
      .seqlens = seqlens.const_data_ptr<int32_t>(),
      .most = size.max_pages,
      .pages = size.pages,
  };
  // [pages, page], or [G, pages, page].
  params.key_position.stride_b = size.page;
  if (params.key_position.stride_g) params.key_position.stride_g = size.pages * size.page;
  params.causal = true;
  params.out = out.mutable_data_ptr();
  params.lse = lse.mutable_data_ptr<float>();
  attend_decode(params);
  return {out, lse};
}

}  // namespace

RESTORE_EXT_CPU_BODY(calibrated_attention_paged)

}  // namespace restore_ext::cpu
