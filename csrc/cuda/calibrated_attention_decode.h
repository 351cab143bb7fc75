// Decode attention as the entries launch it: with its workspaces. Read by g++ alone.
#pragma once

#include "calibrated_attention_decode_kernel.h"
#include "calibrated_attention_kernel.h"
#include "entry.h"

namespace restore_ext::cuda {

template <typename T>
cudaError_t decode(CalibratedAttentionDecodeParams<T> params, const Tensor& like,
                   cudaStream_t stream) {
  const DecodePlan plan = plan_calibrated_attention_decode(params);
  const Tensor parts = empty(like, {plan.parts}, ScalarType::Float);
  const Tensor arrived = empty(like, {plan.parts ? plan.units : 0}, ScalarType::Int);
  params.parts = out<float>(parts);
  params.arrived = out<int>(arrived);
  return launch_calibrated_attention_decode(params, plan, stream);
}

// A cache in a row is one of B pages, each as long as the row.
template <typename T>
CalibratedAttentionDecodeParams<T> decode_params(const CalibratedAttentionParams<T>& p) {
  const auto strides = [](const HeadStrides& s) { return CacheStrides{s.b, s.h, s.l, 1}; };
  const auto axis = [&](int64_t L) { return AxisStrides{p.Gp * L, p.Gp > 1 ? L : 0}; };
  return {
      .query = p.query,
      .key = p.key,
      .value = p.value,
      .block_table = nullptr,
      .seqlens = nullptr,
      .log_size = p.log_size,
      .query_position = p.query_position,
      .key_position = p.key_position,
      .decay = p.decay,
      .key_range = p.key_range,
      .out = p.out,
      .lse = p.lse,
      .query_stride = strides(p.query_stride),
      .key_stride = strides(p.key_stride),
      .value_stride = strides(p.value_stride),
      .query_axis = axis(p.Lq),
      .key_axis = axis(p.Lk),
      .B = p.B,
      .Hq = p.Hq,
      .Hkv = p.Hkv,
      .Lq = p.Lq,
      .D = p.D,
      .pages = p.B,
      .page = p.Lk,
      .max_pages = 1,
      .G = p.G,
      .P = p.P,
      .causal = p.causal,
      .softcap = p.softcap,
      .scale = p.scale,
      .parts = nullptr,
      .arrived = nullptr,
  };
}

}  // namespace restore_ext::cuda
