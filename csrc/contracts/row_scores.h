// What row_scores accepts, and the sizes that follow. Both devices call this and check no more. A
// row may be blind or left out, a key padding, a weight negative, a decay NaN: those are meaning.
#pragma once

#include "calibrated_attention.h"

namespace restore_ext::contract {

inline CalibratedAttentionSizes row_scores(const Tensor& query, const Tensor& key,
                                           const OptionalTensor& weight,
                                           const OptionalTensor& log_size,
                                           const OptionalTensor& query_position,
                                           const OptionalTensor& key_position,
                                           const OptionalTensor& decay,
                                           const OptionalTensor& key_range, double softcap) {
  REQUIRE_RANK(query, 4);
  REQUIRE_RANK(key, 4);
  const int64_t B = query.size(0), Hq = query.size(1), R = query.size(2), D = query.size(3);
  const int64_t Hkv = key.size(1), K = key.size(2);
  REQUIRE(D >= 32 && D <= 256 && D % 8 == 0,
          "query must have a head size D of 32 to 256 in steps of 8, got ", D);
  REQUIRE(Hq > 0, "query must have at least one head to take the mean of, got shape ",
          shape(query.sizes()));
  REQUIRE_SHAPE(key, B, Hkv, K, D);
  REQUIRE(Hkv > 0 && Hq % Hkv == 0,
          "key must have a number of heads Hkv that divides query's Hq = ", Hq, ", got ", Hkv);
  REQUIRE_SHAPE(weight, B, R);
  REQUIRE_SHAPE(log_size, B, K);
  REQUIRE_SHAPE(key_range, B, R, 2);

  const auto [G, P] = axes(__func__, decay, query_position, key_position);
  // Without G the position is the same on every axis.
  if (query_position && query_position->dim() == 2) {
    REQUIRE_SHAPE(query_position, B, R);
  } else {
    REQUIRE_SHAPE(query_position, B, G, R);
  }
  if (key_position && key_position->dim() == 2) {
    REQUIRE_SHAPE(key_position, B, K);
  } else {
    REQUIRE_SHAPE(key_position, B, G, K);
  }
  REQUIRE(softcap >= 0, "softcap must be >= 0, got ", softcap);

  REQUIRE_FLOATING(query);
  REQUIRE_SAME_DTYPE(query, key);
  REQUIRE_DTYPE(weight, Float);
  REQUIRE_DTYPE(log_size, Float);
  REQUIRE_DTYPE(query_position, Int);
  REQUIRE_DTYPE(key_position, Int);
  REQUIRE_DTYPE(decay, Float);
  REQUIRE_DTYPE(key_range, Int);
  REQUIRE_SAME_DEVICE(query, key);
  REQUIRE_SAME_DEVICE(query, weight);
  REQUIRE_SAME_DEVICE(query, log_size);
  REQUIRE_SAME_DEVICE(query, query_position);
  REQUIRE_SAME_DEVICE(query, key_position);
  REQUIRE_SAME_DEVICE(query, decay);
  REQUIRE_SAME_DEVICE(query, key_range);
  return {.B = B, .Hq = Hq, .Hkv = Hkv, .Lq = R, .Lk = K, .D = D, .G = G, .P = P};
}

}  // namespace restore_ext::contract
