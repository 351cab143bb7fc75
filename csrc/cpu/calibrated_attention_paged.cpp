// out[i] = sum over j of softmax_j(softcap(scale * q_i.k_j) + log_size_j + log(2 - decay_ij)) * v_j
// where the keys of a row of the batch lie in the pages that its block table lists.
//
// Plan     A task owns up to 16 queries of the heads that share a key head, and walks the pages of
//          their row in order with a running maximum and sum (online softmax).
// Skipped  Keys past the row's length, pages that do not exist, padding: none of it is read.
// Order    One task sums in the order of the pages: the same bits for any thread count.
// NaN      A query that sees a NaN logit is NaN; one that sees nothing is 0, its lse -inf.

#include "../contracts/calibrated_attention_paged.h"
#include "../library.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

namespace restore_ext {
namespace {

constexpr int kRows = 16;   // of one task
constexpr int kTerms = 16;  // of one sum; sums of sums round less than long ones
constexpr int kLanes = 8;   // divides every head size
constexpr int kLargestPage = 256, kLargestHead = 256;
constexpr float kNever = -std::numeric_limits<float>::infinity();

using Sizes = contract::CalibratedAttentionPagedSizes;

template <typename T>
struct Rows {
  const T* data;  // [outer, inner, l, D]
  int64_t stride_outer, stride_inner, stride_l, stride_d;

  // Axes of the tensor, as in [pages, page, Hkv, D] or [B, Hq, Lq, D].
  Rows(const Tensor& t, int outer, int inner, int l)
      : data(static_cast<const T*>(t.const_data_ptr())),
        stride_outer(t.stride(outer)),
        stride_inner(t.stride(inner)),
        stride_l(t.stride(l)),
        stride_d(t.stride(3)) {}

  void read(int64_t outer, int64_t inner, int64_t l, int64_t D, float* to) const {
    const T* row = data + outer * stride_outer + inner * stride_inner + l * stride_l;
    for (int64_t d = 0; d < D; ++d) to[d] = static_cast<float>(row[d * stride_d]);
  }
};

struct Positions {
  const int32_t* data;         // [B, G, Lq] or [G, pages * page]; nullptr: the index counts
  int64_t stride_b, stride_g;  // stride_g 0: the same on every axis

  int32_t at(int64_t b, int64_t g, int64_t i, int64_t index) const {
    return data ? data[b * stride_b + g * stride_g + i] : static_cast<int32_t>(index);
  }
};

template <typename T>
struct CalibratedAttentionPagedParams {
  Sizes size;
  Rows<T> query;               // [B, Hq, Lq, D]
  Rows<T> key, value;          // [pages, Hkv, page, D]
  const int32_t* block_table;  // [B, max_pages]
  const int32_t* seqlens;      // [B]
  const float* log_size;       // [pages, page]; nullptr: zeros
  Positions query_position, key_position;
  const float* decay;  // [G, P]; nullptr: no distance term
  float softcap, scale;
  T* out;      // [B, Hq, Lq, D]
  float* lse;  // [B, Hq, Lq]

  int64_t length(int64_t b) const {
    return std::clamp<int64_t>(seqlens[b], 0, size.max_pages * size.page);
  }
};

// What one thread works with; allocated once for all its tasks.
struct Scratch {
  std::vector<float> query, out;  // [kRows, D]
  std::vector<float> key, value;  // [page, D]
  float log_size[kLargestPage], bias[kLargestPage], weight[kLargestPage];
  float max[kRows], sum[kRows];

  Scratch(int64_t D, int64_t page)
      : query(kRows * D), out(kRows * D), key(page * D), value(page * D) {}
};

float dot(const float* a, const float* b, int64_t D) {
  float lane[kLanes] = {};
  for (int64_t d = 0; d < D; d += kLanes) {
    for (int x = 0; x < kLanes; ++x) lane[x] += a[d + x] * b[d + x];
  }
  return ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7]));
}

