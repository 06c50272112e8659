"""moe_ext inside Hugging Face's transformers.

    from moe_ext.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moe_ext")
    # or, on a model that is loaded: model.set_experts_implementation("moe_ext")

Models with `MoE` layers (`moe_ext.replace_ffn`) save and load once this is imported: saving.py.
An upcycled Llama becomes a Mixtral checkpoint: `export_mixtral(model, folder)`.
Blocks outside of its registry (Switch, NLLB-MoE, DBRX, JetMoe, Llama 4, ...): `replace(model)`.
In training: `RoutingHealth`, or `RoutingCallback` in a Trainer. A Trainer that resumes restores the
experts too, which transformers itself leaves at random values: resuming.py.

Tested with transformers 5.17.0 to 5.24.0 and every MoE model in them: the results are in
tests/integrations/results/conformance.md.
Importing this package imports transformers; importing moe_ext does not.
"""

from ._version import check_transformers

check_transformers()

from . import resuming, saving  # noqa: E402, F401
from .blocks import replace, restore  # noqa: E402
from .experts import register  # noqa: E402
from .health import RoutingHealth  # noqa: E402
from .mixtral import export_mixtral  # noqa: E402
from .trainer import RoutingCallback  # noqa: E402

__all__ = ["RoutingCallback", "RoutingHealth", "export_mixtral", "register", "replace", "restore"]
