"""The experts of a mixture-of-experts layer, packed: loaded projection by projection, run all at once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from graftq.quant_linear.activations import Activate, Activation, recognize
from graftq.quant_linear.experts_spec import PROJECTIONS, ExpertsSpec
from graftq.quant_linear.layouts import ExpertsLayout, GptqTensors, Packed, SeparateLayout
from graftq.quant_linear.linear import QuantLinear
from graftq.quant_linear.offloaded import check_own
from graftq.quant_linear.packed_module import PackedModule, is_transformed
from graftq.quant_linear.selection import ExpertsKernels, Request, Selection

ChooseExperts = Callable[[Request[ExpertsSpec]], Selection]
"""How experts find their kernel, prepared to run, e.g. ``graftq.plugin.manager.choose_kernel``."""

Addition = Callable[[int, torch.Tensor], torch.Tensor]
"""From an expert's number and a projection's input [tokens, K] to what is added to its output [tokens, N]."""


class QuantExpert(nn.Module):
    """One expert's projections: ``down_proj``, and ``gate_proj`` + ``up_proj``, ``gate_up_proj``, or ``up_proj``."""

    def __init__(self, projections: Mapping[str, QuantLinear]):
        super().__init__()
        for name, projection in projections.items():
            self.add_module(name, projection)


