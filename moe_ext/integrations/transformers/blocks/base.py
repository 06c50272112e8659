"""What all replacements have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import _default_apply_gate

from ..experts import experts_forward
from . import checkpoints


class Replacement:
    """A subclass of a class of transformers', whose instances become its own and back.

    `forward_arguments` are those of the forward that it takes the place of. A subclass that
    computes the experts has the flags of transformers' registry, as `experts_forward` reads
    them, and its parameters or properties by their names there.
    """

    forward_arguments: tuple[str, ...] = ("self", "hidden_states", "top_k_index", "top_k_weights")
    has_gate = True
    has_bias = False
    is_transposed = False
    is_concatenated = True
    has_post_expert_norm = False
    computes_experts = True  # rather than calling a module that does
    sentinels_are_drops = False  # whether an id >= num_experts is what its router dropped

    _apply_gate: Callable[..., Tensor] = _default_apply_gate
    forward = experts_forward

    def adopt(self):
        """Called once the instance is of this class."""

    def release(self):
        """Called while the instance is still of this class."""

    @classmethod
    def original_class(cls):
        return next(c for c in cls.__mro__ if c.__module__.startswith("transformers.models."))


class Stacked(Replacement, ABC):
    """Experts whose parameters become one for all experts, until they are released.

    The modules of the original wait out of the tree, their parameters on the meta device. The
    state_dict has the parameters as they are here and loads both these and the original's;
    what `save_pretrained` writes is the original's (checkpoints.py).
    """

    @classmethod
    @abstractmethod
    def shapes(cls, original):
        """{name: shape} of the parameters here, of a module of the original class."""

    @classmethod
    @abstractmethod
    def views(cls, name, stack):
        """{name in the original: the part of the parameter of this name here that it is}."""

    @classmethod
    def check(cls, original):
        """What keeps a module of the original class from being replaced, or None."""
        theirs = dict(original.named_parameters())
        for name, shape in cls.shapes(original).items():
            parts = list(cls.views(name, torch.empty(shape, device="meta")))
            frozen = [part for part in parts if not theirs[part].requires_grad]
            if 0 < len(frozen) < len(parts):
                return (
                    f"{', '.join(parts[:2])}{', ...' * (len(parts) > 2)} become one parameter, {name},"
                    f" and must have the same requires_grad, got False for {', '.join(frozen[:3])}"
                    f"{', ...' * (len(frozen) > 3)}"
                )

    @torch.no_grad()
    def adopt(self):
        theirs = dict(self.named_parameters())
        some = next(iter(theirs.values()))
        for name, shape in self.shapes(self).items():
            stack = some.new_empty(shape)
            for part, view in self.views(name, stack).items():
                view.copy_(theirs[part].view(view.shape))
            self.register_parameter(name, nn.Parameter(stack, theirs[part].requires_grad))
        self._originals, self._modules = self._modules, {}
        for module in self._originals.values():
            module.to("meta")

    @torch.no_grad()
    def release(self):
        stacks, some = self._parameters, next(self.parameters())
        for module in self._originals.values():
            module.to_empty(device=some.device).to(some.dtype).train(self.training)
        self._modules, self._parameters = self._originals, {}
        del self._originals
        theirs = dict(self.named_parameters())
        for name, stack in stacks.items():
            for part, view in self.views(name, stack).items():
                theirs[part].copy_(view.reshape(theirs[part].shape))
                theirs[part].requires_grad_(stack.requires_grad)

    def __setstate__(self, state):  # unpickled where nothing was replaced yet
        super().__setstate__(state)
        checkpoints.install()

    def in_original(self, name, stack):
        """{name in the original: what it is of this tensor, in its shape there}."""
        shapes = self._original_shapes()
        return {part: view.reshape(shapes[part]) for part, view in self.views(name, stack).items()}

    def _original_shapes(self):
        return {
            f"{module}.{name}": parameter.shape
            for module, original in self._originals.items()
            for name, parameter in original.named_parameters()
        }

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):  # fmt: skip
        shapes, absent = self._original_shapes(), []
        for name, parameter in self._parameters.items():
            parts = self.views(name, parameter.detach())
            found = {part: state_dict.pop(prefix + part) for part in parts if prefix + part in state_dict}  # fmt: skip
            if not found:
                continue
            some = next(iter(found.values()))
            stack = torch.empty_like(parameter, device=some.device, dtype=some.dtype)
            for part, view in self.views(name, stack).items():
                if part not in found:
                    absent.append(prefix + part)
                    view.copy_(parts[part])
                elif found[part].shape != shapes[part]:
                    errors.append(
                        f"{prefix}{part} must be of shape {tuple(shapes[part])},"
                        f" got {tuple(found[part].shape)}"
                    )
                else:
                    view.copy_(found[part].view(view.shape))
            state_dict[prefix + name] = stack
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)  # fmt: skip
        missing += absent


class PerExpert(Stacked):
    """A module an expert: two linear maps, and an activation and dropout between them.

    `names` says what these have for the parameters here.
    """

    has_gate = False
    names: dict[str, str] = {}

    @property
    def act_fn(self):
        expert = self._originals["expert_0"]
        act, p = expert.act, expert.dropout.p
        if self.training and p > 0:
            return lambda rows: F.dropout(act(rows), p)
        return act

    @classmethod
    def shapes(cls, original):
        expert = dict(original["expert_0"].named_parameters())
        return {
            name: (original.num_experts, *expert[theirs].shape)
            for name, theirs in cls.names.items()
        }

    @classmethod
    def views(cls, name, stack):
        return {f"expert_{e}.{cls.names[name]}": part for e, part in enumerate(stack)}
