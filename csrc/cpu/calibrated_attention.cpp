// out[i] = sum over j of softmax_j(softcap(scale * q_i.k_j) + log_size_j + log(2 - decay_ij)) * v_j
//
// Plan     A task owns 64 queries of one head and walks the keys they see, 64 at a time, with a
//          running maximum and sum (online softmax). Keys are transposed on the way in: then both
//          products are the same small one, 4 rows by 8 columns of sums that stay in registers.
// Skipped  Keys before the first or past the last that some query of the task sees; blocks of
//          padding; in a block, what 4 neighbouring queries do not see. None of it is computed, and
//          padding is never read.
// Order    Blocks follow from the sizes and the ranges alone: the same bits for any thread count.
// NaN      A row that sees a NaN logit is NaN; one that sees nothing is 0, its lse -inf.

#include "../contracts/calibrated_attention.h"
#include "../library.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

namespace restore_ext {
namespace {

constexpr int kQueries = 64;  // of one task
constexpr int kKeys = 64;     // in one block
constexpr int kRows = 4, kColumns = 8;
constexpr float kNever = -std::numeric_limits<float>::infinity();

using Sizes = contract::CalibratedAttentionSizes;

struct Range {
  int64_t first, past;

  Range hull(Range other) const {
    if (other.first >= other.past) return *this;
    if (first >= past) return other;
    return {std::min(first, other.first), std::max(past, other.past)};
  }
  Range within(Range other) const {
    return {std::max(first, other.first), std::min(past, other.past)};
  }
};

struct Positions {
  const int32_t* data;         // [B, G, L]; nullptr: the index counts
  int64_t stride_b, stride_g;  // stride_g 0: the same on every axis
  int64_t start;               // the first index

  int32_t at(int64_t b, int64_t g, int64_t i) const {
    return data ? data[b * stride_b + g * stride_g + i] : static_cast<int32_t>(start + i);
  }
};

template <typename T>
struct Heads {
  const T* data;  // [B, H, L, D]
  int64_t stride_b, stride_h, stride_l, stride_d;

  explicit Heads(const Tensor& t)
      : data(static_cast<const T*>(t.const_data_ptr())),
        stride_b(t.stride(0)),
        stride_h(t.stride(1)),
        stride_l(t.stride(2)),
        stride_d(t.stride(3)) {}

  const T* row(int64_t b, int64_t h, int64_t i) const {
    return data + b * stride_b + h * stride_h + i * stride_l;
  }
};

template <typename T>
struct CalibratedAttentionParams {
  Sizes size;
  Heads<T> query, key, value;
  const float* log_size;  // [B, Lk]; nullptr: zeros
  Positions query_position, key_position;
  const float* decay;        // [G, P]; nullptr: no distance term
  bool decay_is_log;         // then it holds log(2 - decay)
  const int32_t* key_range;  // [B, Lq, 2]; nullptr: all
  bool causal;
  float softcap, scale;
  T* out;      // [B, Hq, Lq, D]
  float* lse;  // [B, Hq, Lq]

  Range visible(int64_t b, int64_t i) const {
    Range range{0, size.Lk};
    if (causal) range.past = std::min(range.past, i + size.Lk - size.Lq + 1);
    if (!key_range) return range;
    const int32_t* own = key_range + (b * size.Lq + i) * 2;
    return range.within({own[0], own[1]});
  }
};

// What one thread works with; allocated once for all its tasks.
struct Scratch {
  std::vector<float> query, out;  // [kQueries, D]
  std::vector<float> key;         // [D, kKeys]
  std::vector<float> value;       // [kKeys, D]
  std::vector<int32_t> position;  // [G, kKeys]
  float log_size[kKeys], bias[kKeys], logit[kRows * kKeys];
  float max[kQueries], sum[kQueries];
  Range range[kQueries];

