// The same formula for few queries: one token or a short chunk against a long cache, which may lie
// in pages.
//
// Plan     A task owns a stretch of keys of one key head and the queries of all heads that read it,
//          in the order (head, query). Keys and values are read where they lie, in their own dtype,
//          once for every four queries; only rows that are none in memory are copied, 64 at a time.
//          The stretches of a head are then put together in order. Of many queries, as pages may
//          have them, a task owns 24 and all their keys.
// Skipped  Padding and pages that do not exist: the keys on either side are pieces of their own.
// Order    Stretches follow from the sizes and the ranges alone: the same bits for any thread
// count.

#include "attention.h"

namespace restore_ext::cpu {
namespace {

constexpr int64_t kStretch = 512;
constexpr int64_t kMostRows = 24;  // of one task
static_assert(kStretch % kKeys == 0);

// What the stretches of all heads have summed: [B, Hkv, splits, rows, Dp + 2], the sum of values,
// then the maximum and the sum of weights.
struct Partial {
  int64_t splits, stretch, rows, chunks, D, Dp;
  std::vector<Range> hull;  // [B] of what the queries of an image see
  std::vector<float> memory;

  explicit Partial(const AttentionParams& p)
      : splits(0),
        stretch(kStretch),
        rows(p.size.Hq / p.size.Hkv * p.size.Lq),
        chunks(ceil_div(rows, kMostRows)),
        D(p.size.D),
        Dp(round_up(p.size.D, kernels().lanes)),
        hull(p.size.B, Range{0, 0}) {
    int64_t longest = 0;
    for (int64_t b = 0; b < p.size.B; ++b) {
      for (int64_t i = 0; i < p.size.Lq; ++i) hull[b] = hull[b].hull(p.visible(b, i));
      longest = std::max(longest, hull[b].past - hull[b].first);
    }
    // Many queries are tasks enough, and their sums too large to have more than one of each.
    if (chunks > 1) stretch = std::max(stretch, round_up(longest, kKeys));
    splits = ceil_div(longest, stretch);
    memory.assign(p.size.B * p.size.Hkv * splits * rows * (Dp + 2), 0.f);
  }
  float* of(int64_t n) { return memory.data() + n * rows * (Dp + 2); }
};

struct Scratch {
  std::vector<float> query, key, value, bias;
  std::vector<Piece> pieces;

  explicit Scratch(int64_t D) : query(kMostRows * D), bias(kMostRows * kKeys) {}
};

// Where some keys or values of a run lie; a copy of them, if they are no rows in memory.
const void* rows_of(const Heads& heads, int64_t h, const Run& run, int64_t D, float* copy) {
  if (!copy) return heads.in_place(run.page, h, run.slot);
  for (int64_t t = 0; t < run.count; ++t) heads.read(run.page, h, run.slot + t, D, copy + t * D);
  return copy;
}

// Some keys of a row without what is padding, or does not exist.
void find_pieces(const AttentionParams& p, int64_t b, int64_t h, Range keys, bool copy,
                 Scratch& s) {
  const int64_t D = p.size.D;
  s.pieces.clear();
  p.each_run(b, keys, [&](const Run& run) {
    const float* size = p.log_size ? p.log_size + run.page * p.pages.page + run.slot : nullptr;
    for (int64_t first = 0, past; first < run.count; first = past) {
      const bool padding = size && size[first] == kNever;
      for (past = first + 1; past < run.count && size; ++past) {
        if ((size[past] == kNever) != padding) break;
      }
      if (!size) past = run.count;
      if (padding) continue;
      const Run some{run.page, run.slot + first, run.index + first, past - first};
      const int64_t column = some.index - keys.first;
      s.pieces.push_back(
          {.key = rows_of(p.key, h, some, D, copy ? &s.key[column * D] : nullptr),
           .value = rows_of(p.value, h, some, D, copy ? &s.value[column * D] : nullptr),
           .column = column,
           .count = some.count});
    }
  });
}

// The rows [begin, begin + rows) of key head h against the keys of one stretch.
void attend(const AttentionParams& p, Partial& partial, int64_t task, Scratch& s) {
  const int64_t begin = task % partial.chunks * kMostRows, part = task / partial.chunks;
  const int64_t D = partial.D, Dp = partial.Dp, Lq = p.size.Lq, repeat = p.size.Hq / p.size.Hkv;
  const int64_t rows = std::min(partial.rows - begin, kMostRows);
  const int64_t b = part / partial.splits / p.size.Hkv, h = part / partial.splits % p.size.Hkv;
  float* out = partial.of(part) + begin * Dp;
  float* max = partial.of(part) + partial.rows * Dp + begin;
  float* sum = max + partial.rows;
  std::fill_n(max, rows, kNever);
  Range seen{0, 0};
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = begin + r;
    p.query.read(b, h * repeat + row / Lq, row % Lq, D, &s.query[r * D]);
    seen = seen.hull(p.visible(b, row % Lq));
  }
  const bool copy = p.key.stride_d != 1 || p.value.stride_d != 1;
  if (copy) s.key.resize(kKeys * D), s.value.resize(kKeys * D);

  const int64_t start = partial.hull[b].first + part % partial.splits * partial.stretch;
  const int64_t past = std::min(start + partial.stretch, seen.past);
  for (int64_t first = start; first < past; first += kKeys) {
    const Range keys{first, std::min(first + kKeys, past)};
    find_pieces(p, b, h, keys, copy, s);
    if (s.pieces.empty()) continue;
    for (int64_t r = 0; r < rows; ++r) {
      float* bias = &s.bias[r * kKeys];
      if (r >= Lq) {  // every head of a query gains the same
        std::copy_n(bias - Lq * kKeys, kKeys, bias);
        continue;
      }
      const int64_t i = (begin + r) % Lq;
      p.fill_bias(b, i, first, keys.past - first, p.visible(b, i), bias);
      std::fill(bias + (keys.past - first), bias + kKeys, kNever);
    }
    kernels().decode({
        .rows = rows,
        .keys = keys.past - first,
        .D = D,
        .Dp = Dp,
        .query = s.query.data(),
        .pieces = s.pieces.data(),
        .count = static_cast<int64_t>(s.pieces.size()),
        .element = copy ? Element::kFloat : p.key.element(),
        .key_stride = copy ? D : p.key.stride_l,
        .value_stride = copy ? D : p.value.stride_l,
        .bias = s.bias.data(),
        .bias_stride = kKeys,
        .scale = p.scale,
        .softcap = p.softcap,
        .out = out,
        .max = max,
        .sum = sum,
    });
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
  p.finish(b, h * repeat + r / p.size.Lq, r % p.size.Lq, most, weights, weights, values);
}

}  // namespace

void attend_decode(const AttentionParams& p) {
  Partial partial(p);
  const int64_t heads = p.size.B * p.size.Hkv;
  const int64_t tasks = heads * partial.splits * partial.chunks;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(partial.D);
    for (int64_t task = begin; task < end; ++task) attend(p, partial, task, scratch);
  });
  torch::stable::parallel_for(0, heads * partial.rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) combine(p, partial, n / partial.rows, n % partial.rows);
  });
}

}  // namespace restore_ext::cpu
