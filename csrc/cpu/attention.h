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
  const int32_t* data;         // [B, G, L], or of slots; nullptr: the index counts
  int64_t stride_b, stride_g;  // stride_g 0: the same on every axis

  const int32_t* of(int64_t b, int64_t g) const { return data + b * stride_b + g * stride_g; }
};

// Where the tokens of a row lie: a cache in a row is B pages, each as long as the row.
struct Pages {
  int64_t page;                         // tokens of one
  const int32_t* block_table{nullptr};  // [B, most]; nullptr: page b is all of row b
  const int32_t* seqlens{nullptr};      // [B]; nullptr: `page`
  int64_t most{1}, pages{0};            // of one row, and in all

  int64_t length(int64_t b) const {
    return seqlens ? std::clamp<int64_t>(seqlens[b], 0, most * page) : page;
  }
};

// Some tokens of a row that lie one after the other.
struct Run {
  int64_t page, slot;  // of the first, which is
  int64_t index;       // of the row
  int64_t count;
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
  Element element() const {
    if (dtype == ScalarType::Half) return Element::kHalf;
    return dtype == ScalarType::BFloat16 ? Element::kBfloat16 : Element::kFloat;
  }
  // The row itself, if it is one in memory.
  const void* in_place(int64_t b, int64_t h, int64_t i) const {
    const int64_t size = dtype == ScalarType::Float ? sizeof(float) : sizeof(uint16_t);
    return stride_d == 1 ? static_cast<const char*>(data) + at(b, h, i) * size : nullptr;
  }
  // A copy of it as float32.
  void read(int64_t b, int64_t h, int64_t i, int64_t D, float* row) const;
};

struct AttentionParams {
  Sizes size;
  Heads query, key, value;  // of keys and values b is the page
  Pages pages;
  const float* log_size;  // [B, Lk], or of slots; nullptr: zeros
  Positions query_position, key_position;
  const float* decay;        // [G, P]; nullptr: no distance term
  bool decay_is_log;         // then it holds log(2 - decay)
  const int32_t* key_range;  // [B, Lq, 2]; nullptr: all
  bool causal;
  float softcap, scale;
  void* out;   // [B, Hq, Lq, D]
  float* lse;  // [B, Hq, Lq]

  Range visible(int64_t b, int64_t i) const {
    const int64_t length = pages.length(b);
    Range range{0, length};
    if (causal) range.past = std::min(range.past, i + length - size.Lq + 1);
    if (!key_range) return range;
    const int32_t* own = key_range + (b * size.Lq + i) * 2;
    return range.within({own[0], own[1]});
  }
  bool is_padding(int64_t b, int64_t j) const {
    return log_size && log_size[b * size.Lk + j] == kNever;
  }
  bool has_padding(int64_t b, Range keys) const;

  // each(run) for what exists of some tokens of a row, in order.
  template <typename Each>
  void each_run(int64_t b, Range keys, const Each& each) const {
    if (!pages.block_table) {
      if (!keys.empty()) each(Run{b, keys.first, keys.first, keys.past - keys.first});
      return;
    }
    for (int64_t past; keys.first < keys.past; keys.first = past) {
      past = std::min(keys.past, (keys.first / pages.page + 1) * pages.page);
      const int64_t page = pages.block_table[b * pages.most + keys.first / pages.page];
      if (page < 0 || page >= pages.pages) continue;
      each(Run{page, keys.first % pages.page, keys.first, past - keys.first});
    }
  }

  // The rows of some keys of a cache in a row: where they lie, or a copy of them with zeros under
  // padding.
  const float* rows_of(const Heads& heads, int64_t b, int64_t h, Range keys, bool copy,
                       std::vector<float>& scratch, int64_t& stride) const;

  // What query i's logits gain over keys [first, first + count): log_size + log(2 - decay), and
  // -inf where the key is not `seen` or does not exist.
  void fill_bias(int64_t b, int64_t i, int64_t first, int64_t count, Range seen, float* bias) const;

  // Adds log(2 - decay) for the distance of query i to the tokens of a run.
  void add_distance(int64_t b, int64_t i, const Run& run, float* gain) const;

  // Ends a row: divides its sum of values by the sum of the weights they had, which is `sum` but
  // for rounding. A row that saw nothing is zeros.
  void finish(int64_t b, int64_t h, int64_t i, float max, float sum, float weights,
              const float* values) const;
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
