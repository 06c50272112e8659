"""Every MoE model of the installed transformers: on moe_ext it computes what `eager` does.

python tests/integrations/test_conformance.py    writes results/conformance.md
"""

import pathlib
import sys

import pytest
import torch

RESULTS = pathlib.Path(__file__).parent / "results" / "conformance.md"
if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

pytest.importorskip("transformers")

import transformers  # noqa: E402
from transformers.activations import SiLUActivation  # noqa: E402

from moe_ext._load import BACKEND  # noqa: E402
from moe_ext.integrations.transformers import register  # noqa: E402
from support import paths, tiny_models  # noqa: E402

pytestmark = pytest.mark.skipif(
    BACKEND == "emulated", reason="minutes, for kernels that have emulated tests of their own"
)
from support.oracle import relative_error  # noqa: E402

# Gates that the kernels do not know, by the dtypes in which that is so.
CALLED = {
    "beam.BeamExperts": [torch.float64],
    "inkling2.Inkling2Experts": [torch.float32, torch.float64],
    "inkling2_loop.Inkling2LoopExperts": [torch.float32, torch.float64],
}

# In float64, results differ by a few of its eps; where the model itself goes through float32
# on its way, by what that rounding makes of them.
FLOAT64_ERROR = 1e-13
FLOAT32_ERROR = 16 * torch.finfo(torch.float32).eps
FLOAT32_INSIDE = {
    "beam.BeamExperts": "the gate computes in float32",
    "muse_spark.MuseSparkExperts": "the norm after the experts computes in float32",
    "nemotron_h.NemotronHExperts": "the router rounds its input to float32",
    "openai_privacy_filter.OpenAIPrivacyFilterExperts": "the experts compute in float32",
}
NO_FLOAT64 = dict.fromkeys(
    ("inkling2.Inkling2Experts", "inkling2_loop.Inkling2LoopExperts"),
    "its router does not run in float64",
)


def compare(name):
    """{(dtype, implementation): {part: tensor}}, {dtype: path taken}, and the experts."""
    torch.manual_seed(0)
    model = tiny_models.build(name)
    inputs = tiny_models.inputs(model)
    runs, taken = {}, {}
    for dtype in (torch.float32,) if name in NO_FLOAT64 else (torch.float32, torch.float64):
        model.to(dtype)
        for implementation in ("eager", "moe_ext"):
            model.set_experts_implementation(implementation)
            with paths.recorded() as calls:
                runs[dtype, implementation] = results(model, inputs)
        (taken[dtype],) = set(calls)
    return runs, taken, tiny_models.experts_of(model)[0]


def results(model, inputs):
    """The output (logits, or hidden states), the gradients of the experts and of all else."""
    dtype = model.dtype
    inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}
    model.zero_grad()
    output = model(**inputs, use_cache=False)[0]
    torch.manual_seed(1)
    output.backward(torch.randn(output.shape, dtype=torch.float64).to(output.dtype))
    experts = {p for module in tiny_models.experts_of(model) for p in module.parameters()}
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    assert all(gradients[p].any() for p in experts), "experts without a gradient show nothing"
    return dict(
        output=output.detach(),
        experts=flat(gradients[p] for p in model.parameters() if p in experts),
        others=flat(g for p, g in gradients.items() if p not in experts and g is not None),
    )


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.mark.parametrize("name", tiny_models.names())
def test_as_eager(name):
    register()
    runs, taken, _ = compare(name)
    assert [dtype for dtype, path in taken.items() if path == "called"] == [
        dtype for dtype in CALLED.get(name, ()) if dtype in taken
    ]
    eager, ours = runs[torch.float32, "eager"], runs[torch.float32, "moe_ext"]
    if name in NO_FLOAT64:
        for part, expected in eager.items():
            assert relative_error(ours[part], expected) < FLOAT32_ERROR, part
        return
    oracle, exact = runs[torch.float64, "eager"], runs[torch.float64, "moe_ext"]
    for part, expected in oracle.items():
        limit = FLOAT32_ERROR if name in FLOAT32_INSIDE else FLOAT64_ERROR
        assert relative_error(exact[part], expected) < limit, part
        # What a whole model makes of rounding errors is luck, so twice eager's own.
        limit = max(2 * relative_error(eager[part], expected), FLOAT32_ERROR / 4)
        assert relative_error(ours[part], expected) <= limit, part


# ---- the table -----------------------------------------------------------------------


def row(name):
    """One line of the table."""
    runs, taken, experts = compare(name)
    model, experts_class = name.split(".")
    cells = [model, experts_class, deviation(experts), ", ".join(sorted(set(taken.values())))]
    float32 = runs[torch.float32, "moe_ext"], runs[torch.float32, "eager"]
    if name in NO_FLOAT64:
        ours, eager = float32
        cells += [f"{relative_error(ours[part], eager[part]):.1e}" for part in eager]
        cells.append(NO_FLOAT64[name])
    else:
        exact, oracle = runs[torch.float64, "moe_ext"], runs[torch.float64, "eager"]
        for part, expected in oracle.items():
            errors = [f"{relative_error(run[part], expected):.1e}" for run in float32]
            cells.append(f"{errors[0]} ({errors[1]})")
        worst = max(relative_error(exact[part], oracle[part]) for part in oracle)
        cells.append(
            f"{worst:.1e}" + (f": {FLOAT32_INSIDE[name]}" if name in FLOAT32_INSIDE else "")
        )
    return "| " + " | ".join(cells) + " |"


def deviation(experts):
    """How these experts differ from the usual ones, in words."""
    words = dict(
        transposed=experts.is_transposed,
        biased=experts.has_bias,
        interleaved=not experts.is_concatenated,
        ungated=not experts.has_gate,
        norm=experts.has_post_expert_norm,
    )
    words = [word for word, is_so in words.items() if is_so]
    if experts.has_gate and type(experts)._apply_gate.__name__ != "_default_apply_gate":
        words.append("own gate")
    act_fn = getattr(experts, "act_fn", None)
    if act_fn is not None and not isinstance(act_fn, SiLUActivation):
        words.append(getattr(act_fn, "__name__", type(act_fn).__name__))
    return ", ".join(words)


HEAD = """# Every MoE model of transformers {version} on moe_ext

Written by `python tests/integrations/test_conformance.py`: a tiny random model for every experts
class of the installed transformers, weights of unit scale, 48 tokens. Errors are relative, by
Frobenius norm, of the output, of all experts' gradients, and of all other gradients. float32 is
measured against `eager` in float64, in brackets the error of `eager` itself; where a model does
not run in float64, against `eager` in float32. The last column is float64 against `eager` in
float64, the largest of the three.

Path: fused, or called: the kernels do not know this gate, and the model's own is called.

| model | experts | unlike most | path | output | experts' gradients | other gradients | float64 |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""

if __name__ == "__main__":
    register()
    text = HEAD.format(version=transformers.__version__)
    for name in tiny_models.names():
        line = row(name)
        print(line, flush=True)
        text += f"{line}\n"
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(text)