// The first `tokens` keys and values of a page as float32. What is padding stays unread, and its
// value is zeros. False: nothing but padding.
template <typename T>
bool load_page(const CalibratedAttentionPagedParams<T>& p, int64_t page, int64_t head,
               int64_t tokens, Scratch& s) {
  const int64_t D = p.size.D;
  bool any = false;
  for (int64_t t = 0; t < tokens; ++t) {
    s.log_size[t] = p.log_size ? p.log_size[page * p.size.page + t] : 0.f;
    if (s.log_size[t] == kNever) {
      std::fill_n(&s.key[t * D], D, 0.f);
      std::fill_n(&s.value[t * D], D, 0.f);
    } else {
      any = true;
      p.key.read(page, head, t, D, &s.key[t * D]);
      p.value.read(page, head, t, D, &s.value[t * D]);
    }
  }
  return any;
}

// What the logits of query i gain over a page whose first key has index `first`.
template <typename T>
void fill_bias(const CalibratedAttentionPagedParams<T>& p, int64_t b, int64_t i, int64_t page,
               int64_t first, int64_t tokens, Scratch& s) {
  std::copy_n(s.log_size, tokens, s.bias);
  if (!p.decay) return;
  float rho[kLargestPage] = {};
  const auto last = static_cast<uint32_t>(std::min<int64_t>(p.size.P - 1, UINT32_MAX));
  for (int64_t g = 0; g < p.size.G; ++g) {
    const int32_t at_query = p.query_position.at(b, g, i, p.length(b) - p.size.Lq + i);
    for (int64_t t = 0; t < tokens; ++t) {
      const int32_t at_key = p.key_position.at(0, g, page * p.size.page + t, first + t);
      // Unsigned: the distance of two int32 may pass 2^31.
      const auto high = static_cast<uint32_t>(std::max(at_query, at_key));
      const auto low = static_cast<uint32_t>(std::min(at_query, at_key));
      rho[t] += p.decay[g * p.size.P + std::min(high - low, last)];
    }
  }
  for (int64_t t = 0; t < tokens; ++t) s.bias[t] += std::log(2.f - rho[t]);
}

// Adds the first `tokens` keys of the page to what row r has summed so far.
template <typename T>
void add_page(const CalibratedAttentionPagedParams<T>& p, int64_t r, int64_t tokens, Scratch& s) {
  const int64_t D = p.size.D;
  float max = s.max[r];
  for (int64_t t = 0; t < tokens; ++t) {
    float logit = kNever;
    if (s.bias[t] != kNever) {
      logit = dot(&s.query[r * D], &s.key[t * D], D) * p.scale;
      if (p.softcap > 0) logit = p.softcap * std::tanh(logit / p.softcap);
      logit += s.bias[t];
    }
    s.weight[t] = logit;
    max = std::max(max, logit);
  }
  const float shift = max == kNever ? 0.f : max;  // nothing seen yet
  const float keep = std::exp(s.max[r] - shift);
  float* out = &s.out[r * D];
  for (int64_t d = 0; d < D; ++d) out[d] *= keep;
  s.sum[r] *= keep;
  s.max[r] = max;
  for (int64_t begin = 0; begin < tokens; begin += kTerms) {
    float sum = 0.f, part[kLargestHead] = {};
    for (int64_t t = begin; t < std::min(begin + kTerms, tokens); ++t) {
      const float weight = std::exp(s.weight[t] - shift);
      sum += weight;
      for (int64_t d = 0; d < D; ++d) part[d] += weight * s.value[t * D + d];
    }
    s.sum[r] += sum;
    for (int64_t d = 0; d < D; ++d) out[d] += part[d];
  }
}

