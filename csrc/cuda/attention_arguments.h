// From the attention operators' tensors to the kernels' params. Lives until the kernels that read
// them are launched. Read by g++ alone.
#pragma once

#include <cmath>
#include <cstdint>

#include "../contracts/calibrated_attention.h"
#include "calibrated_attention_kernel.h"
#include "entry.h"

namespace restore_ext::cuda {

inline OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(torch::stable::contiguous(*t)) : t;
}

// The same elements where every row begins at a multiple of 16 bytes and is dense, or for a kernel
// that takes rows `anywhere` is dense: where they are, or a copy.
inline Tensor in_packs(const Tensor& t, bool anywhere = false) {
  if (anywhere && t.stride(3) == 1) return t;
  const int64_t vec = t.element_size() == 4 ? 4 : 8;
  bool packs = reinterpret_cast<std::uintptr_t>(t.const_data_ptr()) % 16 == 0 && t.stride(3) == 1;
  for (int dim = 0; dim < 3; ++dim) packs &= t.size(dim) == 1 || t.stride(dim) % vec == 0;
  if (packs) return t;
  Tensor copy = empty(t, {t.size(0), t.size(1), t.size(2), t.size(3)}, t.scalar_type());
  return torch::stable::copy_(copy, t);
}

// Heads are read where they lie, as a rule; the rest is small beside them.
class AttentionArguments {
 public:
  AttentionArguments(const contract::CalibratedAttentionSizes& size, const Tensor& query,
                     const Tensor& key, const OptionalTensor& log_size,
                     const OptionalTensor& query_position, const OptionalTensor& key_position,
                     const OptionalTensor& decay, const OptionalTensor& key_range,
                     bool anywhere = false)
      : size_(size),
        query_(in_packs(query, anywhere)),
        key_(in_packs(key, anywhere)),
        log_size_(contiguous(log_size)),
        decay_(contiguous(decay)),
        key_range_(contiguous(key_range)) {
    if (!decay || !query_position) return;
    if (query_position->dim() == 3 || key_position->dim() == 3) axes_ = size.G;
    query_position_ = on_axes(query_position);
    key_position_ = on_axes(key_position);
  }

  // Without values and outputs, and not causal.
  template <typename T>
  CalibratedAttentionParams<T> params(double softcap, std::optional<double> scale) const {
    return {
        .query = in<T>(query_),
        .key = in<T>(key_),
        .value = nullptr,
        .log_size = in<float>(log_size_),
        .query_position = in<int32_t>(query_position_),
        .key_position = in<int32_t>(key_position_),
        .decay = in<float>(decay_),
        .key_range = in<int32_t>(key_range_),
        .out = nullptr,
        .lse = nullptr,
        .query_stride = strides(query_),
        .key_stride = strides(key_),
        .value_stride = {},
        .B = static_cast<int>(size_.B),
        .Hq = static_cast<int>(size_.Hq),
        .Hkv = static_cast<int>(size_.Hkv),
        .Lq = static_cast<int>(size_.Lq),
        .Lk = static_cast<int>(size_.Lk),
        .D = static_cast<int>(size_.D),
        .G = static_cast<int>(size_.G),
        .Gp = static_cast<int>(axes_),
        .P = static_cast<int>(size_.P),
        .causal = false,
        .softcap = static_cast<float>(softcap),
        .scale = static_cast<float>(scale.value_or(1 / std::sqrt(static_cast<double>(size_.D)))),
    };
  }

  static HeadStrides strides(const Tensor& t) {  // of a single one there is no next
    const auto stride = [&](int dim) { return t.size(dim) == 1 ? t.size(3) : t.stride(dim); };
    return {stride(0), stride(1), stride(2)};
  }

 private:
  // [B, L] as [B, axes, L].
  OptionalTensor on_axes(const OptionalTensor& position) const {
    if (position->dim() == 3 || axes_ == 1) return contiguous(position);
    Tensor wide = empty(*position, {position->size(0), axes_, position->size(1)}, ScalarType::Int);
    return torch::stable::copy_(wide, torch::stable::unsqueeze(*position, 1));
  }

  contract::CalibratedAttentionSizes size_;
  int64_t axes_ = 1;
  Tensor query_, key_;
  OptionalTensor log_size_, query_position_, key_position_, decay_, key_range_;
};

}  // namespace restore_ext::cuda
