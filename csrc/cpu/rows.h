// How the CPU operators see tokens: any dtype and strides in, float32 unit vectors out; and how
// they share work, so that the number of threads never changes a bit of the result.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <vector>

#include "kernels.h"

namespace restore_ext::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// How many pieces of work, counted in multiplications, are worth waking a thread for.
inline int64_t grain(int64_t work_of_one) {
  constexpr int64_t kWorthAThread = 1 << 15;  // about ten microseconds
  return std::max<int64_t>(kWorthAThread / std::max<int64_t>(work_of_one, 1), 1);
}

// Runs body(i) for every i in [0, n). One i belongs to one thread, whatever their number.
template <typename Body>
void each(int64_t n, int64_t work_of_one, const Body& body) {
  torch::stable::parallel_for(0, n, grain(work_of_one), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

// Calls body with a zero of the C++ type that a floating dtype stands for.
template <typename Body>
void with_element_type(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Half:
      return body(torch::headeronly::Half{});
    case ScalarType::BFloat16:
      return body(torch::headeronly::BFloat16{});
    default:
      return body(float{});
  }
}

// A [B, N] tensor read in place.
template <typename T>
struct View {
  const T* data;
  int64_t stride_b, stride_n;

  explicit View(const Tensor& t)
      : data(static_cast<const T*>(t.const_data_ptr())),
        stride_b(t.stride(0)),
        stride_n(t.stride(1)) {}
  const T& operator()(int64_t b, int64_t n) const { return data[b * stride_b + n * stride_n]; }
};

// A [B, N, C] tensor read in place, a token at a time, as float32.
struct Tokens {
  const void* data;
  ScalarType dtype;
  int64_t C, stride_b, stride_n, stride_c;

  explicit Tokens(const Tensor& x)
      : data(x.const_data_ptr()),
        dtype(x.scalar_type()),
        C(x.size(2)),
        stride_b(x.stride(0)),
        stride_n(x.stride(1)),
        stride_c(x.stride(2)) {}

  void read(int64_t b, int64_t n, float* row) const {
    with_element_type(dtype, [&](auto zero) {
      const auto* token = static_cast<const decltype(zero)*>(data) + b * stride_b + n * stride_n;
      if (stride_c == 1) {
        for (int64_t c = 0; c < C; ++c) row[c] = static_cast<float>(token[c]);
      } else {
        for (int64_t c = 0; c < C; ++c) row[c] = static_cast<float>(token[c * stride_c]);
      }
    });
  }
};

// How many things each row may take: `most`, or less where the budget or what exists says so.
struct Budget {
  int64_t most;
  const int32_t* of_row = nullptr;
  int64_t stride = 0;

  Budget(int64_t most, const std::optional<Tensor>& budget) : most(most) {
    if (!budget) return;
    of_row = static_cast<const int32_t*>(budget->const_data_ptr());
    stride = budget->stride(0);
  }
  int64_t operator()(int64_t b, int64_t exist) const {
    const int64_t wanted = of_row ? of_row[b * stride] : most;
    return std::clamp<int64_t>(wanted, 0, std::max<int64_t>(std::min(most, exist), 0));
  }
};

// Scales a row to length 1, a row of zeros excepted. False, and zeros, if it has NaN or Inf.
inline bool make_unit(const Kernels& level, float* row, int64_t C) {
  const double square = level.square(row, C);
  const bool comparable = std::isfinite(square);
  if (!comparable || square == 0) {
    std::fill_n(row, C, 0.f);
  } else {
    level.scale(row, C, 1 / std::sqrt(square));
  }
  return comparable;
}

// The valid tokens of image b as unit vectors, one after another. Working on these rows alone is
// what makes the result with `valid` that of the image without the others.
struct UnitRows {
  int64_t n = 0, C;
  std::vector<int64_t> token;       // [n] where in the image each row comes from, ascending
  std::vector<uint8_t> comparable;  // [n] 0 for a row with NaN or Inf
  std::unique_ptr<float[]> units;   // [n, C]

  UnitRows(const Tokens& x, int64_t N, const std::optional<Tensor>& valid, int64_t b) : C(x.C) {
    if (valid) {
      const View<bool> is_valid(*valid);
      for (int64_t i = 0; i < N; ++i) {
        if (is_valid(b, i)) token.push_back(i);
      }
    } else {
      token.resize(N);
      std::iota(token.begin(), token.end(), 0);
    }
    n = static_cast<int64_t>(token.size());
    comparable.resize(n);
    units.reset(new float[n * C]);     // not filled with zeros first
    const Kernels& level = kernels();  // not in a thread, which could not say that there is none
    each(n, 4 * C, [&](int64_t i) {
      float* row = units.get() + i * C;
      x.read(b, token[i], row);
      comparable[i] = make_unit(level, row, C);
    });
  }

  // Some of the rows.
  UnitRows(const UnitRows& from, const std::vector<int64_t>& some)
      : n(static_cast<int64_t>(some.size())), C(from.C), units(new float[n * C]) {
    for (int64_t i = 0; i < n; ++i) {
      token.push_back(from.token[some[i]]);
      comparable.push_back(from.comparable[some[i]]);
      std::copy_n(from[some[i]], C, units.get() + i * C);
    }
  }

  const float* operator[](int64_t i) const { return units.get() + i * C; }
};

// The numbers first..past-1 in falling order of value[i], equal ones ascending.
inline std::vector<int64_t> falling(const std::vector<float>& value, int64_t first, int64_t past) {
  std::vector<int64_t> order(std::max<int64_t>(past - first, 0));
  std::iota(order.begin(), order.end(), first);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t i, int64_t j) { return value[i] > value[j]; });
  return order;
}

}  // namespace restore_ext::cpu
