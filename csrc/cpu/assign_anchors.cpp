#include "../contracts/assign_anchors.h"
#include "../library.h"

#include "rows.h"

namespace restore_ext::cpu {
namespace {

struct Anchor {
  int64_t slot;  // its column in `anchors`
  int64_t row;   // its row among the valid tokens
};

Tensor assign_anchors_cpu(const Tensor& x, const Tensor& anchors,
                          const std::optional<Tensor>& valid) {
  const auto [B, N, C, K] = contract::assign_anchors(x, anchors, valid);
  Tensor group = torch::stable::new_empty(x, {B, N}, ScalarType::Long);
  int64_t* out = group.mutable_data_ptr<int64_t>();
  std::fill_n(out, B * N, -1);

  const Tokens tokens(x);
  const View<int64_t> anchor_token(anchors);
  for (int64_t b = 0; b < B; ++b, out += N) {
    const UnitRows rows(tokens, N, valid, b);
    std::vector<int64_t> slot_of(rows.n, -1);  // [n] which anchor a row is itself
    std::vector<Anchor> usable;
    for (int64_t slot = 0; slot < K; ++slot) {
      const int64_t token = anchor_token(b, slot);
      const auto at = std::lower_bound(rows.token.begin(), rows.token.end(), token);
      if (at == rows.token.end() || *at != token) continue;  // padding
      const int64_t row = at - rows.token.begin();
      usable.push_back({.slot = slot, .row = row});
      if (slot_of[row] < 0) slot_of[row] = slot;
    }
    if (usable.empty()) continue;

    each(rows.n, static_cast<int64_t>(usable.size()) * rows.C, [&](int64_t i) {
      int64_t slot = slot_of[i];
      if (slot < 0) {
        slot = usable[0].slot;
        float best = kNever;
        for (const Anchor& anchor : usable) {
          const float similarity = rows.similarity(i, anchor.row);
          if (similarity > best) best = similarity, slot = anchor.slot;
        }
      }
      out[rows.token[i]] = slot;
    });
  }
  return group;
}

}  // namespace

RESTORE_EXT_CPU_BODY(assign_anchors)

}  // namespace restore_ext::cpu