  Scratch(int64_t D, int64_t G)
      : query(kQueries * D),
        out(kQueries * D),
        key(D * kKeys),
        value(kKeys * D),
        position(G * kKeys) {}
};

// Four lanes, which every processor has. Written out, since compilers miss them in these loops.
typedef float Quad __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint32_t QuadBits __attribute__((vector_size(16)));
inline const Quad& quad(const float* four) { return *reinterpret_cast<const Quad*>(four); }
inline Quad& quad(float* four) { return *reinterpret_cast<Quad*>(four); }

// exp(x) for x <= 0, to about an ulp; NaN stays NaN.
inline Quad exp_of_negative(Quad x) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: what is added to it is rounded to an integer
  const Quad shifted = x * 1.44269504f + kRound;
  const Quad n = shifted - kRound;
  const Quad r = (x - n * 0x1.62e4p-1f) - n * 1.42860682e-6f;  // x - n log 2, in two exact steps
  Quad y = r * (1.f / 5040) + 1.f / 720;                       // the series of exp, |r| <= 0.35
  y = y * r + 1.f / 120;
  y = y * r + 1.f / 24;
  y = y * r + 1.f / 6;
  y = y * r + 1.f / 2;
  y = (y * r + 1.f) * r + 1.f;
  const Quad power = std::bit_cast<Quad>((std::bit_cast<QuadBits>(shifted) + 127) << 23);  // 2^n
  return x < -87.f ? Quad{} : y * power;
}

// c[kRows, columns] += a[kRows, inner] . b[inner, columns], columns a multiple of kColumns. Short
// sums of sums: the rounding error grows with the longer of the two, not with their product.
void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
              int64_t c_stride, int64_t inner, int64_t columns) {
  constexpr int kQuads = kColumns / 4, kTerms = 16;
  for (int64_t column = 0; column < columns; column += kColumns) {
    for (int64_t first = 0; first < inner; first += kTerms) {
      Quad sum[kRows][kQuads] = {};
      for (int64_t i = first; i < std::min(first + kTerms, inner); ++i) {
        const float* b_row = b + i * b_stride + column;
        for (int r = 0; r < kRows; ++r) {
          for (int x = 0; x < kQuads; ++x) sum[r][x] += a[r * a_stride + i] * quad(b_row + 4 * x);
        }
      }
      for (int r = 0; r < kRows; ++r) {
        float* c_row = c + r * c_stride + column;
        for (int x = 0; x < kQuads; ++x) quad(c_row + 4 * x) += sum[r][x];
      }
    }
  }
}

// The block's keys and values as float32; under padding the values are zeros and the keys whatever
// was there, as their bias of -inf stands for any logit. False: nothing but padding.
template <typename T>
bool load_keys(const CalibratedAttentionParams<T>& p, int64_t b, int64_t h, Range keys,
               Scratch& s) {
  const int64_t D = p.size.D;
  bool any = false;
  for (int64_t j = keys.first; j < keys.past; ++j) {
    const int64_t column = j - keys.first;
    float* value = &s.value[column * D];
    s.log_size[column] = p.log_size ? p.log_size[b * p.size.Lk + j] : 0.f;
    if (s.log_size[column] == kNever) {
      std::fill_n(value, D, 0.f);
      continue;
    }
    any = true;
    const T* key_row = p.key.row(b, h, j);
    const T* value_row = p.value.row(b, h, j);
    for (int64_t d = 0; d < D; ++d) {
      s.key[d * kKeys + column] = static_cast<float>(key_row[d * p.key.stride_d]);
    }
    for (int64_t d = 0; d < D; ++d) value[d] = static_cast<float>(value_row[d * p.value.stride_d]);
    for (int64_t g = 0; g < p.size.G; ++g) {
      s.position[g * kKeys + column] = p.key_position.at(b, g, j);
    }
  }
  return any;
}

// What query i's logits gain over `columns` of the block: log_size + log(2 - decay), and -inf where
// the key is not `seen`.
template <typename T>
void fill_bias(const CalibratedAttentionParams<T>& p, int64_t b, int64_t i, Range columns,
               Range seen, Scratch& s) {
  if (seen.first >= seen.past) seen = {columns.past, columns.past};
  std::fill(s.bias + columns.first, s.bias + seen.first, kNever);
  std::copy(s.log_size + seen.first, s.log_size + seen.past, s.bias + seen.first);
  std::fill(s.bias + seen.past, s.bias + columns.past, kNever);
  if (!p.decay) return;

  const auto last = static_cast<uint32_t>(std::min<int64_t>(p.size.P - 1, UINT32_MAX));
  float rho[kKeys] = {};
  for (int64_t g = 0; g < p.size.G; ++g) {
    const float* decay = p.decay + g * p.size.P;
    const int32_t* at_key = s.position.data() + g * kKeys;
    const int32_t at_query = p.query_position.at(b, g, i);
    for (int64_t j = seen.first; j < seen.past; ++j) {
      // Unsigned: the distance of two int32 may pass 2^31.
      const auto high = static_cast<uint32_t>(std::max(at_query, at_key[j]));
      const auto low = static_cast<uint32_t>(std::min(at_query, at_key[j]));
      rho[j] += decay[std::min(high - low, last)];
    }
  }
  for (int64_t j = seen.first; j < seen.past; ++j) {
    s.bias[j] += p.decay_is_log ? rho[j] : std::log(2.f - rho[j]);
  }
}

