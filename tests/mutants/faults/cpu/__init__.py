"""The faults that the suite on the CPU must catch."""

from . import (
    bfloat16,
    combine,
    experts,
    layer,
    reference,
    router,
    scatter,
    seams,
    transformers,
)

FAULTS = [
    *reference.FAULTS,
    *router.FAULTS,
    *scatter.FAULTS,
    *experts.FAULTS,
    *bfloat16.FAULTS,
    *combine.FAULTS,
    *layer.FAULTS,
    *seams.FAULTS,
    *transformers.FAULTS,
]
