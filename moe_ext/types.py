"""The two records that travel between the stages."""

from typing import NamedTuple

from torch import Tensor


class Route(NamedTuple):
    """What `topk_route` decides and measures, in one pass over the logits."""

    weights: Tensor  # (T, K) float32 (float64 for float64 logits)
    experts: Tensor  # (T, K) int32; E marks a padding token's assignments
    counts: Tensor  # (E) int32: assignments of each expert, padding left out
    score_sums: Tensor  # (E): sum over tokens of the scores, normalised to 1 a token
    logsumexp: Tensor  # (T): of the logits; 0 for padding


class Plan(NamedTuple):
    """What `capacity_scatter` decides: which assignment becomes which row."""

    expert_offsets: Tensor  # (E+1) int32: expert e owns rows [offsets[e], offsets[e+1])
    row_token: Tensor  # (R) int32: the token of each row; -1 in the tail
    row_assignment: Tensor  # (R) int32: t*K + j of each row; -1 in the tail
    assignment_row: Tensor  # (T, K) int32: the row of each assignment; -1 where dropped
    expert_counts: Tensor  # (E) int32: assignments of each expert before any drop
