"""What all replacements have in common."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import _default_apply_gate

from ..experts import experts_forward


class Replacement:
    """A subclass of a class of transformers', whose instances become its own and back.

    `forward_arguments` are those of the forward that it takes the place of. A subclass that
    computes the experts has the flags of transformers' registry, as `experts_forward` reads
    them, and its parameters or properties by their names there.
    """

    forward_arguments = ("self", "hidden_states", "top_k_index", "top_k_weights")
    has_gate = True
    has_bias = False
    is_transposed = False
    is_concatenated = True
    has_post_expert_norm = False
    computes_experts = True  # rather than calling a module that does
    sentinels_are_drops = False  # whether an id >= num_experts is what its router dropped

    _apply_gate = _default_apply_gate
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

    The modules of the original wait out of the tree, their parameters on the meta device.
    In the state_dict the parameters go by their names and shapes in the original, so that
    what is saved from a model with replacements is read by one without.
    """

    @abstractmethod
    def shapes(self):
        """{name: shape} of the parameters here; asked before any of them is made."""

    @abstractmethod
    def views(self):
        """{name in the original: the part of the parameters here that it is}."""

    @torch.no_grad()
    def adopt(self):
        theirs = dict(self.named_parameters())
        some = next(iter(theirs.values()))
        for name, shape in self.shapes().items():
            parameter = nn.Parameter(some.new_empty(shape), some.requires_grad)
            self.register_parameter(name, parameter)
        for name, view in self.views().items():
            view.copy_(theirs[name].view(view.shape))
        self._originals, self._modules = self._modules, {}
        for module in self._originals.values():
            module.to("meta")

    @torch.no_grad()
    def release(self):
        views, some = self.views(), next(self.parameters())
        for module in self._originals.values():
            module.to_empty(device=some.device).to(some.dtype).train(self.training)
        self._modules, self._parameters = self._originals, {}
        del self._originals
        for name, parameter in self.named_parameters():
            parameter.copy_(views[name].reshape(parameter.shape))
            parameter.requires_grad_(some.requires_grad)

    def _theirs(self):
        """{name in the original: (its shape there, the part of the parameters here)}."""
        views = self.views()
        return {
            f"{module}.{name}": (parameter.shape, views[f"{module}.{name}"])
            for module, original in self._originals.items()
            for name, parameter in original.named_parameters()
        }

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for name, (shape, view) in self._theirs().items():
            destination[prefix + name] = (view if keep_vars else view.detach()).reshape(shape)

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):  # fmt: skip
        theirs = {prefix + name: entry for name, entry in self._theirs().items()}
        for key, (shape, view) in theirs.items():
            if key not in state_dict:
                missing.append(key)
            elif state_dict[key].shape != shape:
                errors.append(
                    f"{key} must be of shape {tuple(shape)}, got {tuple(state_dict[key].shape)}"
                )
            else:
                view.copy_(state_dict[key].view(view.shape))
        unexpected += [k for k in state_dict if k.startswith(prefix) and k not in theirs]


class PerExpert(Stacked):
    """A module an expert: two linear maps, and an activation and dropout between them.

    `names` says what these have for the parameters here.
    """

    has_gate = False
    names = {}

    @property
    def act_fn(self):
        expert = self._originals["expert_0"]
        act, p = expert.act, expert.dropout.p
        if self.training and p > 0:
            return lambda rows: F.dropout(act(rows), p)
        return act

    def shapes(self):
        expert = dict(self["expert_0"].named_parameters())
        return {
            name: (self.num_experts, *expert[theirs].shape) for name, theirs in self.names.items()
        }

    def views(self):
        return {
            f"expert_{e}.{theirs}": self._parameters[name][e]
            for name, theirs in self.names.items()
            for e in range(self.num_experts)
        }
