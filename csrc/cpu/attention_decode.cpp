// The same formula for few queries: one token or a short chunk against a long cache.
//
// Plan     A task owns a stretch of keys of one key head and the queries of all heads that read it,
//          in the order (head, query). float32 keys and values are read where they lie, once;
//          others, and blocks with padding in them, are copied 64 at a time. The stretches of a
//          head are then put together in order.
// Order    Stretches follow from the sizes and the ranges alone: the same bits for any thread
// count.

#include "attention.h"

namespace restore_ext::cpu {
namespace {

constexpr int64_t kStretch = 512;
static_assert(kStretch % kKeys == 0);

// What the stretches of all heads have summed: [B, Hkv, splits, rows, Dp + 2], the sum of values,
// then the maximum and the sum of weights.
struct Partial {
  int64_t splits, rows, D, Dp;
  std::vector<Range> hull;  // [B] of what the queries of an image see
  std::vector<float> memory;

  explicit Partial(const AttentionParams& p)
      : splits(0),
        rows(p.size.Hq / p.size.Hkv * p.size.Lq),
        D(p.size.D),
        Dp(round_up(p.size.D, kernels().lanes)),
        hull(p.size.B, Range{0, 0}) {
    for (int64_t b = 0; b < p.size.B; ++b) {
      for (int64_t i = 0; i < p.size.Lq; ++i) hull[b] = hull[b].hull(p.visible(b, i));
      splits = std::max(splits, ceil_div(hull[b].past - hull[b].first, kStretch));
    }
    memory.assign(p.size.B * p.size.Hkv * splits * rows * (Dp + 2), 0.f);
  }
  float* of(int64_t task) { return memory.data() + task * rows * (Dp + 2); }
};

struct Scratch {
  std::vector<float> query, key, value, bias;

  Scratch(int64_t rows, int64_t D)
      : query(rows * D), key(kKeys * D), value(kKeys * D), bias(rows * kKeys) {}
};

void attend(const AttentionParams& p, Partial& partial, int64_t task, Scratch& s) {
  const int64_t D = partial.D, rows = partial.rows, repeat = p.size.Hq / p.size.Hkv;
  const int64_t b = task / partial.splits / p.size.Hkv, h = task / partial.splits % p.size.Hkv;
  const Range hull = partial.hull[b];
  const int64_t start = hull.first + task % partial.splits * kStretch;
  float* out = partial.of(task);
  float* max = out + rows * partial.Dp;
  float* sum = max + rows;
  std::fill_n(max, rows, kNever);
  for (int64_t r = 0; r < rows; ++r) {
    p.query.read(b, h * repeat + r / p.size.Lq, r % p.size.Lq, D, &s.query[r * D]);
  }
  for (int64_t first = start; first < std::min(start + kStretch, hull.past); first += kKeys) {
    const Range keys{first, std::min({first + kKeys, start + kStretch, hull.past})};
    for (int64_t i = 0; i < p.size.Lq; ++i) {  // every head of the rows gains the same
      float* bias = &s.bias[i * kKeys];
      p.fill_bias(b, i, first, keys.past - first, p.visible(b, i).within(keys), bias);
      std::fill(bias + (keys.past - first), bias + kKeys, kNever);
    }
    for (int64_t r = p.size.Lq; r < rows; ++r) {
      std::copy_n(&s.bias[r % p.size.Lq * kKeys], kKeys, &s.bias[r * kKeys]);
    }
    const bool copy = p.has_padding(b, keys);
    DecodeTask block{
        .rows = rows,
        .keys = keys.past - first,
        .D = D,
        .Dp = partial.Dp,
        .query = s.query.data(),
        .key = nullptr,
        .value = nullptr,
        .key_stride = 0,
        .value_stride = 0,
        .bias = s.bias.data(),
        .bias_stride = kKeys,
        .scale = p.scale,
        .softcap = p.softcap,
        .out = out,
        .max = max,
        .sum = sum,
    };
    block.key = p.rows_of(p.key, b, h, keys, copy, s.key, block.key_stride);
    block.value = p.rows_of(p.value, b, h, keys, copy, s.value, block.value_stride);
    kernels().decode(block);
  }
}

// Puts the stretches of one row together, in order, into the first of them.
void combine(const AttentionParams& p, Partial& partial, int64_t head, int64_t r) {
  const int64_t Dp = partial.Dp, rows = partial.rows, repeat = p.size.Hq / p.size.Hkv;
  const auto out = [&](int64_t n) { return partial.of(head * partial.splits + n) + r * Dp; };
  const auto max = [&](int64_t n) -> float& {
    return partial.of(head * partial.splits + n)[rows * Dp + r];
  };
  const auto sum = [&](int64_t n) -> float& {
    return partial.of(head * partial.splits + n)[rows * (Dp + 1) + r];
  };
  std::vector<float> nothing(partial.splits ? 0 : Dp, 0.f);
  float* values = partial.splits ? out(0) : nothing.data();
  float most = kNever, weights = 0;
  for (int64_t n = 0; n < partial.splits; ++n) most = std::max(most, max(n));
  const float shift = most == kNever ? 0.f : most;
  for (int64_t n = 0; n < partial.splits; ++n) {
    const float share = std::exp(max(n) - shift);
    weights += share * sum(n);
    for (int64_t d = 0; d < p.size.D; ++d) {
      values[d] = (n ? values[d] : 0.f) + share * out(n)[d];
    }
  }
  const int64_t b = head / p.size.Hkv, h = head % p.size.Hkv;
  p.finish(b, h * repeat + r / p.size.Lq, r % p.size.Lq, most, weights, values);
}

}  // namespace

void attend_decode(const AttentionParams& p) {
  Partial partial(p);
  const int64_t heads = p.size.B * p.size.Hkv;
  torch::stable::parallel_for(0, heads * partial.splits, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(partial.rows, partial.D);
    for (int64_t task = begin; task < end; ++task) attend(p, partial, task, scratch);
  });
  torch::stable::parallel_for(0, heads * partial.rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) combine(p, partial, n / partial.rows, n % partial.rows);
  });
}

}  // namespace restore_ext::cpu
