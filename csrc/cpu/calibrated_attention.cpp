// Which of the two bodies answers a call: attention_prefill.cpp or attention_decode.cpp.

#include "../library.h"
#include "attention.h"

namespace restore_ext::cpu {
namespace {

using contract::OptionalTensor;

// With fewer rows than this of a key head, packing the keys costs more than it saves.
constexpr int64_t kRowsOfPrefill = 24;

Positions positions(const OptionalTensor& t, int64_t L, int64_t G, int64_t start) {
  if (!t) return {nullptr, 0, 0, start};
  const bool has_axes = t->dim() == 3;
  return {t->const_data_ptr<int32_t>(), has_axes ? G * L : L, has_axes ? L : 0, 0};
}

OptionalTensor dense(const OptionalTensor& t) {
  if (!t) return std::nullopt;
  return torch::stable::contiguous(*t);
}

std::tuple<Tensor, Tensor> calibrated_attention_cpu(
    Tensor query, Tensor key, Tensor value, OptionalTensor log_size, OptionalTensor query_position,
    OptionalTensor key_position, OptionalTensor decay, bool causal, OptionalTensor key_range,
    double softcap, std::optional<double> scale) {
  const Sizes size = contract::calibrated_attention(query, key, value, log_size, query_position,
                                                    key_position, decay, key_range, softcap);
  const Tensor out = torch::stable::new_empty(query, {size.B, size.Hq, size.Lq, size.D});
  const Tensor lse = torch::stable::new_empty(query, {size.B, size.Hq, size.Lq}, ScalarType::Float);
  if (size.B * size.Hq * size.Lq == 0) return {out, lse};
  // Small beside the heads, which are read where they lie.
  for (auto* t : {&log_size, &query_position, &key_position, &decay, &key_range}) *t = dense(*t);

  // With one axis there are few distances and many pairs: their logarithms are taken once.
  const bool decay_is_log = decay && size.G == 1;
  std::vector<float> log_decay(decay_is_log ? size.P : 0);
  for (size_t distance = 0; distance < log_decay.size(); ++distance) {
    log_decay[distance] = std::log(2.f - decay->const_data_ptr<float>()[distance]);
  }
  const AttentionParams params{
      .size = size,
      .query = Heads(query),
      .key = Heads(key),
      .value = Heads(value),
      .log_size = log_size ? log_size->const_data_ptr<float>() : nullptr,
      .query_position = positions(query_position, size.Lq, size.G, size.Lk - size.Lq),
      .key_position = positions(key_position, size.Lk, size.G, 0),
      .decay = decay_is_log ? log_decay.data()
               : decay      ? decay->const_data_ptr<float>()
                            : nullptr,
      .decay_is_log = decay_is_log,
      .key_range = key_range ? key_range->const_data_ptr<int32_t>() : nullptr,
      .causal = causal,
      .softcap = static_cast<float>(softcap),
      .scale = static_cast<float>(scale.value_or(1 / std::sqrt(static_cast<double>(size.D)))),
      .out = out.mutable_data_ptr(),
      .lse = lse.mutable_data_ptr<float>(),
  };
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
