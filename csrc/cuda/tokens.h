// How an entry hands tokens to a similarity kernel: rows dense, masks and budgets contiguous.
#pragma once

#include "entry.h"
#include "token_rows_kernel.h"

namespace restore_ext::cuda {

// The same values with a dense last dimension; a copy only where it is not.
inline Tensor dense_rows(const Tensor& x) {
  return x.size(x.dim() - 1) > 1 && x.stride(x.dim() - 1) != 1 ? torch::stable::contiguous(x) : x;
}

inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline OptionalTensor dense(const OptionalTensor& t) {
  return t ? OptionalTensor(dense(*t)) : std::nullopt;
}

// The tensors behind a TokenRows. Lives until the kernels that read them are launched.
class TokenRowsOf {
 public:
  TokenRowsOf(const Tensor& x, const OptionalTensor& valid)
      : x_(dense_rows(x)),
        valid_(dense(valid)),
        token_(empty(x, {x.size(0), x.size(1)}, ScalarType::Int)),
        count_(empty(x, {x.size(0)}, ScalarType::Int)),
        scale_(empty(x, {x.size(0), x.size(1), 2}, ScalarType::Float)) {}

  template <typename T>
  TokenRows<T> as() const {
    return {
        .x = in<T>(x_),
        .valid = in<bool>(valid_),
        .token = out<int>(token_),
        .count = out<int>(count_),
        .scale = out<UnitScale>(scale_),
        .B = static_cast<int>(x_.size(0)),
        .N = static_cast<int>(x_.size(1)),
        .C = static_cast<int>(x_.size(2)),
        .stride_b = x_.stride(0),
        .stride_n = x_.stride(1),
    };
  }

 private:
  Tensor x_;
  OptionalTensor valid_;
  Tensor token_, count_, scale_;
};

}  // namespace restore_ext::cuda
