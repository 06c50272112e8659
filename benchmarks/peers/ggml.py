"""llama.cpp's ggml, from the libraries that llama-cpp-python compiles for this processor.

The graph is that of llama.cpp's MoE layers with gates and ups in one tensor (`build_moe_ffn`).
Activations are float32 whatever the weights are, as everywhere in llama.cpp; its products with
bfloat16 weights round them.
"""

import ctypes
import importlib.util
from pathlib import Path

import torch

TITLE = "llama.cpp (ggml)"
VENV = "ggml"
REQUIREMENTS = ("llama-cpp-python==0.3.36", "torch==2.13.0")
DTYPES = ("float32", "bfloat16")
NEEDS = ()

POINTER, INT, INT64, SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
TYPES = {torch.float32: 0, torch.int32: 26, torch.bfloat16: 30}  # enum ggml_type


class InitParams(ctypes.Structure):
    _fields_ = [("mem_size", SIZE), ("mem_buffer", POINTER), ("no_alloc", ctypes.c_bool)]


FUNCTIONS = {
    "init": (POINTER, InitParams),
    "new_tensor_3d": (POINTER, POINTER, INT, INT64, INT64, INT64),
    "get_data": (POINTER, POINTER),
    "mul_mat_id": (POINTER, POINTER, POINTER, POINTER, POINTER),
    "swiglu": (POINTER, POINTER, POINTER),
    "mul": (POINTER, POINTER, POINTER, POINTER),
    "add": (POINTER, POINTER, POINTER, POINTER),
    "view_2d": (POINTER, POINTER, POINTER, INT64, INT64, SIZE, SIZE),
    "new_graph": (POINTER, POINTER),
    "build_forward_expand": (None, POINTER, POINTER),
    "backend_get_default_buffer_type": (POINTER, POINTER),
    "backend_alloc_ctx_tensors_from_buft": (POINTER, POINTER, POINTER),
    "backend_graph_compute": (INT, POINTER, POINTER),
    "backend_cpu_init": (POINTER,),
    "backend_cpu_set_n_threads": (None, POINTER, INT),
}


class Ggml:
    """ggml's functions without their prefix, over one CPU backend."""

    def __init__(self, threads):
        folder = Path(importlib.util.find_spec("llama_cpp").origin).parent / "lib"
        libraries = [
            ctypes.CDLL(folder / f"libggml-{name}.so", mode=ctypes.RTLD_GLOBAL)
            for name in ("base", "cpu")
        ]
        for name, (result, *arguments) in FUNCTIONS.items():
            library = next(lib for lib in libraries if hasattr(lib, f"ggml_{name}"))
            function = getattr(library, f"ggml_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.backend = self.backend_cpu_init()
        self.backend_cpu_set_n_threads(self.backend, threads)

    def context(self):
        """For the descriptions of some hundred tensors; their data is allocated apart."""
        return self.init(InitParams(1 << 22, None, True))

    def tensor(self, context, like):
        """Its dimensions are those of a 3-d torch tensor in reverse."""
        return self.new_tensor_3d(context, TYPES[like.dtype], *reversed(like.shape))

    def allocate(self, context):
        kind = self.backend_get_default_buffer_type(self.backend)
        if not self.backend_alloc_ctx_tensors_from_buft(context, kind):
            raise MemoryError("ggml could not allocate its tensors")

    def fill(self, tensor, values):
        values = values.contiguous()
        ctypes.memmove(self.get_data(tensor), values.data_ptr(), values.nbytes)

    def compute(self, graph):
        if self.backend_graph_compute(self.backend, graph):
            raise RuntimeError("ggml could not compute its graph")


def experts(gate_up_proj, down_proj):
    ggml = Ggml(torch.get_num_threads())
    weights_context = ggml.context()
    gate_up, down = (ggml.tensor(weights_context, w) for w in (gate_up_proj, down_proj))
    ggml.allocate(weights_context)
    ggml.fill(gate_up, gate_up_proj)
    ggml.fill(down, down_proj)

    def bind(x, weights, experts):
        (T, H), K = x.shape, experts.shape[1]
        inputs = x.float()[:, None], experts[None], weights[:, :, None]
        context = ggml.context()
        x_, experts_, weights_ = tensors = [ggml.tensor(context, values) for values in inputs]
        rows = ggml.swiglu(context, ggml.mul_mat_id(context, gate_up, x_, experts_))
        rows = ggml.mul(context, ggml.mul_mat_id(context, down, rows, experts_), weights_)
        choices = [ggml.view_2d(context, rows, H, T, K * H * 4, j * H * 4) for j in range(K)]
        y = choices[0]
        for choice in choices[1:]:
            y = ggml.add(context, y, choice)
        graph = ggml.new_graph(context)
        ggml.build_forward_expand(graph, y)
        ggml.allocate(context)
        for tensor, values in zip(tensors, inputs):
            ggml.fill(tensor, values)
        memory = (ctypes.c_float * (T * H)).from_address(ggml.get_data(y))
        result = torch.frombuffer(memory, dtype=torch.float32).view(T, H)

        def run():
            ggml.compute(graph)
            return result

        return run

    return bind