// Turns `columns` of a row of products into weights exp(logit - max), and rescales to the new
// maximum what the row has summed so far.
void weigh(float* logit, const float* bias, Range columns, float scale, float softcap, float& max,
           float& sum, float* out, int64_t D) {
  if (softcap > 0) {
    for (int64_t j = columns.first; j < columns.past; ++j) {
      logit[j] = softcap * std::tanh(logit[j] * scale / softcap);
    }
    scale = 1.f;
  }
  const Quad never = Quad{} + kNever;
  Quad most = Quad{} + max;
  for (int64_t j = columns.first; j < columns.past; j += 4) {
    const Quad four = quad(bias + j) == never ? never : quad(logit + j) * scale + quad(bias + j);
    most = four > most ? four : most;
    quad(logit + j) = four;
  }
  const float new_max = std::max({most[0], most[1], most[2], most[3]});
  const float shift = new_max == kNever ? 0.f : new_max;  // nothing seen yet
  Quad total = {};
  for (int64_t j = columns.first; j < columns.past; j += 4) {
    quad(logit + j) = exp_of_negative(quad(logit + j) - shift);
    total += quad(logit + j);
  }
  const float keep = std::exp(max - shift);
  sum = sum * keep + ((total[0] + total[1]) + (total[2] + total[3]));
  for (int64_t d = 0; d < D; ++d) out[d] *= keep;
  max = new_max;
}

template <typename T>
void attend(const CalibratedAttentionParams<T>& p, int64_t b, int64_t h, int64_t begin,
            Scratch& s) {
  const int64_t D = p.size.D;
  const int64_t rows = std::min<int64_t>(kQueries, p.size.Lq - begin);
  const int64_t head = h / (p.size.Hq / p.size.Hkv);

  Range hull{0, 0};
  for (int64_t i = 0; i < kQueries; ++i) {
    s.range[i] = i < rows ? p.visible(b, begin + i) : Range{0, 0};
    hull = hull.hull(s.range[i]);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const T* query = p.query.row(b, h, begin + i);
    for (int64_t d = 0; d < D; ++d) {
      s.query[i * D + d] = static_cast<float>(query[d * p.query.stride_d]);
    }
  }
  std::fill(s.out.begin(), s.out.end(), 0.f);
  std::fill_n(s.max, kQueries, kNever);
  std::fill_n(s.sum, kQueries, 0.f);

  for (int64_t first = hull.first; first < hull.past; first += kKeys) {
    const Range keys{first, std::min(first + kKeys, hull.past)};
    if (!load_keys(p, b, head, keys, s)) continue;
    for (int64_t row = 0; row < rows; row += kRows) {
      Range tile{0, 0};
      for (int r = 0; r < kRows; ++r) tile = tile.hull(s.range[row + r].within(keys));
      if (tile.first >= tile.past) continue;
      tile = {tile.first - first, tile.past - first};
      const Range columns{tile.first / kColumns * kColumns,
                          (tile.past + kColumns - 1) / kColumns * kColumns};

      std::fill_n(s.logit, kRows * kKeys, 0.f);
      multiply(&s.query[row * D], D, &s.key[columns.first], kKeys, s.logit + columns.first, kKeys,
               D, columns.past - columns.first);
      for (int64_t r = 0; r < std::min<int64_t>(kRows, rows - row); ++r) {
        const Range seen = s.range[row + r].within(keys);
        fill_bias(p, b, begin + row + r, columns, {seen.first - first, seen.past - first}, s);
        weigh(s.logit + r * kKeys, s.bias, columns, p.scale, p.softcap, s.max[row + r],
              s.sum[row + r], &s.out[(row + r) * D], D);
      }
      multiply(s.logit + tile.first, kKeys, &s.value[tile.first * D], D, &s.out[row * D], D,
               tile.past - tile.first, D);
    }
  }

  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = (b * p.size.Hq + h) * p.size.Lq + begin + i;
    const float sum = s.sum[i] == 0.f ? 1.f : s.sum[i];  // sees nothing: its row is zeros
    for (int64_t d = 0; d < D; ++d) p.out[row * D + d] = static_cast<T>(s.out[i * D + d] / sum);
    p.lse[row] = s.sum[i] == 0.f ? kNever : s.max[i] + std::log(s.sum[i]);
  }
}

