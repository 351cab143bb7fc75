// What the attention operators share on the CPU: their arguments as the loops read them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "../contracts/calibrated_attention.h"
#include "kernels.h"

namespace restore_ext::cpu {

using Sizes = contract::CalibratedAttentionSizes;

struct Positions {
  const int32_t* data;         // [B, G, L]; nullptr: the index counts
  int64_t stride_b, stride_g;  // stride_g 0: the same on every axis
  int64_t start;               // the first index

  int32_t at(int64_t b, int64_t g, int64_t i) const {
    return data ? data[b * stride_b + g * stride_g + i] : static_cast<int32_t>(start + i);
  }
};

struct Heads {
  const void* data;  // [B, H, L, D]
  ScalarType dtype;
  int64_t stride_b, stride_h, stride_l, stride_d;

  explicit Heads(const Tensor& t)
      : data(t.const_data_ptr()),
        dtype(t.scalar_type()),
        stride_b(t.stride(0)),
        stride_h(t.stride(1)),
        stride_l(t.stride(2)),
        stride_d(t.stride(3)) {}

  int64_t at(int64_t b, int64_t h, int64_t i) const {
    return b * stride_b + h * stride_h + i * stride_l;
  }
  // The row itself, if it is a row of float32 in memory.
  const float* in_place(int64_t b, int64_t h, int64_t i) const {
    if (dtype != ScalarType::Float || stride_d != 1) return nullptr;
    return static_cast<const float*>(data) + at(b, h, i);
  }
  // A copy of it as float32.
  void read(int64_t b, int64_t h, int64_t i, int64_t D, float* row) const;
};

struct AttentionParams {
  Sizes size;
  Heads query, key, value;
  const float* log_size;  // [B, Lk]; nullptr: zeros
  Positions query_position, key_position;
  const float* decay;        // [G, P]; nullptr: no distance term
  bool decay_is_log;         // then it holds log(2 - decay)
  const int32_t* key_range;  // [B, Lq, 2]; nullptr: all
  bool causal;
  float softcap, scale;
  void* out;   // [B, Hq, Lq, D]
  float* lse;  // [B, Hq, Lq]

  Range visible(int64_t b, int64_t i) const {
    Range range{0, size.Lk};
    if (causal) range.past = std::min(range.past, i + size.Lk - size.Lq + 1);
    if (!key_range) return range;
    const int32_t* own = key_range + (b * size.Lq + i) * 2;
    return range.within({own[0], own[1]});
  }
  bool is_padding(int64_t b, int64_t j) const {
    return log_size && log_size[b * size.Lk + j] == kNever;
  }
  bool has_padding(int64_t b, Range keys) const;

  // The rows of some keys: where they lie, or a copy of them with zeros under padding.
  const float* rows_of(const Heads& heads, int64_t b, int64_t h, Range keys, bool copy,
                       std::vector<float>& scratch, int64_t& stride) const;

  // What query i's logits gain over keys [first, first + count): log_size + log(2 - decay), and
  // -inf where the key is not `seen`.
  void fill_bias(int64_t b, int64_t i, int64_t first, int64_t count, Range seen, float* bias) const;

  // Ends a row: divides its sum of values by its sum of weights. A row that saw nothing is zeros.
  void finish(int64_t b, int64_t h, int64_t i, float max, float sum, float* values) const;
};

// The optional arguments, dense: small beside the heads, which are read where they lie. With one
// axis there are few distances and many pairs: their logarithms are taken once.
struct AttentionArguments {
  contract::OptionalTensor log_size, query_position, key_position, decay, key_range;
  std::vector<float> log_decay;

  // Of this and the tensors, which must outlive them; without an output, and not causal.
  AttentionParams params(const Sizes& size, const Tensor& query, const Tensor& key,
                         const Tensor& value, double softcap, std::optional<double> scale);
};

// `like` is a tensor on the CPU, whose allocator gives the workspace.
void attend_prefill(const AttentionParams& p, const Tensor& like);
void attend_decode(const AttentionParams& p);

}  // namespace restore_ext::cpu
