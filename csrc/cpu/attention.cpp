#include "attention.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>

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
  const float* row = heads.in_place(b, h, keys.first);
  stride = heads.stride_l;
  if (row && !copy) return row;
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
  seen = seen.within({first, first + count});
  if (seen.empty()) {
    std::fill_n(bias, count, kNever);
    return;
  }
  bias -= first;  // from here on a key's own index counts
  std::fill(bias + first, bias + seen.first, kNever);
  std::fill(bias + seen.past, bias + first + count, kNever);
  if (log_size) {
    const float* own = log_size + b * size.Lk;
    std::copy(own + seen.first, own + seen.past, bias + seen.first);
  } else {
    std::fill(bias + seen.first, bias + seen.past, 0.f);
  }
  if (!decay) return;

  // Unsigned: the distance of two int32 may pass 2^31.
  const auto last = static_cast<uint32_t>(std::min<int64_t>(size.P - 1, UINT32_MAX));
  const auto distance = [last](int32_t a, int32_t b) {
    const auto high = static_cast<uint32_t>(std::max(a, b));
    return std::min(high - static_cast<uint32_t>(std::min(a, b)), last);
  };
  if (decay_is_log) {
    const int32_t at_query = query_position.at(b, 0, i);
    for (int64_t j = seen.first; j < seen.past; ++j) {
      bias[j] += decay[distance(at_query, key_position.at(b, 0, j))];
    }
    return;
  }
  for (int64_t j = seen.first; j < seen.past; ++j) {
    float rho = 0;
    for (int64_t g = 0; g < size.G; ++g) {
      rho += decay[g * size.P + distance(query_position.at(b, g, i), key_position.at(b, g, j))];
    }
    bias[j] += std::log(2.f - rho);
  }
}

void AttentionParams::finish(int64_t b, int64_t h, int64_t i, float max, float sum,
                             float* values) const {
  const int64_t row = (b * size.Hq + h) * size.Lq + i, D = size.D;
  lse[row] = sum == 0.f ? kNever : max + std::log(sum);
  const float weights = sum == 0.f ? 1.f : sum;
  const auto write = [&]<typename T>(T* to) {
    for (int64_t d = 0; d < D; ++d) to[d] = static_cast<T>(values[d] / weights);
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
  log_decay.resize(decay_is_log ? size.P : 0);
  for (size_t distance = 0; distance < log_decay.size(); ++distance) {
    log_decay[distance] = std::log(2.f - decay->const_data_ptr<float>()[distance]);
  }
  const auto positions = [&size](const contract::OptionalTensor& t, int64_t L, int64_t start) {
    if (!t) return Positions{nullptr, 0, 0, start};
    const bool has_axes = t->dim() == 3;
    return Positions{t->const_data_ptr<int32_t>(), has_axes ? size.G * L : L, has_axes ? L : 0, 0};
  };
  return {
      .size = size,
      .query = Heads(query),
      .key = Heads(key),
      .value = Heads(value),
      .log_size = log_size ? log_size->const_data_ptr<float>() : nullptr,
      .query_position = positions(query_position, size.Lq, size.Lk - size.Lq),
      .key_position = positions(key_position, size.Lk, 0),
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
