// Every operator of restore_ext, in the order the method uses them: the table of contents.
// A schema here has a contract in contracts/ and a body of its name in cpu/.
//
// B batch, N tokens in, M tokens out, K tokens picked, C channels; H heads, L sequence, D head
// size. `budget` is an optional int32 [B]: how many each row may pick, at most the plain int beside
// it. `valid` is an optional bool [B, N]: a token that is False takes no part.

#include "library.h"

RESTORE_EXT_LIBRARY(m) {
  // Pairs even tokens with their most similar odd ones and takes the r best pairs.
  // metric [B, N, C] -> unmerged [B, U], src [B, R], dst [B, R]
  m.def(
      "match_bipartite(Tensor metric, SymInt r, Tensor? budget, Tensor? valid, bool class_token) "
      "-> "
      "(Tensor unmerged, Tensor src, Tensor dst)");

  // How much a token stands for many others and differs from those that stand for more.
  // x [B, N, C] -> score [B, N]
  m.def("score_anchors(Tensor x, str mode, Tensor? valid) -> Tensor");

  // The k tokens of the highest anchor score, in ascending order.
  // x [B, N, C] -> anchors [B, K]
  m.def("select_anchors(Tensor x, SymInt k, Tensor? budget, str mode, Tensor? valid) -> Tensor");

  // The most similar anchor of every token.
  // x [B, N, C], anchors [B, K] -> group [B, N]
  m.def("assign_anchors(Tensor x, Tensor anchors, Tensor? valid) -> Tensor");

  // Size-weighted mean, total size and median position of the tokens that share a group.
  // x [B, N, C], group [B, N] -> merged [B, M, C], merged_size [B, M], merged_position [B, M]
  m.def(
      "merge_tokens(Tensor x, Tensor group, SymInt num_groups, Tensor? size, Tensor? position) -> "
      "(Tensor merged, Tensor merged_size, Tensor merged_position)");

  // Greedy max-min: each pick is the token farthest from all picked so far.
  // x [B, N, C] -> picks [B, K]
  m.def("select_diverse(Tensor x, SymInt k, Tensor? budget, Tensor? valid) -> Tensor");

  // Attention whose logits gain log(size of the key) + log(2 - RoPE decay at its distance).
  // query [B, Hq, Lq, D], key and value [B, Hkv, Lk, D] -> out [B, Hq, Lq, D], lse [B, Hq, Lq]
  m.def(
      "calibrated_attention(Tensor query, Tensor key, Tensor value, Tensor? log_size, "
      "Tensor? query_position, Tensor? key_position, Tensor? decay, bool causal, "
      "Tensor? key_range, float softcap, float? scale) -> (Tensor out, Tensor lse)");

  // The same for queries that follow a cache in pages: the last Lq tokens of every row, causal.
  // query [B, Hq, Lq, D], key_cache and value_cache [pages, page, Hkv, D], block_table
  // [B, max_pages], seqlens [B] -> out [B, Hq, Lq, D], lse [B, Hq, Lq]
  m.def(
      "calibrated_attention_paged(Tensor query, Tensor key_cache, Tensor value_cache, "
      "Tensor block_table, Tensor seqlens, Tensor? log_size, Tensor? query_position, "
      "Tensor? key_position, Tensor? decay, float softcap, float? scale) "
      "-> (Tensor out, Tensor lse)");

  // The attention of R rows of queries, their mean over the heads, summed by key.
  // query [B, Hq, R, D], key [B, Hkv, K, D] -> score [B, K]
  m.def(
      "row_scores(Tensor query, Tensor key, Tensor? weight, Tensor? log_size, "
      "Tensor? query_position, Tensor? key_position, Tensor? decay, Tensor? key_range, "
      "float softcap, float? scale) -> Tensor");
}
