// What calibrated_attention accepts, and the sizes that follow. Both devices call this and check no
// more. A query may be blind, a key padding, a range empty, a decay NaN: those are meaning.
#pragma once

#include "require.h"

namespace restore_ext::contract {

struct CalibratedAttentionSizes {
  int64_t B, Hq, Hkv, Lq, Lk, D;
  int64_t G, P;  // axes of a position, distances in the table; P is 0 without one
};

inline CalibratedAttentionSizes calibrated_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& log_size,
    const OptionalTensor& query_position, const OptionalTensor& key_position,
    const OptionalTensor& decay, const OptionalTensor& key_range, double softcap) {
  REQUIRE_RANK(query, 4);
  REQUIRE_RANK(key, 4);
  const int64_t B = query.size(0), Hq = query.size(1), Lq = query.size(2), D = query.size(3);
  const int64_t Hkv = key.size(1), Lk = key.size(2);
  REQUIRE(D >= 32 && D <= 256 && D % 8 == 0,
          "query must have a head size D of 32 to 256 in steps of 8, got ", D);
  REQUIRE_SHAPE(key, B, Hkv, Lk, D);
  REQUIRE_SHAPE(value, B, Hkv, Lk, D);
  REQUIRE(Hkv > 0 && Hq % Hkv == 0,
          "key must have a number of heads Hkv that divides query's Hq = ", Hq, ", got ", Hkv);
  REQUIRE_SHAPE(log_size, B, Lk);
  REQUIRE_SHAPE(key_range, B, Lq, 2);

  const auto [G, P] = axes(__func__, decay, query_position, key_position);
  // [B, L] stands for the same position on every axis.
  if (query_position && query_position->dim() == 2) {
    REQUIRE_SHAPE(query_position, B, Lq);
  } else {
    REQUIRE_SHAPE(query_position, B, G, Lq);
  }
  if (key_position && key_position->dim() == 2) {
    REQUIRE_SHAPE(key_position, B, Lk);
  } else {
    REQUIRE_SHAPE(key_position, B, G, Lk);
  }
  REQUIRE(softcap >= 0, "softcap must be >= 0, got ", softcap);

  REQUIRE_FLOATING(query);
  REQUIRE_SAME_DTYPE(query, key);
  REQUIRE_SAME_DTYPE(query, value);
  REQUIRE_DTYPE(log_size, Float);
  REQUIRE_DTYPE(query_position, Int);
  REQUIRE_DTYPE(key_position, Int);
  REQUIRE_DTYPE(decay, Float);
  REQUIRE_DTYPE(key_range, Int);
  REQUIRE_SAME_DEVICE(query, key);
  REQUIRE_SAME_DEVICE(query, value);
  REQUIRE_SAME_DEVICE(query, log_size);
  REQUIRE_SAME_DEVICE(query, query_position);
  REQUIRE_SAME_DEVICE(query, key_position);
  REQUIRE_SAME_DEVICE(query, decay);
  REQUIRE_SAME_DEVICE(query, key_range);
  return {.B = B, .Hq = Hq, .Hkv = Hkv, .Lq = Lq, .Lk = Lk, .D = D, .G = G, .P = P};
}

}  // namespace restore_ext::contract
