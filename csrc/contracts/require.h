// The words a contract is written in. A failure names the op, the argument, what was asked and
// what came:   merge_tokens: size must have shape [B, N] = [2, 576], got [2, 575]
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace restore_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace contract {

using OptionalTensor = std::optional<Tensor>;

template <typename... Words>
[[noreturn]] void refuse(const char* op, const Words&... words) {
  std::ostringstream message;
  message << op << ": ";
  ((message << words), ...);
  throw std::runtime_error(message.str());
}

template <typename Sizes>
std::string shape(const Sizes& sizes) {
  std::ostringstream text;
  const char* comma = "";
  text << '[';
  for (const int64_t size : sizes) {
    text << comma << size;
    comma = ", ";
  }
  text << ']';
  return text.str();
}

inline bool has_shape(const Tensor& t, std::initializer_list<int64_t> sizes) {
  if (t.dim() != static_cast<int64_t>(sizes.size())) return false;
  int64_t i = 0;
  for (const int64_t size : sizes) {
    if (t.size(i++) != size) return false;
  }
  return true;
}

inline bool is_floating(const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  return dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
}

inline std::string device_name(const Tensor& t) {
  const auto device = t.device();
  if (device.is_cpu()) return "cpu";
  return (device.is_cuda() ? "cuda:" : "another device:") + std::to_string(device.index());
}

// Where an argument is optional, the word for a tensor serves it too: what is absent passes.
inline bool absent(const Tensor&) { return false; }
inline bool absent(const OptionalTensor& t) { return !t.has_value(); }
inline const Tensor& given(const Tensor& t) { return t; }
inline const Tensor& given(const OptionalTensor& t) { return *t; }

// Axes G of a position and distances P of a decay table, 0 without one. One of the two positions
// alone is refused.
struct Axes {
  int64_t G, P;
};

inline Axes axes(const char* op, const OptionalTensor& decay, const OptionalTensor& query_position,
                 const OptionalTensor& key_position) {
  Axes axes{1, 0};
  if (decay) {
    const int64_t rank = decay->dim();
    if (rank != 1 && rank != 2) {  // [P] is [1, P]
      refuse(op, "decay must have 2 dimensions, got shape ", shape(decay->sizes()));
    }
    axes = {rank == 1 ? 1 : decay->size(0), decay->size(rank - 1)};
    if (axes.G < 1 || axes.P < 1) {
      refuse(op, "decay must have at least one axis G and one distance P, got shape ",
             shape(decay->sizes()));
    }
  } else if (query_position && query_position->dim() == 3) {
    axes.G = query_position->size(1);
  }
  if (query_position.has_value() != key_position.has_value()) {
    refuse(op, "query_position and key_position must both be given or neither, got only ",
           query_position ? "query_position" : "key_position");
  }
  return axes;
}

}  // namespace contract
}  // namespace restore_ext

// The name of the contract function is the name of the op.
#define REQUIRE(cond, ...)                                \
  do {                                                    \
    if (!(cond)) contract::refuse(__func__, __VA_ARGS__); \
  } while (false)

#define REQUIRE_RANK(t, rank)                                            \
  REQUIRE(absent(t) || given(t).dim() == (rank), #t " must have ", rank, \
          " dimensions, got shape ", shape(given(t).sizes()))

#define REQUIRE_SHAPE(t, ...)                              \
  REQUIRE(absent(t) || has_shape(given(t), {__VA_ARGS__}), \
          #t " must have shape [" #__VA_ARGS__ "] = ",     \
          shape(std::initializer_list<int64_t>{__VA_ARGS__}), ", got ", shape(given(t).sizes()))

#define REQUIRE_DTYPE(t, dtype)                                     \
  REQUIRE(absent(t) || given(t).scalar_type() == ScalarType::dtype, \
          #t " must be " #dtype ", got ", torch::headeronly::toString(given(t).scalar_type()))

#define REQUIRE_FLOATING(t)                                                                \
  REQUIRE(absent(t) || is_floating(given(t)), #t " must be Float, Half or BFloat16, got ", \
          torch::headeronly::toString(given(t).scalar_type()))

#define REQUIRE_SAME_DTYPE(a, b)                                         \
  REQUIRE(absent(b) || given(b).scalar_type() == given(a).scalar_type(), \
          #b " must have the dtype of " #a ", ",                         \
          torch::headeronly::toString(given(a).scalar_type()), ", got ", \
          torch::headeronly::toString(given(b).scalar_type()))

#define REQUIRE_SAME_DEVICE(a, b)                                                 \
  REQUIRE(absent(b) || given(a).device() == given(b).device(), #b " must be on ", \
          device_name(given(a)), " like " #a ", got ", device_name(given(b)))

// A budget: how many of `most` things to take, and perhaps a smaller number for each row.
#define REQUIRE_AT_MOST(k, most) \
  REQUIRE((k) >= 0 && (k) <= (most), #k " must be in [0, " #most "] = [0, ", most, "], got ", k)

#define REQUIRE_ANCHOR_MODE(mode)                    \
  REQUIRE((mode) == "paper" || (mode) == "official", \
          #mode " must be \"paper\" or \"official\", got \"", mode, "\"")
