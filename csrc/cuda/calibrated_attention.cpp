#include "../contracts/calibrated_attention.h"

#include <cstdlib>
#include <string_view>
#include <tuple>
#include <type_traits>

#include "attention_arguments.h"
#include "calibrated_attention_decode.h"
#include "calibrated_attention_kernel.h"
#include "entry.h"

namespace restore_ext::cuda {
namespace {

constexpr const char* kOp = "calibrated_attention";

// Whether the Hopper kernel was built for Hopper: for all else, 9.0 without its `a` too, its body
// is a trap.
#ifdef RESTORE_EXT_CUDA_ARCHS
constexpr bool kForHopper =
    std::string_view(RESTORE_EXT_CUDA_ARCHS).find("9.0a") != std::string_view::npos;
#else  // by the emulator, which runs it as C++ and as the PTX of 9.0a
constexpr bool kForHopper = true;
#endif

// The name in the environment's RESTORE_EXT_ATTENTION, by which tests force a kernel.
const char* forced_kernel() {
  const char* name = std::getenv("RESTORE_EXT_ATTENTION");
  return name == nullptr || *name == 0 ? nullptr : name;
}

// A step of decoding, a draft: bound by the cache it reads.
template <typename Sizes>
bool few_rows(const Sizes& p) {
  return p.Hq / p.Hkv * p.Lq <= kDecodeRows;
}

// Which kernel answers. What a forced one does not take is an error.
template <typename T>
cudaError_t attend(const CalibratedAttentionParams<T>& p, const Tensor& query,
                   cudaStream_t stream) {
  const char* forced = forced_kernel();
  const auto chosen = [&](std::string_view name, bool takes, bool is_best) {
    if (forced == nullptr) return takes && is_best;
    if (name != forced) return false;
    if (!takes) contract::refuse(kOp, "RESTORE_EXT_ATTENTION=", forced, " does not take this");
    return true;
  };
  if (chosen("decode", true, few_rows(p))) return decode(decode_params(p), query, stream);
  if constexpr (!std::is_same_v<T, float>) {
    const bool hopper =
        kForHopper && compute_capability() == 90 && calibrated_attention_hopper_takes(p);
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

  // Decoding reads dense rows wherever they begin: a copy would read the cache once more.
  const bool decodes = forced_kernel() == nullptr && few_rows(size);
  const AttentionArguments given(size, query, key, log_size, query_position, key_position, decay,
                                 key_range, decodes);
  const Tensor values = in_packs(value, decodes);
  dispatch_floating(query, [&]<typename T>() {
    CalibratedAttentionParams<T> params = given.params<T>(softcap, scale);
    params.value = in<T>(values);
    params.value_stride = AttentionArguments::strides(values);
    params.causal = causal;
    params.out = out<T>(attended);
    params.lse = out<float>(lse);
    launch.check(attend(params, query, launch.stream()));
  });
  return {attended, lse};
}

}  // namespace

RESTORE_EXT_CUDA_LIBRARY(m) {
  m.impl("calibrated_attention", TORCH_BOX(&calibrated_attention_cuda));
}

}  // namespace restore_ext::cuda
