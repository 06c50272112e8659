"""Step-3.7: the gate is clamped after its activation, in some layers."""

import math

from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

from .base import Replacement


class Experts(Replacement, Step3p7Experts):
    pass


class ClampedExperts(Experts):
    _apply_gate = Step3p7Experts._apply_gate


def of_limit(module):
    return Experts if module.limit == math.inf else ClampedExperts


REPLACEMENTS = {Step3p7Experts: of_limit}
