"""Experts that transformers keeps quantised: not run here yet, and told so rather than ignored."""

import functools
import warnings

TEXT = (
    "moe_ext: {name} keeps its experts in {kind}, which moe_ext does not run yet{but}; use"
    ' experts_implementation="{other}", or load the model with quantization_config={config}'
    " and run its experts on moe_ext"
)


def install():
    """Called by `register`; each is replaced once, and does what it did for all but moe_ext."""
    _install_fp8()
    _install_mxfp4()


def _install_fp8():
    try:
        from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    except ImportError:
        return
    ALL_FP8_EXPERTS_FUNCTIONS.register("moe_ext", _refuse_fp8)


def _refuse_fp8(self, *args, **kwargs):
    config = "FineGrainedFP8Config(dequantize=True)"
    name = type(self).__name__
    raise NotImplementedError(
        TEXT.format(name=name, kind="float8", but="", other="grouped_mm", config=config)
    )


def _install_mxfp4():
    """Their module has a forward of its own, which asks no registry."""
    try:
        from transformers.integrations.mxfp4 import Mxfp4GptOssExperts
    except ImportError:
        return
    if not hasattr(Mxfp4GptOssExperts.__init__, "before_moe_ext"):
        Mxfp4GptOssExperts.__init__ = _saying_so(Mxfp4GptOssExperts.__init__)


def _saying_so(init):
    @functools.wraps(init)
    def __init__(self, config, *args, **kwargs):
        init(self, config, *args, **kwargs)
        # Once a place by Python's own rule, so once for all layers.
        if getattr(config, "_experts_implementation", None) == "moe_ext":
            but = " and which run on transformers' kernels instead"
            config = "Mxfp4Config(dequantize=True)"
            name = type(self).__name__
            warnings.warn(
                TEXT.format(name=name, kind="MXFP4", but=but, other="eager", config=config),
                stacklevel=2,
            )

    __init__.before_moe_ext = init
    return __init__
