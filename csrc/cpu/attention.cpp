#include "attention.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <numeric>

namespace restore_ext::cpu {

void Heads::read(int64_t b, int64_t h, int64_t i, int64_t D, float* row) const {
  const int64_t start = at(b, h, i);
  if (dtype == ScalarType::Float) {
    const float* from = static_cast<const float*>(data) + start;
    if (stride_d == 1) return static_cast<void>(std::copy_n(from, D, row));
    for (int64_t d = 0; d < D; ++d) row[d] = from[d * stride_d];
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(data) + start;
  const auto convert = dtype == ScalarType::Half ? kernels().from_half : kernels().from_bfloat16;
  if (stride_d == 1) return convert(from, row, D);
  for (int64_t d = 0; d < D; ++d) convert(from + d * stride_d, row + d, 1);
}

bool AttentionParams::has_padding(int64_t b, Range keys) const {
  for (int64_t j = keys.first; j < keys.past; ++j) {
    if (is_padding(b, j)) return true;
  }
  return false;
}

const float* AttentionParams::rows_of(const Heads& heads, int64_t b, int64_t h, Range keys,
                                      bool copy, std::vector<float>& scratch,
                                      int64_t& stride) const {
  const void* row = heads.in_place(b, h, keys.first);
  stride = heads.stride_l;
  if (row && !copy && heads.dtype == ScalarType::Float) return static_cast<const float*>(row);
  stride = size.D;
  for (int64_t j = keys.first; j < keys.past; ++j) {
    float* to = &scratch[(j - keys.first) * stride];
    if (is_padding(b, j)) {
      std::fill_n(to, stride, 0.f);
    } else {
      heads.read(b, h, j, stride, to);
    }
  }
  return scratch.data();
}

void AttentionParams::fill_bias(int64_t b, int64_t i, int64_t first, int64_t count, Range seen,
                                float* bias) const {
  std::fill_n(bias, count, kNever);
  each_run(b, seen.within({first, first + count}), [&](const Run& run) {
    float* gain = bias + (run.index - first);
    if (log_size) {
      std::copy_n(log_size + run.page * pages.page + run.slot, run.count, gain);
    } else {
      std::fill_n(gain, run.count, 0.f);
    }
    if (decay) add_distance(b, i, run, gain);
  });
}

void AttentionParams::add_distance(int64_t b, int64_t i, const Run& run, float* gain) const {
  constexpr int64_t kPiece = 128;
  int32_t index[kPiece];
  float rho[kPiece];
  const auto last = static_cast<uint32_t>(std::min<int64_t>(size.P - 1, UINT32_MAX));
  for (int64_t begin = 0; begin < run.count; begin += kPiece) {
    const int64_t some = std::min(kPiece, run.count - begin);
    float* sum = gain + begin;
    if (!decay_is_log) {
      sum = rho;
      std::fill_n(rho, some, 0.f);
    }
    for (int64_t g = 0; g < size.G; ++g) {
      const int32_t* keys = index;
      if (key_position.data) {
        keys = key_position.of(run.page, g) + run.slot + begin;
      } else if (g == 0) {
        std::iota(index, index + some, static_cast<int32_t>(run.index + begin));
      }
      const int32_t query = query_position.data
                                ? query_position.of(b, g)[i]
                                : static_cast<int32_t>(pages.length(b) - size.Lq + i);
      kernels().add_by_distance(decay + g * size.P, last, query, keys, some, sum);
    }
    if (!decay_is_log) kernels().add_log(rho, some, gain + begin);
  }
}

void AttentionParams::finish(int64_t b, int64_t h, int64_t i, float max, float sum, float weights,
                             const float* values) const {
  const int64_t row = (b * size.Hq + h) * size.Lq + i, D = size.D;
  lse[row] = sum == 0.f ? kNever : max + std::log(sum);
  const float divisor = sum == 0.f ? 1.f : weights;
  const auto write = [&]<typename T>(T* to) {
    for (int64_t d = 0; d < D; ++d) to[d] = static_cast<T>(values[d] / divisor);
  };
  switch (query.dtype) {
    case ScalarType::Half:
      return write(static_cast<torch::headeronly::Half*>(out) + row * D);
    case ScalarType::BFloat16:
      return write(static_cast<torch::headeronly::BFloat16*>(out) + row * D);
    default:
      return write(static_cast<float*>(out) + row * D);
  }
}

AttentionParams AttentionArguments::params(const Sizes& size, const Tensor& query,
                                           const Tensor& key, const Tensor& value, double softcap,
                                           std::optional<double> scale) {
  for (auto* t : {&log_size, &query_position, &key_position, &decay, &key_range}) {
    if (*t) *t = torch::stable::contiguous(**t);
  }
  const bool decay_is_log = decay && size.G == 1;
  log_decay.assign(decay_is_log ? size.P : 0, 0.f);
  if (decay_is_log) {
    kernels().add_log(decay->const_data_ptr<float>(), size.P, log_decay.data());
  }
  const auto positions = [&size](const contract::OptionalTensor& t, int64_t L) {
    if (!t) return Positions{nullptr, 0, 0};
    const bool has_axes = t->dim() == 3;
    return Positions{t->const_data_ptr<int32_t>(), has_axes ? size.G * L : L, has_axes ? L : 0};
  };
  return {
      .size = size,
      .query = Heads(query),
      .key = Heads(key),
      .value = Heads(value),
      .pages = {.page = size.Lk},
      .log_size = log_size ? log_size->const_data_ptr<float>() : nullptr,
      .query_position = positions(query_position, size.Lq),
      .key_position = positions(key_position, size.Lk),
      .decay = decay_is_log ? log_decay.data()
               : decay      ? decay->const_data_ptr<float>()
                            : nullptr,
      .decay_is_log = decay_is_log,
      .key_range = key_range ? key_range->const_data_ptr<int32_t>() : nullptr,
      .causal = false,
      .softcap = static_cast<float>(softcap),
      .scale = static_cast<float>(scale.value_or(1 / std::sqrt(static_cast<double>(size.D)))),
      .out = nullptr,
      .lse = nullptr,
  };
}

}  // namespace restore_ext::cpu