template <typename T>
void attend(const CalibratedAttentionPagedParams<T>& p, int64_t b, int64_t head, int64_t begin,
            Scratch& s) {
  const int64_t D = p.size.D, Lq = p.size.Lq, repeat = p.size.Hq / p.size.Hkv;
  const int64_t rows = std::min<int64_t>(kRows, repeat * Lq - begin);
  // A query sees the keys before it and its own, which is among the row's last Lq.
  const auto past = [&](int64_t r) { return p.length(b) - Lq + (begin + r) % Lq + 1; };

  int64_t longest = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = begin + r;
    p.query.read(b, head * repeat + row / Lq, row % Lq, D, &s.query[r * D]);
    longest = std::max(longest, past(r));
  }
  std::fill(s.out.begin(), s.out.end(), 0.f);
  std::fill_n(s.max, kRows, kNever);
  std::fill_n(s.sum, kRows, 0.f);

  for (int64_t first = 0; first < longest; first += p.size.page) {
    const int64_t page = p.block_table[b * p.size.max_pages + first / p.size.page];
    if (page < 0 || page >= p.size.pages) continue;
    if (!load_page(p, page, head, std::min(p.size.page, longest - first), s)) continue;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t tokens = std::min(p.size.page, past(r) - first);
      if (tokens <= 0) continue;
      fill_bias(p, b, (begin + r) % Lq, page, first, tokens, s);
      add_page(p, r, tokens, s);
    }
  }

  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = (b * p.size.Hq + head * repeat) * Lq + begin + r;
    const float sum = s.sum[r] == 0.f ? 1.f : s.sum[r];  // sees nothing: its row is zeros
    for (int64_t d = 0; d < D; ++d) p.out[row * D + d] = static_cast<T>(s.out[r * D + d] / sum);
    p.lse[row] = s.sum[r] == 0.f ? kNever : s.max[r] + std::log(s.sum[r]);
  }
}

template <typename T>
void run(const CalibratedAttentionPagedParams<T>& p) {
  const int64_t rows = p.size.Hq / p.size.Hkv * p.size.Lq;
  const int64_t tiles = (rows + kRows - 1) / kRows;
  const int64_t tasks = p.size.B * p.size.Hkv * tiles;
  torch::stable::parallel_for(0, tasks, /*grain_size=*/1, [&](int64_t begin, int64_t end) {
    Scratch scratch(p.size.D, p.size.page);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / tiles;
      attend(p, head / p.size.Hkv, head % p.size.Hkv, task % tiles * kRows, scratch);
    }
  });
}

// stride_b and stride_g as they are where every axis has its own.
Positions positions(const contract::OptionalTensor& t, int64_t stride_b, int64_t stride_g) {
  if (!t) return {nullptr, 0, 0};
  const bool has_axes = t->dim() == 3;
  return {t->const_data_ptr<int32_t>(), has_axes || stride_b == 0 ? stride_b : stride_g,
          has_axes ? stride_g : 0};
}

contract::OptionalTensor dense(const contract::OptionalTensor& t) {
  if (!t) return std::nullopt;
  return torch::stable::contiguous(*t);
}

std::tuple<Tensor, Tensor> calibrated_attention_paged_cpu(
    Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor seqlens,
    contract::OptionalTensor log_size, contract::OptionalTensor query_position,
    contract::OptionalTensor key_position, contract::OptionalTensor decay, double softcap,
    std::optional<double> scale) {
  const Sizes size =
      contract::calibrated_attention_paged(query, key_cache, value_cache, block_table, seqlens,
                                           log_size, query_position, key_position, decay, softcap);
  const Tensor out = torch::stable::new_empty(query, {size.B, size.Hq, size.Lq, size.D});
  const Tensor lse = torch::stable::new_empty(query, {size.B, size.Hq, size.Lq}, ScalarType::Float);
  // Small beside the caches, which are read where they lie.
  for (auto* t : {&log_size, &query_position, &key_position, &decay}) *t = dense(*t);
  for (auto* t : {&block_table, &seqlens}) *t = torch::stable::contiguous(*t);

  const auto with = [&]<typename T>(T) {
    run(CalibratedAttentionPagedParams<T>{
        .size = size,
        .query = Rows<T>(query, 0, 1, 2),
        .key = Rows<T>(key_cache, 0, 2, 1),
        .value = Rows<T>(value_cache, 0, 2, 1),
        .block_table = block_table.const_data_ptr<int32_t>(),
        .seqlens = seqlens.const_data_ptr<int32_t>(),
        .log_size = log_size ? log_size->const_data_ptr<float>() : nullptr,
        .query_position = positions(query_position, size.G * size.Lq, size.Lq),
        .key_position = positions(key_position, 0, size.pages * size.page),
        .decay = decay ? decay->const_data_ptr<float>() : nullptr,
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

RESTORE_EXT_CPU_BODY(calibrated_attention_paged)

}  // namespace restore_ext
