#include "attention.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace restore_ext::cpu {

void Heads::read(int64_t b, int64_t h, int64_t i, int64_t D, float* row) const {
  const int64_t start = at(b, h, i);
  if (dtype == ScalarType::Float) {
    const float* from = static_cast<const float*>(data) + start;
    for (int64_t d = 0; d < D; ++d) row[d] = from[d * stride_d];
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(data) + start;
  const auto convert = dtype == ScalarType::Half ? kernels().from_half : kernels().from_bfloat16;
  if (stride_d == 1) return convert(from, row, D);
  for (int64_t d = 0; d < D; ++d) convert(from + d * stride_d, row + d, 1);
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

}  // namespace restore_ext::cpu
