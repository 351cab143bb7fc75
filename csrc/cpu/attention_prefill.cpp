// out[i] = sum over j of softmax_j(softcap(scale * q_i.k_j) + log_size_j + log(2 - decay_ij)) * v_j
//
// Plan     Keys are packed once a key head: in panels as wide as a register tile, so that the inner
//          loop reads one line after another; values as rows. They are float32; or, where all is
//          bfloat16 and the processor multiplies it in pairs, pairs of channels and of values, and
//          weights are rounded to bfloat16 for their product. A task then owns 48 queries
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
template <typename T>
struct Packed {
  static constexpr int64_t kTerms = kTermsOf<T>;
  std::vector<Range> hull;  // [B] of what the queries of an image see
  int64_t blocks = 0, D, Dp;
  Tensor memory;
  T *key, *value;

  explicit Packed(const AttentionParams& p, const Tensor& like)
      : hull(p.size.B, Range{0, 0}), D(p.size.D), Dp(round_up(p.size.D, kernels().lanes)) {
    for (int64_t b = 0; b < p.size.B; ++b) {
      for (int64_t i = 0; i < p.size.Lq; ++i) hull[b] = hull[b].hull(p.visible(b, i));
      blocks = std::max(blocks, ceil_div(hull[b].past - hull[b].first, kKeys));
    }
    static_assert(sizeof(T) == sizeof(float));
    const int64_t all = p.size.B * p.size.Hkv * blocks;
    memory = torch::stable::new_empty(like, {all * block() * (D + Dp)}, ScalarType::Float);
    key = static_cast<T*>(memory.mutable_data_ptr());
    value = key + all * block() * D;
    torch::stable::parallel_for(0, all, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> rows(kKeys * D), spare(kTerms == 1 ? 0 : kKeys * Dp);
      for (int64_t n = begin; n < end; ++n) pack(p, n, rows.data(), spare.data());
    });
  }

  // Rows of the memory that a block of keys takes, and the first row of a head.
  static constexpr int64_t block() { return kKeys / kTerms; }
  int64_t first_row(int64_t b, int64_t h, int64_t Hkv) const {
    return (b * Hkv + h) * blocks * block();
  }

 private:
  void pack(const AttentionParams& p, int64_t n, float* rows, float* spare) {
    const int64_t b = n / blocks / p.size.Hkv, h = n / blocks % p.size.Hkv;
    const int64_t first = hull[b].first + n % blocks * kKeys;
    const int64_t count = std::clamp<int64_t>(hull[b].past - first, 0, kKeys);
    T *keys = key + n * block() * D, *values = value + n * block() * Dp;
    if constexpr (kTerms == 1) {
      read(p.value, p, b, h, {first, first + count}, values, Dp);
      read(p.key, p, b, h, {first, first + count}, rows, D);
      kernels().pack(rows, D, count, D, keys);
    } else {
      const PairKernels& pairs = *kernels().pairs;
      read(p.value, p, b, h, {first, first + count}, spare, Dp);
      std::fill(spare + count * Dp, spare + kKeys * Dp, 0.f);
      for (int64_t j = 0; j < kKeys; j += 2) {
        pairs.interleave(spare + j * Dp, spare + (j + 1) * Dp, Dp, values + j / 2 * Dp);
      }
      read(p.key, p, b, h, {first, first + count}, rows, D);
      kernels().pack(rows, D, count, D, spare);
      const int64_t panel = kernels().panel;
      for (int64_t line = 0; line < kKeys / panel * D; line += 2) {
        pairs.interleave(spare + line * panel, spare + (line + 1) * panel, panel,
                         keys + line / 2 * panel);
      }
    }
  }
  // Some keys or values as rows of `stride` floats: zeros past D, and of what is padding.
  static void read(const Heads& heads, const AttentionParams& p, int64_t b, int64_t h, Range tokens,
                   float* to, int64_t stride) {
    const int64_t D = p.size.D;
    for (int64_t j = tokens.first; j < tokens.past; ++j, to += stride) {
      const bool padding = p.is_padding(b, j);
      if (!padding) heads.read(b, h, j, D, to);
      std::fill(to + (padding ? 0 : D), to + stride, 0.f);
    }
  }
};

// What one thread works with; allocated once for all its tasks.
template <typename T>
struct Scratch {
  std::vector<T> query;
  std::vector<float> row, bias, out, max, sum, rounded;
  Range seen[kQueries];  // by the queries of the task
  Range here[kQueries];  // of it, in the stretch

  Scratch(int64_t D, int64_t Dp)
      : query(kQueries * D / kTermsOf<T>),
        row(D),
        bias(kQueries * kStretch),
        out(kHeads * kQueries * Dp),
        max(kHeads * kQueries),
        sum(kHeads * kQueries),
        rounded(kHeads * kQueries) {}

  void take_query(const AttentionParams& p, int64_t b, int64_t h, int64_t i, float* to) {
    p.query.read(b, h, i, p.size.D, to);
  }
  void take_query(const AttentionParams& p, int64_t b, int64_t h, int64_t i, Pair* to) {
    p.query.read(b, h, i, p.size.D, row.data());
    kernels().pairs->round(row.data(), p.size.D, to);
  }
};

template <typename T>
void attend(const AttentionParams& p, const Packed<T>& packed, int64_t b, int64_t begin,
            Range heads, Scratch<T>& s) {
  const int64_t D = packed.D / kTermsOf<T>, Dp = packed.Dp;
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
  std::fill(s.rounded.begin(), s.rounded.end(), 0.f);

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
      for (int64_t r = 0; r < rows; ++r) s.take_query(p, b, h, begin + r, &s.query[r * D]);
      std::fill(s.query.begin() + rows * D, s.query.end(), T{});
      const int64_t slot = (h - heads.first) * kQueries;
      const int64_t row =
          packed.first_row(b, h / repeat, p.size.Hkv) + (first - origin) / kTermsOf<T>;
      const AttendTask<T> task{
          .D = D,
          .Dp = Dp,
          .query = s.query.data(),
          .key = packed.key + row * packed.D,
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
          .rounded = &s.rounded[slot],
      };
      if constexpr (kTermsOf<T> == 1) {
        kernels().attend(task);
      } else {
        kernels().pairs->attend(task);
      }
    }
  }
  for (int64_t h = heads.first; h < heads.past; ++h) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t slot = (h - heads.first) * kQueries + r;
      const float weights = kTermsOf<T> == 1 ? s.sum[slot] : s.rounded[slot];
      p.finish(b, h, begin + r, s.max[slot], s.sum[slot], weights, &s.out[slot * Dp]);
    }
  }
}

template <typename T>
void attend_all(const AttentionParams& p, const Tensor& like) {
  const Packed<T> packed(p, like);
  const int64_t blocks = ceil_div(p.size.Lq, kQueries), chunks = ceil_div(p.size.Hq, kHeads);
  torch::stable::parallel_for(0, p.size.B * blocks * chunks, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(packed.D, packed.Dp);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task % chunks, block = task / chunks % blocks;
      const Range heads{chunk * kHeads, std::min((chunk + 1) * kHeads, p.size.Hq)};
      attend(p, packed, task / chunks / blocks, block * kQueries, heads, scratch);
    }
  });
}

}  // namespace

void attend_prefill(const AttentionParams& p, const Tensor& like) {
  if (kernels().pairs && p.query.dtype == ScalarType::BFloat16) return attend_all<Pair>(p, like);
  attend_all<float>(p, like);
}

}  // namespace restore_ext::cpu
