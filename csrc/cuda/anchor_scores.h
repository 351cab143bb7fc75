// The tensors behind an AnchorScoresParams. Lives until the kernels that read them are launched.
#pragma once

#include <string>

#include "anchor_scores_kernel.h"
#include "tokens.h"

namespace restore_ext::cuda {

class AnchorScoresOf {
 public:
  AnchorScoresOf(const Tensor& x, const std::string& mode, const OptionalTensor& valid)
      : tokens_(x, valid),
        sum_stride_((x.size(2) + 7) / 8 * 8),
        partial_(empty(x, {x.size(0), (x.size(1) + kUnitsSummed - 1) / kUnitsSummed, sum_stride_},
                       ScalarType::Float)),
        total_(empty(x, {x.size(0), sum_stride_}, ScalarType::Float)),
        density_(empty(x, {x.size(0), x.size(1)}, ScalarType::Float)),
        nearest_(empty(x, {x.size(0), x.size(1)}, ScalarType::Int)),
        denser_(mode == "paper") {}

  template <typename T>
  AnchorScoresParams<T> as() const {
    return {
        .rows = tokens_.as<T>(),
        .partial = out<float>(partial_),
        .total = out<float>(total_),
        .density = out<float>(density_),
        .nearest = out<uint32_t>(nearest_),
        .sum_stride = sum_stride_,
        .denser = denser_,
    };
  }

 private:
  TokenRowsOf tokens_;
  int64_t sum_stride_;
  Tensor partial_, total_, density_, nearest_;
  bool denser_;
};

}  // namespace restore_ext::cuda
