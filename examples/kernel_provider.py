"""A kernel of your own in one file: graftq asks it about every layer, and it runs those that it accepts.

A package names the module with the hook in its pyproject.toml, instead of registering it by hand as below::

    [project.entry-points."graftq.kernels"]
    double = "my_package.kernels"
"""

import sys
from collections import Counter
from pathlib import Path

import pluggy
import torch
from transformers import AutoModelForCausalLM

from graftq.plugin.manager import plugin_manager
from graftq.quant_linear.layouts import CheckpointLayout
from graftq.quant_linear.linear import QuantLinear
from graftq.quant_linear.packing import dequantize
from graftq.quant_linear.selection import Accepted, Rejected

CHECKPOINT = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "tiny-mixtral-gptq")


class DoubleProvider:
    """Multiplies in float64."""

    name = "double"  # for GRAFTQ_KERNEL
    priority = 1000  # the highest among those that accept runs the layer; graftq's own have at most 100

    def judge(self, request):
        """Whether this provider runs the layer, and if not, why: `graftq doctor` prints the reason."""
        if request.device == "mps":
            return Rejected("there is no float64 on mps", remedy="move the layer to the CPU")
        return Accepted()

    def layout(self, spec):
        """The arrangement of the weights: here the checkpoint's own. Any other is packed once, while loading."""
        return CheckpointLayout(spec)

    def linear(self, x, packed, spec):
        """`x @ W.T + bias`: x [..., in_features] to [..., out_features], in x's dtype."""
        tensors = self.layout(spec).unpack(packed)
        out = x.double() @ dequantize(tensors, spec).double().T
        return (out if tensors.bias is None else out + tensors.bias[: spec.out_features]).to(x.dtype)


@pluggy.HookimplMarker("graftq")
def graftq_kernels():
    """The hook."""
    return [DoubleProvider()]


plugin_manager().register(sys.modules[__name__])

model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
print(Counter(layer.provider.name for layer in layers))
print(model(torch.tensor([[1, 2, 3]])).logits[0, -1, :4])
