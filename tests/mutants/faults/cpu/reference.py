"""The reference in plain PyTorch."""

from mutants.fault import collection

FAULTS, faults = collection()

fault = faults("moe_ext/reference.py", "tests/test_reference.py")
fault(
    "a tie goes to the higher expert id",
    "by_score = choice.sort(dim=-1, descending=True, stable=True).indices",
    "by_score = choice.shape[-1] - 1 - choice.flip(-1).sort(dim=-1, descending=True, stable=True).indices",
)
fault(
    "a group is always scored by its best expert",
    'best[..., : 1 if group_score == "max" else 2]',
    "best[..., :1]",
)
fault(
    "drop order: choice and token exchanged",
    'if drop_policy == "token":',
    'if drop_policy == "choice":',
)
fault(
    "the clamp leaves up alone below",
    "torch.where(up < -limit, -limit, up)",
    "up",
)
fault(
    "statistics count padding",
    "score_sums = torch.where(present[:, None], distribution, 0.0).sum(0)",
    "score_sums = distribution.sum(0)",
)
