"""Whether one model's loss is lower than another's, by more than the seeds make of it."""

import math
from dataclasses import dataclass

# Student's t: 97.5 % of the distribution lie below it, by degrees of freedom from 1.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
RULE = (
    "A model is ahead or behind where the 95 % confidence interval of the mean difference, of"
    " pairs of one seed (Student's t), leaves out 0; otherwise the two cannot be told apart."
    " Of twenty pairs of equals, one would still come out ahead or behind."
)


@dataclass
class Comparison:
    """A model's losses beside another's, both in the order of the seeds; nats per byte."""

    losses: list
    others: list

    @property
    def differences(self):
        return [a - b for a, b in zip(self.losses, self.others, strict=True)]

    @property
    def mean(self):
        return sum(self.differences) / len(self.differences)

    @property
    def margin(self):
        """Half of the interval: infinite for one seed, which says nothing of its spread."""
        n = len(self.differences)
        if n == 1:
            return math.inf
        variance = sum((d - self.mean) ** 2 for d in self.differences) / (n - 1)
        return T_975[min(n - 1, len(T_975)) - 1] * math.sqrt(variance / n)

    @property
    def standing(self):
        if abs(self.mean) <= self.margin:
            return "cannot be told from"
        return "is ahead of" if self.mean < 0 else "is behind"

    def __str__(self):
        if len(self.differences) == 1:
            return f"{self.mean:+.4f} nats per byte on one seed"
        by_seed = ", ".join(f"{d:+.4f}" for d in self.differences)
        return f"{self.mean:+.4f} ± {self.margin:.4f} nats per byte (by seed: {by_seed})"
