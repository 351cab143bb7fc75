#include "../contracts/calibrated_attention.h"

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <string_view>
#include <tuple>
#include <type_traits>

#include "calibrated_attention_decode.h"
#include "calibrated_attention_kernel.h"
#include "entry.h"

namespace restore_ext::cuda {
namespace {

constexpr const char* kOp = "calibrated_attention";

// The same elements where every row begins at a multiple of 16 bytes and is dense: where they are,
// or a copy.
Tensor in_packs(const Tensor& t) {
  const int64_t vec = t.element_size() == 4 ? 4 : 8;
  bool packs = reinterpret_cast<std::uintptr_t>(t.const_data_ptr()) % 16 == 0 && t.stride(3) == 1;
  for (int dim = 0; dim < 3; ++dim) packs &= t.size(dim) == 1 || t.stride(dim) % vec == 0;
  if (packs) return t;
  Tensor copy = empty(t, {t.size(0), t.size(1), t.size(2), t.size(3)}, t.scalar_type());
  return torch::stable::copy_(copy, t);
}

OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(torch::stable::contiguous(*t)) : t;
}

// [B, L] as [B, axes, L].
OptionalTensor on_axes(const OptionalTensor& position, int64_t axes) {
  if (!position || position->dim() == 3 || axes == 1) return contiguous(position);
  Tensor wide = empty(*position, {position->size(0), axes, position->size(1)}, ScalarType::Int);
  return torch::stable::copy_(wide, torch::stable::unsqueeze(*position, 1));
}

HeadStrides strides(const Tensor& t) {  // of a single one there is no next
  const auto stride = [&](int dim) { return t.size(dim) == 1 ? t.size(3) : t.stride(dim); };
  return {stride(0), stride(1), stride(2)};
}

// Which kernel answers. Tests may force one by the environment's RESTORE_EXT_ATTENTION: its name,
// and what it does not take is an error.
template <typename T>
cudaError_t attend(const CalibratedAttentionParams<T>& p, const Tensor& query,
                   cudaStream_t stream) {
  const char* forced = std::getenv("RESTORE_EXT_ATTENTION");
  const auto chosen = [&](std::string_view name, bool takes, bool is_best) {
    if (forced == nullptr || *forced == 0) return takes && is_best;
    if (name != forced) return false;
    if (!takes) contract::refuse(kOp, "RESTORE_EXT_ATTENTION=", forced, " does not take this");
    return true;
  };
  const bool few = p.Hq / p.Hkv * p.Lq <= kDecodeRows;
  if (chosen("decode", true, few)) return decode(decode_params(p), query, stream);
  if constexpr (!std::is_same_v<T, float>) {
    const bool hopper = compute_capability() == 90 && calibrated_attention_hopper_takes(p);
    if (chosen("hopper", hopper, true)) return launch_calibrated_attention_hopper(p, stream);
    const bool takes = p.D == 64 || p.D == 96 || p.D == 128;
    if (chosen("prefill", takes, true)) return launch_calibrated_attention_prefill(p, stream);
  }
  if (chosen("plain", true, true)) return launch_calibrated_attention_plain(p, stream);
  contract::refuse(kOp, "RESTORE_EXT_ATTENTION=", forced, " does not take this");
}

std::tuple<Tensor, Tensor> calibrated_attention_cuda(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& log_size,
    const OptionalTensor& query_position, const OptionalTensor& key_position,
    const OptionalTensor& decay, bool causal, const OptionalTensor& key_range, double softcap,
    std::optional<double> scale) {
  const auto size = contract::calibrated_attention(query, key, value, log_size, query_position,
                                                   key_position, decay, key_range, softcap);
  const Launch launch(kOp, query);
  Tensor attended = empty(query, {size.B, size.Hq, size.Lq, size.D}, query.scalar_type());
  Tensor lse = empty(query, {size.B, size.Hq, size.Lq}, ScalarType::Float);
  if (size.B == 0 || size.Hq == 0 || size.Lq == 0) return {attended, lse};

  // Read where they lie, as a rule; the rest is small beside them.
  const Tensor q = in_packs(query), k = in_packs(key), v = in_packs(value);
  const OptionalTensor sizes = contiguous(log_size), ranges = contiguous(key_range);
  const OptionalTensor table = contiguous(decay);
  OptionalTensor at_query, at_key;
  int64_t axes = 1;
  if (decay && query_position) {
    if (query_position->dim() == 3 || key_position->dim() == 3) axes = size.G;
    at_query = on_axes(query_position, axes);
    at_key = on_axes(key_position, axes);
  }
  dispatch_floating(query, [&]<typename T>() {
    const CalibratedAttentionParams<T> params{
        .query = in<T>(q),
        .key = in<T>(k),
        .value = in<T>(v),
        .log_size = in<float>(sizes),
        .query_position = in<int32_t>(at_query),
        .key_position = in<int32_t>(at_key),
        .decay = in<float>(table),
        .key_range = in<int32_t>(ranges),
        .out = out<T>(attended),
        .lse = out<float>(lse),
        .query_stride = strides(q),
        .key_stride = strides(k),
        .value_stride = strides(v),
        .B = static_cast<int>(size.B),
        .Hq = static_cast<int>(size.Hq),
        .Hkv = static_cast<int>(size.Hkv),
        .Lq = static_cast<int>(size.Lq),
        .Lk = static_cast<int>(size.Lk),
        .D = static_cast<int>(size.D),
        .G = static_cast<int>(size.G),
        .Gp = static_cast<int>(axes),
        .P = static_cast<int>(size.P),
        .causal = causal,
        .softcap = static_cast<float>(softcap),
        .scale = static_cast<float>(scale.value_or(1 / std::sqrt(static_cast<double>(size.D)))),
    };
    launch.check(attend(params, query, launch.stream()));
  });
  return {attended, lse};
}

}  // namespace

RESTORE_EXT_CUDA_LIBRARY(m) {
  m.impl("calibrated_attention", TORCH_BOX(&calibrated_attention_cuda));
}

}  // namespace restore_ext::cuda
