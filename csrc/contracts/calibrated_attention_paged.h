// What calibrated_attention_paged accepts, and the sizes that follow. Both devices call this and
// check no more. Lengths and the block table are data: whatever they hold has a defined result.
#pragma once

#include "require.h"

namespace restore_ext::contract {

constexpr int64_t kMostTokens = int64_t{1} << 30;  // so that a kernel counts them in int

struct CalibratedAttentionPagedSizes {
  int64_t B, Hq, Hkv, Lq, D;
  int64_t pages, page, max_pages;  // in the cache, tokens of one, of one row
  int64_t G, P;                    // axes of a position, distances in the table; P is 0 without one
};

inline CalibratedAttentionPagedSizes calibrated_attention_paged(
    const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
    const Tensor& block_table, const Tensor& seqlens, const OptionalTensor& log_size,
    const OptionalTensor& query_position, const OptionalTensor& key_position,
    const OptionalTensor& decay, double softcap) {
  REQUIRE_RANK(query, 4);
  REQUIRE_RANK(key_cache, 4);
  const int64_t B = query.size(0), Hq = query.size(1), Lq = query.size(2), D = query.size(3);
  const int64_t pages = key_cache.size(0), page = key_cache.size(1), Hkv = key_cache.size(2);
  REQUIRE(D >= 32 && D <= 256 && D % 8 == 0,
          "query must have a head size D of 32 to 256 in steps of 8, got ", D);
  REQUIRE(page >= 16 && page <= 256, "key_cache must have pages of 16 to 256 tokens, got ", page);
  REQUIRE_SHAPE(key_cache, pages, page, Hkv, D);
  REQUIRE_SHAPE(value_cache, pages, page, Hkv, D);
  REQUIRE(Hkv > 0 && Hq % Hkv == 0,
          "key_cache must have a number of heads Hkv that divides query's Hq = ", Hq, ", got ",
          Hkv);
  REQUIRE_RANK(block_table, 2);
  const int64_t max_pages = block_table.size(1);
  REQUIRE_SHAPE(block_table, B, max_pages);
  REQUIRE(max_pages * page <= kMostTokens, "block_table must list at most ", kMostTokens,
          " tokens a row, got ", max_pages * page);
  REQUIRE_SHAPE(seqlens, B);
  REQUIRE_SHAPE(log_size, pages, page);

  const auto [G, P] = axes(__func__, decay, query_position, key_position);
  // Without G the position is the same on every axis.
  if (query_position && query_position->dim() == 2) {
    REQUIRE_SHAPE(query_position, B, Lq);
  } else {
    REQUIRE_SHAPE(query_position, B, G, Lq);
  }
  if (key_position && key_position->dim() == 2) {
    REQUIRE_SHAPE(key_position, pages, page);
  } else {
    REQUIRE_SHAPE(key_position, G, pages, page);
  }
  REQUIRE(softcap >= 0, "softcap must be >= 0, got ", softcap);

  REQUIRE_FLOATING(query);
  REQUIRE_SAME_DTYPE(query, key_cache);
  REQUIRE_SAME_DTYPE(query, value_cache);
  REQUIRE_DTYPE(block_table, Int);
  REQUIRE_DTYPE(seqlens, Int);
  REQUIRE_DTYPE(log_size, Float);
  REQUIRE_DTYPE(query_position, Int);
  REQUIRE_DTYPE(key_position, Int);
  REQUIRE_DTYPE(decay, Float);
  REQUIRE_SAME_DEVICE(query, key_cache);
  REQUIRE_SAME_DEVICE(query, value_cache);
  REQUIRE_SAME_DEVICE(query, block_table);
  REQUIRE_SAME_DEVICE(query, seqlens);
  REQUIRE_SAME_DEVICE(query, log_size);
  REQUIRE_SAME_DEVICE(query, query_position);
  REQUIRE_SAME_DEVICE(query, key_position);
  REQUIRE_SAME_DEVICE(query, decay);
  return {.B = B,
          .Hq = Hq,
          .Hkv = Hkv,
          .Lq = Lq,
          .D = D,
          .pages = pages,
          .page = page,
          .max_pages = max_pages,
          .G = G,
          .P = P};
}

}  // namespace restore_ext::contract
