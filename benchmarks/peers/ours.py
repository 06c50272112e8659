"""moe_ext: the plan and the experts, as the layer calls them after its router."""

TITLE = "moe_ext"
VENV = None
REQUIREMENTS = ()
DTYPES = ("float32", "bfloat16")
NEEDS = ()


def experts(gate_up_proj, down_proj):
    from moe_ext.functional import capacity_scatter, moe_forward

    num_experts = len(gate_up_proj)

    def bind(x, weights, experts):
        def run():
            plan = capacity_scatter(experts, num_experts)
            return moe_forward(x, weights, plan, gate_up_proj, down_proj)

        return run

    return bind
