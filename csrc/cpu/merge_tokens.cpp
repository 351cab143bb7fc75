#include "../contracts/merge_tokens.h"
#include "../library.h"

#include <tuple>

#include "rows.h"

namespace restore_ext::cpu {
namespace {

// The members of every group of one image: group m is token[first[m]] ... token[first[m + 1] - 1].
struct Groups {
  std::vector<int64_t> first;  // [M + 1]
  std::vector<int64_t> token;  // ascending within a group

  Groups(const View<int64_t>& group, int64_t b, int64_t N, int64_t M) : first(M + 1) {
    const auto has_group = [&](int64_t n) { return group(b, n) >= 0 && group(b, n) < M; };
    for (int64_t n = 0; n < N; ++n) {
      if (has_group(n)) ++first[group(b, n) + 1];
    }
    std::partial_sum(first.begin(), first.end(), first.begin());
    token.resize(first[M]);
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (int64_t n = 0; n < N; ++n) {
      if (has_group(n)) token[next[group(b, n)]++] = n;
    }
  }
};

int64_t lower_median(std::vector<int64_t>& values) {
  if (values.empty()) return -1;
  const auto middle = values.begin() + (values.size() - 1) / 2;
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// Divides a sum by its weight and rounds it, once, to the dtype of the output row.
void write_mean(const std::vector<double>& sum, double weight, ScalarType dtype, void* merged,
                int64_t row) {
  with_element_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t C = static_cast<int64_t>(sum.size());
    T* out = static_cast<T*>(merged) + row * C;
    // A group without members, or whose members weigh nothing, has no mean: it is zeros.
    for (int64_t c = 0; c < C; ++c) {
      out[c] = static_cast<T>(weight > 0 ? static_cast<float>(sum[c] / weight) : 0.f);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> merge_tokens_cpu(const Tensor& x, const Tensor& group,
                                                    int64_t num_groups,
                                                    const std::optional<Tensor>& size,
                                                    const std::optional<Tensor>& position) {
  const auto [B, N, M, C] = contract::merge_tokens(x, group, num_groups, size, position);
  Tensor merged = torch::stable::new_empty(x, {B, M, C});
  Tensor merged_size = torch::stable::new_empty(x, {B, M}, ScalarType::Float);
  Tensor merged_position = torch::stable::new_empty(x, {B, M}, ScalarType::Long);
  void* merged_out = merged.mutable_data_ptr();
  float* size_out = merged_size.mutable_data_ptr<float>();
  int64_t* position_out = merged_position.mutable_data_ptr<int64_t>();

  const Tokens tokens(x);
  const View<int64_t> group_of(group);
  const auto size_of = size ? std::optional(View<float>(*size)) : std::nullopt;
  const auto position_of = position ? std::optional(View<int64_t>(*position)) : std::nullopt;
  for (int64_t b = 0; b < B; ++b) {
    const Groups groups(group_of, b, N, M);
    // A thread owns whole groups, so nothing is shared and every sum runs in ascending n.
    const auto merge_some = [&](int64_t begin, int64_t end) {
      std::vector<float> token(tokens.C);
      std::vector<double> sum(tokens.C);  // so that the one rounding is the last
      std::vector<int64_t> positions;
      for (int64_t m = begin; m < end; ++m) {
        std::fill(sum.begin(), sum.end(), 0.);
        positions.clear();
        double weight = 0;
        for (int64_t i = groups.first[m]; i < groups.first[m + 1]; ++i) {
          const int64_t n = groups.token[i];
          const float token_size = size_of ? (*size_of)(b, n) : 1.f;
          tokens.read(b, n, token.data());
          for (int64_t c = 0; c < tokens.C; ++c) sum[c] += double{token_size} * token[c];
          weight += token_size;
          positions.push_back(position_of ? (*position_of)(b, n) : n);
        }
        write_mean(sum, weight, tokens.dtype, merged_out, b * M + m);
        size_out[b * M + m] = static_cast<float>(weight);
        position_out[b * M + m] = lower_median(positions);
      }
    };
    torch::stable::parallel_for(0, M, grain(2 * C * (N / M + 1)), merge_some);
  }
  return {merged, merged_size, merged_position};
}

}  // namespace

RESTORE_EXT_CPU_BODY(merge_tokens)

}  // namespace restore_ext::cpu
