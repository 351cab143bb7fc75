// The part of kernels_body.h, which includes it, that is prefill attention.

// Rounds whole vectors of weights to pairs, and gives the sum of what they became.
template <typename T>
inline float round_weights(const float* weight, Range columns, T* pairs) {
  Floats sum = {};
  for (int64_t j = columns.first; j < columns.past; j += kLanes) {
    sum += round_vector(load(weight + j), pairs + j / kTermsOf<T>);
  }
  return total(sum);
}

template <typename T>
void attend(const AttendTask<T>& t) {
  constexpr int64_t kTerms = kTermsOf<T>;
  alignas(64) float logit[kRows * kKeys];
  alignas(64) T pairs[kRows * kKeys / kTerms];  // of the weights; floats stay where they are
  for (int64_t first = t.hull.first / kKeys * kKeys; first < t.hull.past; first += kKeys) {
    const T* key = t.key + first * t.D;
    for (int64_t row = 0; row < kQueries; row += kRows) {
      Range seen{0, 0};
      for (int r = 0; r < kRows; ++r) {
        seen = seen.hull(t.seen[row + r].within({first, first + kKeys}));
      }
      if (seen.empty()) continue;
      seen = {seen.first - first, seen.past - first};
      const Range panels{seen.first / kPanel * kPanel, round_up(seen.past, kPanel)};
      const Range vectors{seen.first / kLanes * kLanes, round_up(seen.past, kLanes)};

      for (int64_t column = panels.first; column < panels.past; column += kPanel) {
        tile<kRows, kVectors>(t.query + row * t.D, t.D, key + column * t.D, kPanel, logit + column,
                              kKeys, t.D, false);
      }
      for (int r = 0; r < kRows; ++r) {
        float* weight = logit + r * kKeys;
        const float keep =
            weigh(weight, t.bias + (row + r) * t.bias_stride + first, vectors, t.scale, t.softcap,
                  t.max[row + r], t.sum[row + r], t.out + (row + r) * t.Dp, t.Dp);
        if constexpr (kTerms > 1) {
          float& sum = t.rounded[row + r];
          sum = sum * keep + round_weights(weight, vectors, pairs + r * kKeys / kTerms);
        }
      }
      // A key beside the first or the last one seen may make a pair with it: its weight is 0.
      const Range terms{seen.first / kTerms, ceil_div(seen.past, kTerms)};
      const T* weights;
      if constexpr (kTerms > 1) {
        weights = pairs;
      } else {
        weights = logit;
      }
      tiles<kRows, kVectors>(weights + terms.first, kKeys / kTerms,
                             t.value + (first / kTerms + terms.first) * t.Dp, t.Dp,
                             t.out + row * t.Dp, t.Dp, terms.past - terms.first, t.Dp);
    }
  }
}
