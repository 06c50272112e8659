"""Running statistics of a layer's routing: what it did since they were last read.

They are plain tensors beside the module, neither parameters nor buffers: not in the
state_dict, not broadcast by DDP. One mutating operator adds a forward's routing to
them without a host read; it does nothing while a backward pass runs, so a forward
that activation checkpointing repeats counts once.
"""

import math

import torch

from . import reference
from ._load import BACKEND

ops = torch.ops.moe_ext

# The slots of `totals`, see accumulate_stats.
TOKENS, ASSIGNMENTS, DROPPED, LOST_TOKENS, ENTROPY, MAX_LOGIT, FORWARDS = range(7)


def _static(tensor):
    """The tensor, such that torch.compile takes its size as a constant.

    It does so for parameters; a plain tensor of E elements it would tie to the number
    of tokens when the two happen to be equal, and compile again at the next size.
    """
    return torch.nn.Parameter(tensor, requires_grad=False)


class RoutingStats:
    """counts, step_counts (E) int64; score_sums (E), totals (7) float64.

    `step_counts` exists for loss-free balancing only: the training assignments
    since the last update of the biases.
    """

    def __init__(self, num_experts, with_step_counts, device=None):
        def zeros(size, dtype):
            return _static(torch.zeros(size, dtype=dtype, device=device))

        self.counts = zeros(num_experts, torch.int64)
        self.score_sums = zeros(num_experts, torch.float64)
        self.totals = zeros(7, torch.float64)
        self.step_counts = zeros(num_experts, torch.int64) if with_step_counts else None

    def tensors(self):
        return [t for t in vars(self).values() if t is not None]

    def zero_(self):
        for tensor in self.tensors():
            tensor.zero_()

    def to(self, device):
        """Follows its module to a device; leaving the meta device starts at zero."""
        for name, tensor in vars(self).items():
            if tensor is not None and tensor.device != device:
                moved = (
                    torch.zeros_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
                )
                setattr(self, name, _static(moved))

    def accumulate(self, logits, route, assignment_row, padding_mask, score_function, training):
        add = reference.accumulate_stats if BACKEND == "reference" else ops.accumulate_stats
        add(
            self.counts, self.score_sums, self.totals, self.step_counts if training else None,
            logits.detach(), route.experts, route.counts, route.score_sums.detach(),
            assignment_row, padding_mask, score_function,
        )  # fmt: skip

    @torch.no_grad()
    def read(self, reset):
        # One transfer: counts stay exact in float64 up to 2^53.
        packed = torch.cat((self.counts.double(), self.score_sums, self.totals)).cpu()
        if reset:
            for tensor in (self.counts, self.score_sums, self.totals):
                tensor.zero_()
        num_experts = len(self.counts)
        load, score_sums, totals = packed.split((num_experts, num_experts, 7))
        return summarize(load, score_sums, totals.tolist())


def summarize(load, score_sums, totals):
    """The dict of `MoE.stats` from the running sums, on the host."""
    num_experts = len(load)
    tokens, assignments = totals[TOKENS], totals[ASSIGNMENTS]
    # With one expert every distribution is uniform.
    log_experts = math.log(num_experts) if num_experts > 1 else 1.0
    mean = score_sums / max(score_sums.sum().item(), 1e-300)
    entropy = -torch.special.xlogy(mean, mean).sum().item() / log_experts
    token_entropy = totals[ENTROPY] / max(tokens, 1.0) / log_experts
    if num_experts == 1 and tokens:
        entropy = token_entropy = 1.0
    return {
        "load": load,
        "drop_rate": totals[DROPPED] / max(assignments, 1.0),
        "lost_rate": totals[LOST_TOKENS] / max(tokens, 1.0),
        "entropy": entropy,
        "token_entropy": token_entropy,
        "max_violation": load.max().item() * num_experts / assignments - 1 if assignments else 0.0,
        "dead_experts": float((load == 0).sum()) if assignments else 0.0,
        "max_logit": totals[MAX_LOGIT] if tokens else 0.0,
        "tokens": tokens,
        "forwards": totals[FORWARDS],
    }
