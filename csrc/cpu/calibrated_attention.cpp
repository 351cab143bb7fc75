// Which of the two bodies answers a call: attention_prefill.cpp or attention_decode.cpp.

#include "../library.h"
#include "attention.h"

namespace restore_ext::cpu {
namespace {

using contract::OptionalTensor;

// With fewer rows than this of a key head, packing the keys costs more than it saves.
constexpr int64_t kRowsOfPrefill = 24;

std::tuple<Tensor, Tensor> calibrated_attention_cpu(
    Tensor query, Tensor key, Tensor value, OptionalTensor log_size, OptionalTensor query_position,
    OptionalTensor key_position, OptionalTensor decay, bool causal, OptionalTensor key_range,
    double softcap, std::optional<double> scale) {
  const Sizes size = contract::calibrated_attention(query, key, value, log_size, query_position,
                                                    key_position, decay, key_range, softcap);
  const Tensor out = torch::stable::new_empty(query, {size.B, size.Hq, size.Lq, size.D});
  const Tensor lse = torch::stable::new_empty(query, {size.B, size.Hq, size.Lq}, ScalarType::Float);
  if (size.B * size.Hq * size.Lq == 0) return {out, lse};
  AttentionArguments given{log_size, query_position, key_position, decay, key_range, {}};
  AttentionParams params = given.params(size, query, key, value, softcap, scale);
  params.causal = causal;
  params.out = out.mutable_data_ptr();
  params.lse = lse.mutable_data_ptr<float>();
  if (size.Lq * (size.Hq / size.Hkv) < kRowsOfPrefill) {
    attend_decode(params);
  } else {
    attend_prefill(params, query);
  }
  return {out, lse};
}

}  // namespace

RESTORE_EXT_CPU_BODY(calibrated_attention)

}  // namespace restore_ext::cpu
