"""A CPU's tensors as if they were a GPU's: what a GPU would refuse, the emulated suite refuses too.

Tensors are the device's unless they were taken from it (`.cpu()`, `.to("cpu")`) or made with
device="cpu"; what follows from such ones alone is so as well. Refused are a function of both
kinds, NumPy's view of the device's, and a CPU's generator for the device's numbers.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# What takes tensors of both devices, or asks nothing of memory.
BOTH = {
    torch.Tensor.copy_, torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.type_as, torch.Tensor.new_tensor,
    torch.Tensor.__setitem__, torch.Tensor.__getitem__, torch.Tensor.index_put_, torch.Tensor.set_,
    torch.Tensor.__format__, torch.Tensor.__deepcopy__, torch.Tensor.requires_grad_,
    torch.Tensor.data.__set__, torch.Tensor.grad.__set__, torch.broadcast_tensors,
}  # fmt: skip


class AsIf(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        taken = [t for t in tensors if getattr(t, "taken_from_device", False)]
        # A number of no dimension may come from the CPU.
        theirs = [t for t in tensors if not getattr(t, "taken_from_device", False)]
        if function not in BOTH and any(t.dim() for t in taken) and theirs:
            raise RuntimeError(f"as if on a GPU: {name} of tensors on the device and on the CPU")
        if name in ("numpy", "__array__") and theirs:
            raise TypeError("as if on a GPU: NumPy cannot see the device's memory")
        generator = kwargs.get("generator")
        goes = names_cpu(kwargs.get("device")) or (
            name in ("to", "cpu") and (name == "cpu" or any(map(names_cpu, args[1:])))
        )
        if kwargs.get("device") is None and not taken and is_cpus(generator):
            raise RuntimeError(f"as if on a GPU: {name} with a generator of the CPU")
        result = function(*args, **kwargs)
        if goes or (taken and not theirs):
            for t in tree_leaves(result):
                if isinstance(t, torch.Tensor):
                    if any(t is argument for argument in theirs):
                        result = t = t.clone()  # .cpu() of a CPU's tensor is itself
                    t.taken_from_device = True
        return result


def is_cpus(generator):
    return generator is not None and generator.device.type == "cpu"


def names_cpu(argument):
    return argument == "cpu"  # a device object may be what another tensor said of itself
