"""Running statistics of a layer's routing: what it did since they were last read.

They are plain tensors beside the module, neither parameters nor buffers: not in the
state_dict, not broadcast by DDP. One mutating operator adds a forward's routing to
them without a host read; it does nothing while a backward pass runs, so a forward
that activation checkpointing repeats counts once.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from .functional import stage

__all__ = ["Numbers"]

# The slots of `totals`, see accumulate_stats.
TOKENS, ASSIGNMENTS, DROPPED, LOST_TOKENS, ENTROPY, MAX_LOGIT, FORWARDS = range(7)


@stage
def accumulate_stats(*args):
    torch.ops.moe_ext.accumulate_stats(*args)


def _static(tensor):
    """The tensor, such that torch.compile takes its size as a constant.

    It does so for parameters; a plain tensor of E elements it would tie to the number
    of tokens when the two happen to be equal, and compile again at the next size.
    """
    return torch.nn.Parameter(tensor, requires_grad=False)


def home(device):
    """Where state begins that is neither parameter nor buffer: with its module, or on the CPU.

    Nothing but the module's own `_apply` takes such state along, and there are many ways from
    the meta device to another that go without it: so it never is on meta, and a forward moves
    it to where the tokens are.
    """
    return "cpu" if device.type == "meta" else device


class RoutingStats:
    """counts, step_counts (E) int64; score_sums (E), totals (7) float64.

    `step_counts` exists for loss-free balancing only: the training assignments
    since the last update of the biases.
    """

    def __init__(self, num_experts, with_step_counts, device):
        device = home(device)

        def zeros(size, dtype):
            return _static(torch.zeros(size, dtype=dtype, device=device))

        self.counts = zeros(num_experts, torch.int64)
        self.score_sums = zeros(num_experts, torch.float64)
        self.totals = zeros(7, torch.float64)
        self.step_counts = None
        if with_step_counts:
            self.count_steps()

    def count_steps(self):
        if self.step_counts is None:
            self.step_counts = _static(torch.zeros_like(self.counts))

    def tensors(self):
        return [t for t in vars(self).values() if t is not None]

    def zero_(self):
        for tensor in self.tensors():
            tensor.zero_()

    def reset(self):
        """What is read starts again; the biases' counts go on."""
        for tensor in (self.counts, self.score_sums, self.totals):
            tensor.zero_()

    def to(self, device):
        """Follows its module to a device."""
        if self.counts.device == device:
            return
        for name, tensor in vars(self).items():
            if tensor is not None:
                setattr(self, name, _static(tensor.to(device)))

    def accumulate(self, logits, route, assignment_row, padding_mask, score_function, training):
        score_sums = route.score_sums
        if logits.requires_grad:  # else two ops for nothing
            logits, score_sums = logits.detach(), score_sums.detach()
        accumulate_stats(
            self.counts, self.score_sums, self.totals, self.step_counts if training else None,
            logits, route.experts, route.counts, score_sums,
            assignment_row, padding_mask, score_function,
        )  # fmt: skip

    def plus(self, other):
        """The sum of both, as a `RoutingStats` without `step_counts`."""
        total = RoutingStats(len(self.counts), False, self.counts.device)
        for mine, a, b in zip(total.tensors(), self.tensors(), other.tensors()):
            mine += a + b
        seen = [t[MAX_LOGIT] for t in (self.totals, other.totals) if t[FORWARDS] > 0]
        if seen:
            total.totals[MAX_LOGIT] = torch.stack(seen).max()
        return total

    def read(self, reset):
        return read_all([self], reset)[0]


def counting(watchers, training):
    """Those that count a forward in this mode, of pairs (in training, in evaluation)."""
    return [seen if training else checked for seen, checked in watchers]


@torch.no_grad()
def read_all(layers, reset=False, reduce=False, process_group=None):
    """[the dict of `MoE.stats`] of several `RoutingStats`; over all ranks with `reduce`.

    One transfer, and two all-reduces of some floats an expert, whatever the number of layers.
    """
    device = layers[0].counts.device
    # Counts stay exact in float64 up to 2^53.
    kept = [(s.counts.double(), s.score_sums, s.totals) for s in layers]
    packed = torch.cat([tensor.to(device) for tensors in kept for tensor in tensors])
    sizes = [len(tensor) for tensors in kept for tensor in tensors]
    if reduce:
        totals = packed.split(sizes)[2::3]
        largest = torch.stack(
            [torch.where(t[FORWARDS] > 0, t[MAX_LOGIT], -math.inf) for t in totals]
        )
        dist.all_reduce(packed, group=process_group)
        dist.all_reduce(largest, dist.ReduceOp.MAX, process_group)
        for total, maximum in zip(totals, largest):
            total[MAX_LOGIT] = maximum
    packed = packed.cpu()
    if reset:
        for stats in layers:
            stats.reset()
    parts = packed.split(sizes)
    return [
        summarize(load, score_sums, totals.tolist())
        for load, score_sums, totals in zip(parts[::3], parts[1::3], parts[2::3])
    ]


class Numbers(dict):
    """{name: float}, as any logger takes it, and `load` (E) float64 beside it.

    `numbers["load"]` gives that tensor too, though it is not among the keys.
    """

    def __init__(self, numbers: dict[str, float], load: Tensor):
        super().__init__(numbers)
        self.load = load

    def __missing__(self, key):
        if key == "load":
            return self.load
        raise KeyError(key)


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
    numbers = {
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
    return Numbers(numbers, load)
