"""A linear layer whose weight stays packed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Protocol

import torch
from torch import nn

from graftq.quant_linear.layouts import CheckpointLayout, GptqTensors, Layout, Packed
from graftq.quant_linear.offloaded import brought_in, check_own
from graftq.quant_linear.packed_module import PackedModule, is_transformed
from graftq.quant_linear.packing import dequantize
from graftq.quant_linear.reference import TorchProvider
from graftq.quant_linear.selection import KernelProvider, Request, Selection
from graftq.quant_linear.spec import QuantSpec

Choose = Callable[[Request[QuantSpec]], Selection]
"""How a layer finds its kernel, prepared to run, e.g. ``graftq.plugin.manager.choose_kernel``."""


class SharedProduct(Protocol):
    """One product that several layers share (:class:`graftq.quant_linear.gpu.siblings.SiblingProduct`)."""

    def __call__(self, layer: QuantLinear, place: int, x: torch.Tensor) -> torch.Tensor:
        """What ``layer``, the one at ``place`` among them, returns for ``x``."""

    def spec_at(self, place: int) -> QuantSpec | None:
        """What the call of the layer at ``place`` multiplies; None if another layer's call does it."""

    def dissolve(self, reason: str) -> None:
        """Let each layer multiply by itself from now on."""


class QuantLinear(PackedModule):
    """``y = x @ W.T + bias`` for ``x`` [..., in_features], with ``W`` as GPTQ stores it.

    The tensors bear the checkpoint's names and shapes (:class:`QuantSpec`) until a kernel that
    wants another layout is bound. No cast of the model changes them, and none has a gradient; activations may.
    They are parameters until a kernel is bound, and as long as they are offloaded (``pinned``): accelerate
    brings buffers in only if it is asked to.

    Args:
        spec: The projection.
        choose: Finds the kernel for a request.
        dtypes: Dtype of each tensor that the checkpoint stores, by suffix; the tensors to make.
        dtype: The model's dtype, which ``weight`` is given in.
        device: Where to allocate the tensors, usually "meta".
    """

    def __init__(
        self,
        spec: QuantSpec,
        choose: Choose,
        dtypes: Mapping[str, torch.dtype],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.spec = spec
        self.in_features = spec.in_features
        self.out_features = spec.out_features
        self.layout: Layout = CheckpointLayout(spec)
        self.dtype = dtype
        self.pinned = False
        self.choose = choose
        self.form: Hashable = None
        self.shared: tuple[SharedProduct, int] | None = None
        self.provider: KernelProvider | None = None
        self._bound_to: tuple[str, torch.dtype] | None = None
        for name, shape in _shapes(spec).items():
            if name in dtypes:
                empty = torch.empty(shape, dtype=dtypes[name], device=device)
                self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        if "bias" not in self._parameters:
            self.register_parameter("bias", None)  # as in nn.Linear, for those who look

    @classmethod
    def from_tensors(cls, spec: QuantSpec, tensors: GptqTensors, choose: Choose, dtype: torch.dtype) -> QuantLinear:
        """A layer around tensors as a checkpoint stores them; nothing is copied."""
        layer = cls(spec, choose, {}, dtype)
        layer.hold(layer.layout.pack(tensors))
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply; ``x`` [..., in_features] in the model's dtype, returns [..., out_features] in the same.

        A layer that :attr:`keeps_dtype` takes narrower ones, too, and returns its own.
        """
        if self.keeps_dtype:
            x = self.widened(x)
        if is_transformed():
            stored = CheckpointLayout(self.spec).pack(self.checkpoint_tensors())
            return TorchProvider().linear(x, stored, self.spec)
        if self._bound_to != (x.device.type, x.dtype):
            self.bind(x.device.type, x.dtype)
        shared = self.shared  # read once: another thread may dissolve it
        if shared is not None and not torch.is_grad_enabled():
            product, place = shared
            return product(self, place, x)
        return self.multiply(x, self.spec)

    def multiply(self, x: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
        """The product with as many outputs as ``spec`` says: the layer's own, or more if others are joined to it."""
        assert self.provider is not None
        return self.provider.linear(x, self._tensors, spec)  # type: ignore[arg-type] # None for what is not there

    @property
    def _tensors(self) -> Mapping[str, torch.Tensor | None]:
        return self._parameters if self.pinned else self._buffers

    def bind(self, device: str, dtype: torch.dtype) -> None:
        """Choose the kernel for activations of ``dtype`` on ``device``, and repack the weights for it.

        A layer that is ``pinned`` keeps the checkpoint's layout: its weights live elsewhere (offloaded)
        and are brought in, as they are stored, for each call.

        Raises:
            graftq.quant_linear.selection.NoKernelError: if no kernel runs this layer.
            RuntimeError: for activations that are no floats, as ``nn.Linear`` does.
        """
        if not dtype.is_floating_point:
            raise RuntimeError(f"{type(self).__name__}({self.extra_repr()}) takes floats, not {dtype}")
        provider = self.choose(Request(self.spec, device, dtype, pinned=self.pinned)).provider
        layout = provider.layout(self.spec)
        if layout != self.layout:
            check_own(self, provider.name)
            packed = layout.pack(self.release())
            self.hold(packed)
            self.layout, self.form = layout, packed.form
        elif not self.pinned:
            self.hold(self.packed())  # what was loaded as parameters
        self.provider = provider
        self._bound_to = (device, dtype)

    def packed(self) -> Packed:
        """The tensors, in the current layout."""
        own = self._parameters | self._buffers
        return Packed({name: tensor for name, tensor in own.items() if tensor is not None}, self.form)

    def checkpoint_tensors(self) -> GptqTensors:
        """The tensors exactly as the checkpoint stores them, whatever the layout is now."""
        return self.layout.unpack(self.packed())

    def release(self) -> GptqTensors:
        """Give the checkpoint tensors away: the layer has none afterwards."""
        stored = self.checkpoint_tensors()
        self._leave("one of them gives its tensors away")
        for name in (*self._parameters, *self._buffers):
            delattr(self, name)
        self.register_parameter("bias", None)
        return stored

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantLinear:
        """Move or cast the tensors. Layers that were joined part if that copies any of them."""
        is_joined = self.shared is not None
        before = [tensor.data_ptr() for tensor in self.packed().values()] if is_joined else []
        super()._apply(fn, recurse)
        if is_joined and before != [tensor.data_ptr() for tensor in self.packed().values()]:
            self._leave("one of them was moved or cast")
        return self

    def _leave(self, reason: str) -> None:
        shared = self.shared
        if shared is not None:
            shared[0].dissolve(reason)

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized weight [out_features, in_features], made anew at each access.

        For models that reach for a linear layer's weight, or its dtype, instead of calling the layer. Of an offloaded
        layer it is on the device that the layer computes on; before a layer is loaded, on the meta device.

        Raises:
            RuntimeError: if the layer is offloaded by the hook of a module around it, and this is outside of its call.
        """
        packed = self.packed()
        if self.pinned or self.provider is not None:
            packed = brought_in(self, packed)
        return dequantize(self.layout.unpack(packed), self.spec).to(self.dtype)

    @property
    def kernel(self) -> str | None:
        """The name of the kernel that is bound, if one is."""
        return None if self.provider is None else self.provider.name

    def extra_repr(self) -> str:
        """The projection in short."""
        spec = self.spec
        order = ", desc_act" if spec.desc_act else ""
        kernel = f", kernel={self.kernel}" if self.kernel else ""
        return (
            f"{spec.in_features}, {spec.out_features}, bits={spec.bits}, group_size={spec.group_size}"
            f"{order}, sym={spec.sym}, bias={spec.has_bias}{kernel}"
        )


def _shapes(spec: QuantSpec) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "qweight": (spec.packed_rows, spec.padded_out),
        "qzeros": (spec.num_groups, spec.packed_zero_columns),
        "scales": (spec.num_groups, spec.padded_out),
    }
    if spec.has_g_idx:
        shapes["g_idx"] = (spec.stored_g_idx,)
    if spec.has_bias:
        shapes["bias"] = (spec.stored_bias,)
    return shapes
