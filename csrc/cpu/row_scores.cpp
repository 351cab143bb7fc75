// score[k] = sum over r of weight[r] * mean over heads h of softmax_k(logit[h, r, k])
//
// Plan     The products twice, so that no more than a block of them is ever stored. First, of every
//          row of every head, the maximum of its logits and the sum of exp(logit - maximum): a task
//          owns 96 rows of 8 heads and, where rows are few, 512 of the keys. Then a task owns 64
//          keys and adds up what all rows give them. What logits gain is the same in every head
//          and written down once. Many rows of a key head meet its keys packed, 6 at a time; few
//          take dot products with them where they lie.
// Skipped  Rows of weight 0, keys outside of what a row sees; a padding key is never read.
// Order    Tasks follow from the sizes alone, columns are added in float64, head by head, row by
// row:
//          the same bits for any thread count.
// NaN      A row that sees a NaN logit gives NaN to all keys that it sees.

#include "../contracts/row_scores.h"
#include "../library.h"
#include "attention.h"
#include "rows.h"

namespace restore_ext::cpu {
namespace {

using contract::OptionalTensor;

constexpr int64_t kChunk = 96;       // rows whose bias lies near the core
constexpr int64_t kHeads = 8;        // about, of a task
constexpr int64_t kStretch = 512;    // keys of a task, where rows are few
constexpr int64_t kRowsToPack = 12;  // of a key head: with fewer, packing costs more than it saves
static_assert(kChunk % kRows == 0 && kStretch % kKeys == 0);

// Of a row, or of a stretch of it: the maximum, and the sum of exp(logit - maximum).
struct Sums {
  float max = kNever, sum = 0.f;
};

// What a logit of a row counts for: factor * exp(logit - max).
struct Share {
  float max, factor;
};

struct RowScoresParams {
  AttentionParams attention;  // of R = Lq rows and K = Lk keys
  const float* weight;        // [B, R]; nullptr: 1 / R each
  int64_t repeat;             // query heads of a key head

  float weight_of(int64_t b, int64_t r) const {
    const int64_t R = attention.size.Lq;
    return weight ? weight[b * R + r] : 1.f / static_cast<float>(R);
  }
  Range seen(int64_t b, int64_t r) const {
    return weight_of(b, r) == 0.f ? Range{0, 0} : attention.visible(b, r);
  }
  int64_t row(int64_t b, int64_t h, int64_t r) const {
    return (b * attention.size.Hq + h) * attention.size.Lq + r;
  }
};

// A chunk of rows and a block of keys, as one thread works on them.
struct Tile {
  const RowScoresParams& p;
  const int64_t D, R;
  int64_t b = 0, begin = 0;  // the first row
  Range hull{0, 0};          // of what the rows see
  Range keys{0, 0};
  bool padded = false;
  Range seen[kChunk];
  std::vector<float> bias, query, key, panels;
  alignas(64) float product[kRows * kKeys] = {};

  explicit Tile(const RowScoresParams& p)
      : p(p),
        D(p.attention.size.D),
        R(p.attention.size.Lq),
        bias(kChunk * kKeys),
        query(kRows * D),
        key(kKeys * D),
        panels(kKeys * D) {}

  void take_rows(int64_t image, int64_t first) {
    b = image;
    begin = first;
    hull = {0, 0};
    for (int64_t r = 0; r < kChunk; ++r) {
      seen[r] = begin + r < R ? p.seen(b, begin + r) : Range{0, 0};
      hull = hull.hull(seen[r]);
    }
  }
  void take_keys(Range wanted) {
    keys = wanted;
    padded = p.attention.has_padding(b, keys);
    for (int64_t r = 0; r < kChunk; ++r) {
      if (!sees(r)) continue;
      float* own = &bias[r * kKeys];
      p.attention.fill_bias(b, begin + r, keys.first, count(), seen[r].within(keys), own);
      std::fill(own + count(), own + kKeys, kNever);
    }
  }
  int64_t count() const { return keys.past - keys.first; }
  int64_t vectors() const { return round_up(count(), kernels().lanes); }
  bool sees(int64_t r) const { return !seen[r].within(keys).empty(); }

  // body(query head, row of the chunk, products with the keys) for every row that sees one of them.
  template <typename Body>
  void multiply(int64_t key_head, const Body& body) {
    int64_t stride = 0;
    const float* rows =
        p.attention.rows_of(p.attention.key, b, key_head, keys, padded, key, stride);
    const bool pack = R * p.repeat >= kRowsToPack;
    if (pack) kernels().pack(rows, stride, count(), D, panels.data());
    for (int64_t h = key_head * p.repeat; h < (key_head + 1) * p.repeat; ++h) {
      for (int64_t first = 0; first < kChunk; first += kRows) {
        multiply_six(h, first, pack ? nullptr : rows, stride, body);
      }
    }
  }

