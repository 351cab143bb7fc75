#include "../contracts/assign_anchors.h"
#include "../library.h"

#include "similarity.h"

namespace restore_ext::cpu {
namespace {

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
    std::vector<int64_t> slots, anchor_rows;   // of the anchors that are no padding
    for (int64_t slot = 0; slot < K; ++slot) {
      const int64_t token = anchor_token(b, slot);
      const auto at = std::lower_bound(rows.token.begin(), rows.token.end(), token);
      if (at == rows.token.end() || *at != token) continue;  // padding
      const int64_t row = at - rows.token.begin();
      slots.push_back(slot);
      anchor_rows.push_back(row);
      if (slot_of[row] < 0) slot_of[row] = slot;
    }
    if (slots.empty()) continue;

    const UnitRows usable(rows, anchor_rows);
    const Nearest anchor({rows, 0, 1, rows.n}, {usable, 0, 1, usable.n});
    for (int64_t i = 0; i < rows.n; ++i) {
      out[rows.token[i]] = slot_of[i] < 0 ? slots[anchor.column[i]] : slot_of[i];
    }
  }
  return group;
}

}  // namespace

RESTORE_EXT_CPU_BODY(assign_anchors)

}  // namespace restore_ext::cpu
