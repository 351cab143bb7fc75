#include "../contracts/select_diverse.h"
#include "../library.h"

#include "similarity.h"

namespace restore_ext::cpu {
namespace {

constexpr float kFarthest = std::numeric_limits<float>::infinity();
// Ranks below every distance: a row that cannot be compared comes last, a picked one never.
constexpr float kLast = -1.f, kPicked = -2.f;

// Once a row is picked the others are compared with it this many at a time.
constexpr int64_t kSome = 64;

void pick_diverse(const UnitRows& rows, int64_t k, int64_t* out) {
  // [n] distance to the nearest picked row; before the first pick, to the nearest neighbour.
  std::vector<float> reach = nearest(rows, std::vector<float>(rows.n), /*all=*/true);
  for (float& x : reach) x = 1 - x;
  std::vector<uint8_t> picked(rows.n);
  for (int64_t t = 0; t < k; ++t) {
    int64_t pick = 0;
    float farthest = kPicked;
    for (int64_t i = 0; i < rows.n; ++i) {
      const float rank = picked[i] ? kPicked : rows.comparable[i] ? reach[i] : kLast;
      if (rank > farthest) farthest = rank, pick = i;
    }
    out[t] = rows.token[pick];
    picked[pick] = true;
    if (t == 0) reach.assign(rows.n, kFarthest);
    if (!rows.comparable[pick]) continue;  // it is near to nothing
    each(ceil_div(rows.n, kSome), kSome * rows.C, [&](int64_t n) {
      const int64_t first = n * kSome, some = std::min(kSome, rows.n - first);
      float similarity[kSome];
      kernels().dot_rows(rows[pick], rows[first], rows.C, some, rows.C, similarity);
      for (int64_t i = 0; i < some; ++i) {
        reach[first + i] = std::min(reach[first + i], 1 - similarity[i]);
      }
    });
  }
}

Tensor select_diverse_cpu(const Tensor& x, int64_t k, const std::optional<Tensor>& budget,
                          const std::optional<Tensor>& valid) {
  const auto [B, N, C, K] = contract::select_diverse(x, k, budget, valid);
  Tensor picks = torch::stable::new_empty(x, {B, K}, ScalarType::Long);
  int64_t* out = picks.mutable_data_ptr<int64_t>();
  std::fill_n(out, B * K, -1);

  const Tokens tokens(x);
  const Budget allowed(K, budget);
  for (int64_t b = 0; b < B; ++b) {
    const UnitRows rows(tokens, N, valid, b);
    const int64_t take = allowed(b, rows.n);
    if (take > 0) pick_diverse(rows, take, out + b * K);
  }
  return picks;
}

}  // namespace

RESTORE_EXT_CPU_BODY(select_diverse)

}  // namespace restore_ext::cpu
