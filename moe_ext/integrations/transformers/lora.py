"""LoRA on experts: PEFT's `target_parameters`, without its merged copy of every stack.

PEFT wraps the experts in a `ParamWrapper` a parameter. Its forward puts W + s A B in W's place
for as long as the experts run: a tensor of W's size, which autograd keeps. Experts that run on
moe_ext get the factors instead and compute, on the rows of each expert e,

    x W_e + (x A_e) (s B_e)

PEFT itself computes adapters that may mean something else, and a warning, once, names the reason.
"""

import contextlib
import functools
import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn


class LowRank(NamedTuple):
    """What the active adapters add to a stack of matrices: x[r] @ a[e] @ b[e]."""

    a: Tensor  # (E, in, r), all adapters' ranks side by side
    b: Tensor  # (E, r, out), times each adapter's scale


def install():
    """Has PEFT, where it is installed, give the factors to experts that run on moe_ext.

    Replaces one method of one class, `ParamWrapper._activate_lora`, and only once; for
    anything but experts on moe_ext the method is what it was.
    """
    try:
        from peft.tuners.lora.layer import ParamWrapper
    except ImportError:  # no PEFT, or one before target_parameters
        return
    if not hasattr(ParamWrapper._activate_lora, "before_moe_ext"):
        ParamWrapper._activate_lora = _handing_over(ParamWrapper._activate_lora)


def low_rank_of(experts, name):
    """The `LowRank` of the experts' parameter of that name while a ParamWrapper runs, or None."""
    return getattr(experts, _attribute(name), None)


def _attribute(name):
    return f"_moe_ext_lora_{name}"


def _handing_over(activate):
    """`ParamWrapper._activate_lora`, during which `low_rank_of` knows the factors."""

    @contextlib.contextmanager
    @functools.wraps(activate)
    def activate_lora(self, active_adapters):
        experts = self.get_base_layer()
        adapters = [name for name in active_adapters if name in self.lora_A]
        if not adapters or not _runs_on_moe_ext(experts) or _has_unknown(self, experts, adapters):
            with activate(self, active_adapters):
                yield
            return
        attribute = _attribute(self.parameter_name)
        setattr(experts, attribute, _low_rank(self, adapters, experts))
        try:
            yield
        finally:
            delattr(experts, attribute)

    activate_lora.before_moe_ext = activate
    return activate_lora


def _runs_on_moe_ext(module):
    config = getattr(module, "config", None)
    is_decorated = hasattr(module, "is_concatenated")
    return is_decorated and getattr(config, "_experts_implementation", None) == "moe_ext"


def _local(wrapper, experts):
    """The slice of the experts that are on this rank: PEFT's factors are those of all.

    Raises:
        RuntimeError: under an expert parallelism that does not tell which ones these are.
    """
    count = experts.num_experts
    if count == wrapper.num_experts:
        return slice(None)
    mesh = getattr(wrapper.get_param(), "device_mesh", None)
    names = () if mesh is None else mesh.mesh_dim_names or ()
    if mesh is None or (mesh.ndim > 1 and "ep" not in names):
        raise RuntimeError(
            f"moe_ext: LoRA on {type(experts).__name__}.{wrapper.parameter_name} has factors of"
            f" {wrapper.num_experts} experts, of which this rank has {count}, and its parameter is no"
            " DTensor with a mesh dimension ep, which would tell which ones"
        )
    start = count * mesh.get_local_rank("ep" if "ep" in names else 0)
    return slice(start, start + count)


def _low_rank(wrapper, adapters, experts):
    """PEFT keeps A as (E r, in), the expert slowest, and B as (out, r E), the expert fastest."""
    count, dtype, local = wrapper.num_experts, wrapper.get_param().dtype, _local(wrapper, experts)
    a, b = [], []
    for name in adapters:
        weight_a, weight_b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
        a.append(weight_a.to(dtype).unflatten(0, (count, -1))[local].transpose(1, 2))
        by_expert = weight_b.to(dtype).unflatten(1, (-1, count)).permute(2, 1, 0)[local]
        # B lies as the stack does, so that no product has to turn it over.
        by_expert = (
            by_expert.contiguous() if experts.is_transposed else by_expert.mT.contiguous().mT
        )
        b.append(by_expert * wrapper.scaling[name])
    return LowRank(_side_by_side(a, 2), _side_by_side(b, 1))


def _side_by_side(parts, dim):
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


# ---- what is not known ---------------------------------------------------------------

_warned: set[str] = set()


def _has_unknown(wrapper, experts, adapters):
    """Whether something here may mean more than x A B; warns of it once."""
    problem = _problem_of_parameter(wrapper, experts) or next(
        filter(None, (_problem_of_adapter(wrapper, name) for name in adapters)), None
    )
    text = f"{type(experts).__name__}.{wrapper.parameter_name}: {problem}"
    if problem and text not in _warned:
        _warned.add(text)
        warnings.warn(
            f"moe_ext: LoRA on {text}; PEFT computes it, and keeps a merged copy of the parameter",
            stacklevel=4,
        )
    return problem is not None


def _problem_of_parameter(wrapper, experts):
    matrices = ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")
    if wrapper.parameter_name not in matrices:
        return "not a matrix of the experts"
    if [c.__name__ for c in type(wrapper).__mro__[:2]] != ["ParamWrapper", "Module"]:
        return f"an unknown kind of wrapper, {type(wrapper).__name__}"
    if wrapper._did_swap_in_out_features == experts.is_transposed:
        return "its layout is not the experts'"
    return None


def _problem_of_adapter(wrapper, name):
    a, b = wrapper.lora_A[name], wrapper.lora_B[name]
    inner = wrapper.num_experts * wrapper.r[name]
    shapes = (inner, wrapper.in_features), (wrapper.out_features, inner)
    found = {
        "is a variant of LoRA": name in wrapper.lora_variant or wrapper.use_dora[name],
        "has dropout": type(wrapper.lora_dropout[name]) is not nn.Identity,
        "has a bias": wrapper.lora_bias[name] or b.bias is not None,
        "has factors of an unknown kind": not type(a) is type(b) is nn.Linear
        or shapes != (a.weight.shape, b.weight.shape),
    }
    return next((f'adapter "{name}" {problem}' for problem, is_so in found.items() if is_so), None)