class QuantExperts(PackedModule):
    """``y[t] = sum_j weights[t, j] * expert[index[t, j]](x[t])`` over the chosen experts of each token.

    An expert computes ``down(activate(up(x)))``, where ``up`` gives gate and up values side by side
    (``is_concatenated``), interleaved, or up values alone. Experts may differ from each other, and an
    expert's projections among themselves, in bits, group and act-order.

    The experts are modules under their numbers, with the checkpoint's names and shapes, until a kernel that
    wants them in another layout is bound; then the tensors of that layout are this module's own. Set ``separate``
    to have them as modules whatever the kernel: adapters are added to single projections (:meth:`adding`).

    Args:
        experts: One per expert, in order.
        choose: Finds the kernel for a request.
        activate: From ``up``'s output [tokens, 2 * intermediate] (or [tokens, intermediate]) to
            ``down``'s input [tokens, intermediate]: gating and activation together. A formula by name
            (:class:`Activation`), or a function; of a function, the formula is recognized by its values.
        is_concatenated: Whether ``activate`` expects ``[gate; up]`` rather than gate and up interleaved.
        up_bias: Name and [num_experts, ...], added to ``up``'s output, where the model keeps biases apart.
        down_bias: Name and [num_experts, hidden], added to ``down``'s output, likewise.
        post_expert_norm: Applied to each expert's output before it is weighted.
    """

    def __init__(
        self,
        experts: list[QuantExpert],
        choose: ChooseExperts,
        activate: Activation | Activate,
        is_concatenated: bool = True,
        up_bias: tuple[str, nn.Parameter] | None = None,
        down_bias: tuple[str, nn.Parameter] | None = None,
        post_expert_norm: nn.Module | None = None,
    ):
        super().__init__()
        self.num_experts = len(experts)
        self.pinned = False
        self.separate = False
        self._additions: list[tuple[str, Addition]] = []
        self._choose = choose
        self._bias_names = [None if bias is None else bias[0] for bias in (up_bias, down_bias)]
        for index, expert in enumerate(experts):
            self.add_module(str(index), expert)
        for bias in (up_bias, down_bias):
            if bias is not None:
                self.register_parameter(*bias)
        self.post_expert_norm = post_expert_norm
        projections: Any = {
            name: [getattr(expert, name) for expert in experts] for name in PROJECTIONS if hasattr(experts[0], name)
        }
        is_gated = len(projections) == 3 or "gate_up_proj" in projections
        if isinstance(activate, Activation):
            activation: Activation | None = activate
            self.activate: Activate = partial(activate.of_product, is_gated=is_gated, is_concatenated=is_concatenated)
        else:
            activation = recognize(activate, is_gated, is_concatenated)
            self.activate = activate
        self.spec = ExpertsSpec(
            projections=tuple((name, tuple(layer.spec for layer in layers)) for name, layers in projections.items()),
            activation=activation,
            is_concatenated=is_concatenated,
            has_up_bias=up_bias is not None,
            has_down_bias=down_bias is not None,
            has_norm=post_expert_norm is not None,
        )
        self.layout: ExpertsLayout = SeparateLayout(self.spec)
        self._choose_linear = projections["down_proj"][0].choose
        self.dtype = projections["down_proj"][0].dtype
        self.keeps_dtype = projections["down_proj"][0].keeps_dtype
        self.form: Hashable = None
        self._packed_names: tuple[str, ...] = ()
        self._kernels: ExpertsKernels | None = None
        self.kernel: str | None = None
        self._bound_to: tuple[str, torch.dtype, bool] | None = None

    @property
    def choose(self) -> ChooseExperts:
        """What finds the kernel for a request."""
        return self._choose

    @property
    def bias_names(self) -> tuple[str | None, str | None]:
        """The names of :attr:`up_bias` and :attr:`down_bias`."""
        up, down = self._bias_names
        return up, down

    @property
    def up_bias(self) -> torch.Tensor | None:
        """The layer's own bias for gate and up, [num_experts, width], if it has one."""
        return None if self._bias_names[0] is None else getattr(self, self._bias_names[0])

    @property
    def down_bias(self) -> torch.Tensor | None:
        """The layer's own bias for down, [num_experts, hidden], if it has one."""
        return None if self._bias_names[1] is None else getattr(self, self._bias_names[1])

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Run the chosen experts.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: Integers [tokens, top_k]; values not in 0 to num_experts - 1 (another rank's) add nothing.
            top_k_weights: [tokens, top_k].

        Returns:
            [tokens, hidden] in the dtype of ``hidden_states``; the sum is taken in float32.
        """
        if is_transformed():
            raise NotImplementedError(
                f"torch.func through packed experts ({self.extra_repr()}); dequantize() the model for it"
            )
        hidden_states = self.widened(hidden_states)
        if self._bound_to != (hidden_states.device.type, hidden_states.dtype, self.separate):
            self.bind(hidden_states.device.type, hidden_states.dtype)
        assert self._kernels is not None
        return self._kernels.experts(self, hidden_states, top_k_index, top_k_weights)

    def bind(self, device: str, dtype: torch.dtype) -> None:
        """Choose the kernel for activations of ``dtype`` on ``device``, and repack the weights for it.

        Raises:
            graftq.quant_linear.selection.NoKernelError: if no kernel runs these experts.
        """
        self.separate |= self._is_surrounded()
        selection = self._choose(Request(self.spec, device, dtype, pinned=self.pinned, separate=self.separate))
        layout = selection.experts.layout(self.spec)
        if layout != self.layout:
            check_own(self, selection.provider.name)
            self._repack(layout)
        self._kernels, self.kernel = selection.experts, selection.provider.name
        self._bound_to = (device, dtype, self.separate)
        if isinstance(layout, SeparateLayout):
            for child in self.modules():
                if isinstance(child, QuantLinear):
                    child.pinned = self.pinned
                    child.bind(device, dtype)

    @contextmanager
    def adding(self, to: Literal["up", "down"], addition: Addition) -> Iterator[None]:
        """Add to the output of every expert's ``up`` (all that ``activate`` takes) or ``down``, as long as this lasts.

        Raises:
            RuntimeError: unless :attr:`separate` is set.
        """
        if not self.separate:
            raise RuntimeError("set separate first: a kernel for all experts at once has no place for additions")
        self._additions.append((to, addition))
        try:
            yield
        finally:
            self._additions.remove((to, addition))

    def add(self, to: Literal["up", "down"], expert: int, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """``output`` of a projection for input ``x``, and what is to be added to it, in its dtype."""
        for place, addition in self._additions:
            if place == to:
                output = (output + addition(expert, x)).to(output.dtype)
        return output

    def _is_surrounded(self) -> bool:
        """Whether adapters have been put around single projections."""
        separate = isinstance(self.layout, SeparateLayout)
        paths = [f"{expert}.{name}" for expert in range(self.num_experts) for name in self.spec.names]
        return separate and not all(isinstance(self.get_submodule(path), QuantLinear) for path in paths)

    def _repack(self, layout: ExpertsLayout) -> None:
        """Move the tensors from the current layout into another, expert by expert."""
        take: Callable[[str, int], GptqTensors]
        if isinstance(self.layout, SeparateLayout):
            take = self._release
        else:
            take = partial(self.layout.unpack, self.packed())
            for name in self._packed_names:
                delattr(self, name)
        if isinstance(layout, SeparateLayout):
            self._packed_names, self.form = (), None
            for expert in range(self.num_experts):
                self.add_module(str(expert), self._separate(take, expert))
        else:
            packed = layout.pack(take)
            if isinstance(self.layout, SeparateLayout):
                for expert in range(self.num_experts):
                    delattr(self, str(expert))
            self.hold(packed)
            self._packed_names, self.form = tuple(packed), packed.form
        self.layout = layout

    def _release(self, name: str, expert: int) -> GptqTensors:
        return self._child(name, expert).release()

    def _child(self, name: str, expert: int) -> QuantLinear:
        child = self.get_submodule(f"{expert}.{name}")
        assert isinstance(child, QuantLinear)
        return child

    def _separate(self, take: Callable[[str, int], GptqTensors], expert: int) -> QuantExpert:
        layers = {
            name: QuantLinear.from_tensors(specs[expert], take(name, expert), self._choose_linear, self.dtype)
            for name, specs in self.spec.projections
        }
        for layer in layers.values():
            layer.keeps_dtype = self.keeps_dtype
        return QuantExpert(layers)

    @property
    def tensors(self) -> Mapping[str, torch.Tensor | None]:
        """This module's own packed tensors, as they are: what a kernel looks its arguments up in."""
        return self._buffers

    def packed(self) -> Packed:
        """This module's own packed tensors, in the current layout; empty while each projection is a layer."""
        return Packed({name: getattr(self, name) for name in self._packed_names}, self.form)

    def checkpoint_tensors(self, name: str, expert: int) -> GptqTensors:
        """One projection exactly as the checkpoint stores it, whatever the layout is now."""
        if isinstance(self.layout, SeparateLayout):
            return self._child(name, expert).checkpoint_tensors()
        return self.layout.unpack(self.packed(), name, expert)

    def extra_repr(self) -> str:
        """The experts in short."""
        bits = sorted({spec.bits for _, specs in self.spec.projections for spec in specs})
        kernel = f", kernel={self.kernel}" if self.kernel else ""
        return f"{self.num_experts} x {' + '.join(self.spec.names)}, bits={'/'.join(map(str, bits))}{kernel}"
