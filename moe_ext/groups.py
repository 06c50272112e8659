"""Which processes hold the same layers: those whose counts belong together.

Under pipeline parallelism the ranks of the default group hold different layers, whose counts
must not be summed; under tensor parallelism several ranks see the same tokens, which must not
count twice.
"""

import hashlib
import weakref

import torch
import torch.distributed as dist

_found: weakref.WeakKeyDictionary = (
    weakref.WeakKeyDictionary()
)  # model: (the default group of then, its group)


def is_distributed():
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def group_of(op, model, routers, process_group=None):
    """(whether there is anyone to sum with, with whom: None for the default group).

    routers: {name of a layer: a parameter of its router}. The first call for a model compares
    these over the default group, all of whose ranks must call, those without layers too.
    """
    if process_group is not None:
        return True, process_group
    if not is_distributed():
        return False, None
    world, group = _found.get(model, (None, None))
    if world is not dist.group.WORLD:
        group = _find(op, _fingerprint(model, routers))
        _found[model] = dist.group.WORLD, group
    return True, group


def _find(op, mine):
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    if _SHARDED in everyones:
        raise ValueError(
            f"{op}: process_group must name the ranks that hold the same layers: parameters of"
            " routers that are flat or sharded without DTensor do not tell"
        )
    if all(layers == mine for layers in everyones):
        return None
    found = None
    for layers in dict.fromkeys(everyones):  # in the same order everywhere, as new_group wants
        ranks = [rank for rank, theirs in enumerate(everyones) if theirs == layers]
        group = dist.new_group(ranks)
        if layers == mine:
            found = group
    return found


_SHARDED = "sharded"


def _fingerprint(model, routers):
    """The layers and what tells them from others of the same names; hashable."""
    layers = []
    for name, parameter in routers.items():
        if parameter.dim() < 2 or parameter.numel() == 0:
            return _SHARDED
        if hasattr(parameter, "device_mesh"):  # a DTensor: its ranks have it together
            content = tuple(parameter.device_mesh.mesh.flatten().tolist())
        else:
            some = parameter.detach().flatten()[:4096].to("cpu", torch.float32)
            content = hashlib.sha256(some.numpy().tobytes()).hexdigest()
        layers.append((name, tuple(parameter.shape), content))
    return tuple(layers), _tensor_parallel_rank(model)


def _tensor_parallel_rank(model):
    """Its ranks share a batch; transformers keeps the mesh on the model."""
    for module in model.modules():
        mesh = getattr(module, "_device_mesh", None)
        if mesh is not None and "tp" in (mesh.mesh_dim_names or ()):
            return mesh["tp"].get_local_rank()
    return 0