 private:
  template <typename Body>
  void multiply_six(int64_t h, int64_t first, const float* rows, int64_t stride, const Body& body) {
    bool any = false;
    for (int64_t r = 0; r < kRows; ++r) {
      float* to = &query[r * D];
      if (sees(first + r)) {
        p.attention.query.read(b, h, begin + first + r, D, to);
        if (rows) kernels().dot_rows(to, rows, stride, count(), D, product + r * kKeys);
        any = true;
      } else {
        std::fill_n(to, D, 0.f);
      }
    }
    if (!any) return;
    const int64_t panel = kernels().panel;
    for (int64_t column = 0; !rows && column < count(); column += panel) {
      kernels().multiply(query.data(), D, &panels[column * D], D, product + column, kKeys, false);
    }
    for (int64_t r = 0; r < kRows; ++r) {
      if (sees(first + r)) body(h, first + r, product + r * kKeys);
    }
  }
};

// The sums of all rows, [B, Hq, R, splits].
std::vector<Sums> sum_rows(const RowScoresParams& p, int64_t splits) {
  const Sizes& size = p.attention.size;
  const int64_t heads = std::max<int64_t>(kHeads / p.repeat, 1);  // key heads of a task
  const int64_t chunks = ceil_div(size.Lq, kChunk), groups = ceil_div(size.Hkv, heads);
  const int64_t stretch = splits == 1 ? size.Lk : kStretch;
  std::vector<Sums> sums(size.B * size.Hq * size.Lq * splits);
  const auto run = [&](Tile& tile, int64_t task) {
    const int64_t split = task % splits, group = task / splits % groups;
    tile.take_rows(task / splits / groups / chunks, task / splits / groups % chunks * kChunk);
    const Range own = tile.hull.within({split * stretch, (split + 1) * stretch});
    for (int64_t first = own.first; first < own.past; first += kKeys) {
      tile.take_keys({first, std::min(first + kKeys, own.past)});
      for (int64_t h = group * heads; h < std::min((group + 1) * heads, size.Hkv); ++h) {
        tile.multiply(h, [&](int64_t h, int64_t r, float* product) {
          Sums& row = sums[p.row(tile.b, h, tile.begin + r) * splits + split];
          kernels().sum_weights(product, &tile.bias[r * kKeys], tile.vectors(), p.attention.scale,
                                p.attention.softcap, row.max, row.sum);
        });
      }
    }
  };
  torch::stable::parallel_for(0, size.B * chunks * groups * splits, 1,
                              [&](int64_t begin, int64_t end) {
                                Tile tile(p);
                                for (int64_t task = begin; task < end; ++task) run(tile, task);
                              });
  return sums;
}

// Puts the stretches of every row together, in order: [B, Hq, R].
std::vector<Share> share_rows(const RowScoresParams& p, const std::vector<Sums>& sums,
                              int64_t splits) {
  const int64_t R = p.attention.size.Lq, Hq = p.attention.size.Hq;
  std::vector<Share> shares(sums.size() / splits);
  each(static_cast<int64_t>(shares.size()), 16 * splits, [&](int64_t n) {
    const Sums* row = &sums[n * splits];
    float max = kNever, sum = 0;
    for (int64_t split = 0; split < splits; ++split) max = std::max(max, row[split].max);
    const float shift = max == kNever ? 0.f : max;
    for (int64_t split = 0; split < splits; ++split) {
      sum += row[split].sum * std::exp(row[split].max - shift);
    }
    const float weight = p.weight_of(n / R / Hq, n % R);
    // One that sees nothing, or is left out, gives nothing.
    shares[n] = {shift, sum == 0.f ? 0.f : weight / (sum * static_cast<float>(Hq))};
  });
  return shares;
}

void add_columns(const RowScoresParams& p, const std::vector<Share>& shares, Tile& tile, int64_t b,
                 Range block, float* score) {
  const Sizes& size = p.attention.size;
  double total[kKeys] = {};
  for (int64_t begin = 0; begin < size.Lq; begin += kChunk) {
    tile.take_rows(b, begin);
    const Range keys = tile.hull.within(block);
    if (keys.empty()) continue;
    tile.take_keys(keys);
    double* own = total + (keys.first - block.first);
    for (int64_t h = 0; h < size.Hkv; ++h) {
      tile.multiply(h, [&](int64_t h, int64_t r, float* product) {
        const Share share = shares[p.row(b, h, begin + r)];
        if (share.factor == 0.f) return;
        kernels().share_weights(product, &tile.bias[r * kKeys], tile.vectors(), p.attention.scale,
                                p.attention.softcap, share.max, share.factor);
        for (int64_t j = 0; j < tile.count(); ++j) own[j] += product[j];
      });
    }
  }
  for (int64_t j = block.first; j < block.past; ++j) {
    score[b * size.Lk + j] = static_cast<float>(total[j - block.first]);
  }
}

Tensor row_scores_cpu(Tensor query, Tensor key, OptionalTensor weight, OptionalTensor log_size,
                      OptionalTensor query_position, OptionalTensor key_position,
                      OptionalTensor decay, OptionalTensor key_range, double softcap,
                      std::optional<double> scale) {
  const Sizes size = contract::row_scores(query, key, weight, log_size, query_position,
                                          key_position, decay, key_range, softcap);
  const Tensor score = torch::stable::new_empty(key, {size.B, size.Lk}, ScalarType::Float);
  if (size.B * size.Lk == 0) return score;
  if (weight) weight = torch::stable::contiguous(*weight);
  AttentionArguments given{log_size, query_position, key_position, decay, key_range, {}};
  const RowScoresParams p{
      .attention = given.params(size, query, key, key, softcap, scale),
      .weight = weight ? weight->const_data_ptr<float>() : nullptr,
      .repeat = size.Hq / size.Hkv,
  };
  const int64_t splits = size.Lq < kChunk ? ceil_div(size.Lk, kStretch) : 1;
  const std::vector<Share> shares = share_rows(p, sum_rows(p, splits), splits);

  float* to = score.mutable_data_ptr<float>();
  const int64_t blocks = ceil_div(size.Lk, kKeys);
  torch::stable::parallel_for(0, size.B * blocks, 1, [&](int64_t begin, int64_t end) {
    Tile tile(p);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % blocks * kKeys;
      const Range block{first, std::min(first + kKeys, size.Lk)};
      add_columns(p, shares, tile, task / blocks, block, to);
    }
  });
  return score;
}

}  // namespace

RESTORE_EXT_CPU_BODY(row_scores)

}  // namespace restore_ext::cpu
