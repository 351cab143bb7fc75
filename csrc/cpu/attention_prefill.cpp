// out[i] = sum over j of softmax_j(softcap(scale * q_i.k_j) + log_size_j + log(2 - decay_ij)) * v_j
//
// Plan     Keys are packed once a key head: in panels as wide as a register tile, so that the inner
//          loop reads one line after another; values as float32 rows. A task then owns 48 queries
//          of 8 heads. What their logits gain is the same in every head: it is written down once, a
//          stretch of keys at a time, and each head walks the stretch block by block with a running
//          maximum and sum (online softmax).
// Skipped  Keys before the first or past the last that some query sees; in a block, what 6
//          neighbouring queries do not see. The value of a padding key is never read.
// Order    Blocks follow from the sizes and the ranges alone: the same bits for any thread count.
// NaN      A row that sees a NaN logit is NaN; one that sees nothing is 0, its lse -inf.

#include "attention.h"

namespace restore_ext::cpu {
namespace {

constexpr int64_t kHeads = 8;       // of one task
constexpr int64_t kStretch = 1024;  // keys whose bias fits near the core
static_assert(kStretch % kKeys == 0 && kQueries % kRows == 0);

// All keys and values of the call, as kernels read them; those of image b from hull[b].first on.
struct Packed {
  std::vector<Range> hull;  // [B] of what the queries of an image see
  int64_t blocks = 0, D, Dp;
  Tensor memory;
  float *key, *value;

  explicit Packed(const AttentionParams& p, const Tensor& like)
      : hull(p.size.B, Range{0, 0}), D(p.size.D), Dp(round_up(p.size.D, kernels().lanes)) {
    for (int64_t b = 0; b < p.size.B; ++b) {
      for (int64_t i = 0; i < p.size.Lq; ++i) hull[b] = hull[b].hull(p.visible(b, i));
      blocks = std::max(blocks, ceil_div(hull[b].past - hull[b].first, kKeys));
    }
    const int64_t rows = p.size.B * p.size.Hkv * blocks * kKeys;
    memory = torch::stable::new_empty(like, {rows * (D + Dp)}, ScalarType::Float);
    key = memory.mutable_data_ptr<float>();
    value = key + rows * D;
    torch::stable::parallel_for(0, p.size.B * p.size.Hkv * blocks, 1,
                                [&](int64_t begin, int64_t end) {
                                  std::vector<float> rows(kKeys * D);
                                  for (int64_t n = begin; n < end; ++n) pack(p, n, rows.data());
                                });
  }

  int64_t first_row(int64_t b, int64_t h, int64_t Hkv) const {
    return (b * Hkv + h) * blocks * kKeys;
  }

 private:
  void pack(const AttentionParams& p, int64_t n, float* rows) {
    const int64_t b = n / blocks / p.size.Hkv, h = n / blocks % p.size.Hkv;
    const int64_t first = hull[b].first + n % blocks * kKeys;
    const int64_t count = std::clamp<int64_t>(hull[b].past - first, 0, kKeys);
    for (int64_t j = 0; j < count; ++j) {
      float* to = value + (n * kKeys + j) * Dp;
      const bool padding = p.is_padding(b, first + j);
      if (padding) {
        std::fill_n(to, D, 0.f);
        std::fill_n(rows + j * D, D, 0.f);
      } else {
        p.value.read(b, h, first + j, D, to);
        p.key.read(b, h, first + j, D, rows + j * D);
      }
      std::fill(to + D, to + Dp, 0.f);
    }
    kernels().pack(rows, D, count, D, key + n * kKeys * D);
  }
};

// What one thread works with; allocated once for all its tasks.
struct Scratch {
  std::vector<float> query, bias, out, max, sum;
  Range seen[kQueries];  // by the queries of the task
  Range here[kQueries];  // of it, in the stretch

  Scratch(int64_t D, int64_t Dp)
      : query(kQueries * D),
        bias(kQueries * kStretch),
        out(kHeads * kQueries * Dp),
        max(kHeads * kQueries),
        sum(kHeads * kQueries) {}
};

void attend(const AttentionParams& p, const Packed& packed, int64_t b, int64_t begin, Range heads,
            Scratch& s) {
  const int64_t D = packed.D, Dp = packed.Dp;
  const int64_t rows = std::min<int64_t>(kQueries, p.size.Lq - begin);
  const int64_t repeat = p.size.Hq / p.size.Hkv, origin = packed.hull[b].first;
  Range hull{0, 0};
  for (int64_t r = 0; r < kQueries; ++r) {
    s.seen[r] = r < rows ? p.visible(b, begin + r) : Range{0, 0};
    hull = hull.hull(s.seen[r]);
  }
  std::fill(s.out.begin(), s.out.end(), 0.f);
  std::fill(s.max.begin(), s.max.end(), kNever);
  std::fill(s.sum.begin(), s.sum.end(), 0.f);

  const int64_t start = origin + (hull.first - origin) / kStretch * kStretch;
  for (int64_t first = start; first < hull.past; first += kStretch) {
    const Range stretch = Range{first, first + kStretch}.within(hull);
    // Blocks begin at multiples of kKeys from `first`, and no vector of one is left unwritten.
    const int64_t lead = (stretch.first - first) / kKeys * kKeys;
    const int64_t width = round_up(stretch.past - first, kKeys) - lead;
    for (int64_t r = 0; r < kQueries; ++r) {
      const Range seen = s.seen[r].within(stretch);
      s.here[r] = seen.empty() ? Range{0, 0} : Range{seen.first - first, seen.past - first};
      p.fill_bias(b, begin + r, first + lead, width, seen, &s.bias[r * kStretch + lead]);
    }
    for (int64_t h = heads.first; h < heads.past; ++h) {
      for (int64_t r = 0; r < rows; ++r) p.query.read(b, h, begin + r, D, &s.query[r * D]);
      std::fill(s.query.begin() + rows * D, s.query.end(), 0.f);
      const int64_t slot = (h - heads.first) * kQueries;
      const int64_t row = packed.first_row(b, h / repeat, p.size.Hkv) + (first - origin);
      kernels().attend({
          .D = D,
          .Dp = Dp,
          .query = s.query.data(),
          .key = packed.key + row * D,
          .value = packed.value + row * Dp,
          .bias = s.bias.data(),
          .bias_stride = kStretch,
          .seen = s.here,
          .hull = {stretch.first - first, stretch.past - first},
          .scale = p.scale,
          .softcap = p.softcap,
          .out = &s.out[slot * Dp],
          .max = &s.max[slot],
          .sum = &s.sum[slot],
      });
    }
  }
  for (int64_t h = heads.first; h < heads.past; ++h) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t slot = (h - heads.first) * kQueries + r;
      p.finish(b, h, begin + r, s.max[slot], s.sum[slot], &s.out[slot * Dp]);
    }
  }
}

}  // namespace

void attend_prefill(const AttentionParams& p, const Tensor& like) {
  const Packed packed(p, like);
  const int64_t blocks = ceil_div(p.size.Lq, kQueries), chunks = ceil_div(p.size.Hq, kHeads);
  torch::stable::parallel_for(0, p.size.B * blocks * chunks, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(packed.D, packed.Dp);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task % chunks, block = task / chunks % blocks;
      const Range heads{chunk * kHeads, std::min((chunk + 1) * kHeads, p.size.Hq)};
      attend(p, packed, task / chunks / blocks, block * kQueries, heads, scratch);
    }
  });
}

}  // namespace restore_ext::cpu