template <typename T>
void run(const CalibratedAttentionParams<T>& p) {
  const int64_t blocks = (p.size.Lq + kQueries - 1) / kQueries;
  const int64_t tasks = p.size.B * p.size.Hq * blocks;
  torch::stable::parallel_for(0, tasks, /*grain_size=*/1, [&](int64_t begin, int64_t end) {
    Scratch scratch(p.size.D, p.size.G);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / blocks;
      attend(p, head / p.size.Hq, head % p.size.Hq, task % blocks * kQueries, scratch);
    }
  });
}

Positions positions(const contract::OptionalTensor& t, int64_t L, int64_t G, int64_t start) {
  if (!t) return {nullptr, 0, 0, start};
  const bool has_axes = t->dim() == 3;
  return {t->const_data_ptr<int32_t>(), has_axes ? G * L : L, has_axes ? L : 0, 0};
}

contract::OptionalTensor dense(const contract::OptionalTensor& t) {
  if (!t) return std::nullopt;
  return torch::stable::contiguous(*t);
}

std::tuple<Tensor, Tensor> calibrated_attention_cpu(Tensor query, Tensor key, Tensor value,
                                                    contract::OptionalTensor log_size,
                                                    contract::OptionalTensor query_position,
                                                    contract::OptionalTensor key_position,
                                                    contract::OptionalTensor decay, bool causal,
                                                    contract::OptionalTensor key_range,
                                                    double softcap, std::optional<double> scale) {
  const Sizes size = contract::calibrated_attention(query, key, value, log_size, query_position,
                                                    key_position, decay, key_range, softcap);
  const Tensor out = torch::stable::new_empty(query, {size.B, size.Hq, size.Lq, size.D});
  const Tensor lse = torch::stable::new_empty(query, {size.B, size.Hq, size.Lq}, ScalarType::Float);
  // Small beside the heads, which are read where they lie.
  for (auto* t : {&log_size, &query_position, &key_position, &decay, &key_range}) *t = dense(*t);

  // With one axis there are few distances and many pairs: their logarithms are taken once.
  const bool decay_is_log = decay && size.G == 1;
  std::vector<float> log_decay(decay_is_log ? size.P : 0);
  for (size_t distance = 0; distance < log_decay.size(); ++distance) {
    log_decay[distance] = std::log(2.f - decay->const_data_ptr<float>()[distance]);
  }

  const auto with = [&]<typename T>(T) {
    run(CalibratedAttentionParams<T>{
        .size = size,
        .query = Heads<T>(query),
        .key = Heads<T>(key),
        .value = Heads<T>(value),
        .log_size = log_size ? log_size->const_data_ptr<float>() : nullptr,
        .query_position = positions(query_position, size.Lq, size.G, size.Lk - size.Lq),
        .key_position = positions(key_position, size.Lk, size.G, 0),
        .decay = decay_is_log ? log_decay.data()
                 : decay      ? decay->const_data_ptr<float>()
                              : nullptr,
        .decay_is_log = decay_is_log,
        .key_range = key_range ? key_range->const_data_ptr<int32_t>() : nullptr,
        .causal = causal,
        .softcap = static_cast<float>(softcap),
        .scale = static_cast<float>(scale.value_or(1 / std::sqrt(static_cast<double>(size.D)))),
        .out = static_cast<T*>(out.mutable_data_ptr()),
        .lse = lse.mutable_data_ptr<float>(),
    });
  };
  switch (query.scalar_type()) {
    case ScalarType::Half:
      with(torch::headeronly::Half{});
      break;
    case ScalarType::BFloat16:
      with(torch::headeronly::BFloat16{});
      break;
    default:
      with(float{});
  }
  return {out, lse};
}

}  // namespace

RESTORE_EXT_CPU_BODY(calibrated_attention)

}  // namespace restore_ext
