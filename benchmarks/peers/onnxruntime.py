"""onnxruntime's `com.microsoft.MoE`, whose CPU kernel is float32's alone.

The operator routes by itself, as a softmax over the K largest of each token's logits: the logarithms
of the given weights, with all other experts far below, are logits that it takes to them.
"""

import tempfile
from pathlib import Path

import torch

TITLE = "onnxruntime"
VENV = "onnxruntime"
REQUIREMENTS = ("onnxruntime==1.32.0", "onnx==1.23.2", "torch==2.13.0")
DTYPES = ("float32",)
NEEDS = ()

NOT_CHOSEN = -1e4


def session(num_experts, top_k, hidden, **weights):
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node(
        "MoE",
        ["x", "logits", "gate_up", "", "down"],
        ["y"],
        domain="com.microsoft",
        k=top_k,
        normalize_routing_weights=1,
        activation_type="swiglu",
        swiglu_fusion=1,  # gates and ups in turns: the only layout that this kernel has
        activation_alpha=1.0,
        activation_beta=0.0,
    )

    def value(name, width):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["T", width])

    graph = helper.make_graph(
        [node],
        "experts",
        [value("x", hidden), value("logits", num_experts)],
        [value("y", hidden)],
        [numpy_helper.from_array(weight.numpy(), name) for name, weight in weights.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "experts.onnx"
        onnx.save_model(
            model, path, save_as_external_data=True, location="weights", size_threshold=1024
        )  # fmt: skip
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def experts(gate_up_proj, down_proj):
    num_experts, hidden, intermediate = down_proj.shape
    gates_and_ups = gate_up_proj.view(num_experts, 2, intermediate, hidden).transpose(1, 2)
    in_turns = gates_and_ups.reshape(gate_up_proj.shape).contiguous()

    def bind(x, weights, experts):
        top_k = experts.shape[1]
        if top_k not in sessions:
            sessions[top_k] = session(num_experts, top_k, hidden, gate_up=in_turns, down=down_proj)
        logits = torch.full((len(x), num_experts), NOT_CHOSEN)
        logits.scatter_(1, experts.long(), weights.log())
        inputs = {"x": x.numpy(), "logits": logits.numpy()}

        def run():
            return sessions[top_k].run(None, inputs)[0]

        return run

    sessions = {}
    return bind
