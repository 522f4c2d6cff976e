"""Which kernel runs a layer: a pure function over providers, answered with values and reasons."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    import torch

    from graftq.quant_linear.experts import QuantExperts
    from graftq.quant_linear.experts_spec import ExpertsSpec
    from graftq.quant_linear.layouts import ExpertsLayout, Layout
    from graftq.quant_linear.spec import QuantSpec


@dataclass(frozen=True)
class Request:
    """What a layer asks for.

    Attributes:
        spec: The projection.
        device: Device type the layer computes on, as in ``torch.device.type`` ("cpu", "cuda").
        dtype: Activation dtype.
        pinned: The weights must stay in the checkpoint's layout (they are offloaded, and brought in
            as stored for each call).
    """

    spec: QuantSpec
    device: str
    dtype: torch.dtype
    pinned: bool = False


@dataclass(frozen=True)
class ExpertsRequest:
    """What the experts of a layer ask for, all together; attributes as in :class:`Request`.

    Attributes:
        separate: Each projection must stay a layer of its own, since something is added to its output
            (:meth:`~graftq.quant_linear.experts.QuantExperts.adding`).
    """

    spec: ExpertsSpec
    device: str
    dtype: torch.dtype
    pinned: bool = False
    separate: bool = False


@dataclass(frozen=True)
class Accepted:
    """The provider runs this request, exactly as the reference would up to rounding."""


@dataclass(frozen=True)
class Rejected:
    """The provider does not run this request.

    Attributes:
        reason: Why not.
        remedy: What a user could do about it, if anything.
    """

    reason: str
    remedy: str = ""


Verdict = Accepted | Rejected


class KernelProvider(Protocol):
    """A family of kernels behind one name; the object that ``graftq_kernels`` hooks return.

    Attributes:
        name: What users write into ``GRAFTQ_KERNEL``.
        priority: Among the providers that accept a request, the highest wins. The reference is 0.
    """

    name: str
    priority: int

    def judge(self, request: Request) -> Verdict:
        """Say whether this provider runs ``request``, and if not, why."""

    def layout(self, spec: QuantSpec) -> Layout:
        """The arrangement of the weights that :meth:`linear` reads."""

    def linear(self, x: torch.Tensor, packed: Mapping[str, torch.Tensor], spec: QuantSpec) -> torch.Tensor:
        """``x @ W.T + bias`` for ``x`` of shape [..., in_features]; returns [..., out_features].

        ``packed`` has the tensors of :meth:`layout` by name; ``packed.get`` of one that is not there gives None.
        """


class ExpertsProvider(Protocol):
    """Kernels for all experts of a layer at once; the object that ``graftq_experts_kernels`` hooks return.

    Attributes:
        name: As for :class:`KernelProvider`; the same name where the same package provides both.
        priority: Likewise.
    """

    name: str
    priority: int

    def judge(self, request: ExpertsRequest) -> Verdict:
        """Say whether this provider runs ``request``, and if not, why."""

    def layout(self, spec: ExpertsSpec) -> ExpertsLayout:
        """The arrangement of the weights that :meth:`experts` reads."""

    def experts(
        self, module: QuantExperts, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """What ``module.forward`` is to return; ``module.packed()`` has the weights in :meth:`layout`."""


P = TypeVar("P", KernelProvider, ExpertsProvider)


@dataclass(frozen=True)
class Selection(Generic[P]):
    """The outcome for one request: the provider, and what every provider said."""

    provider: P
    verdicts: Mapping[str, Verdict]


class NoKernelError(RuntimeError):
    """No provider, or not the forced one, runs a request."""


def select(request: Request | ExpertsRequest, providers: Iterable[P], forced: str | None = None) -> Selection[P]:
    """Choose the accepted provider of highest priority; ties go to the alphabetically first name.

    Args:
        request: The layer's wish, or that of a layer's experts.
        providers: All registered providers.
        forced: The only provider allowed (``GRAFTQ_KERNEL``), or None.

    Raises:
        NoKernelError: if nothing accepts, or ``forced`` is unknown or rejects; with every reason.
    """
    ranked = sorted(providers, key=lambda provider: (-provider.priority, provider.name))
    verdicts = {provider.name: _judge(provider, request) for provider in ranked}
    if forced is not None and forced not in verdicts:
        raise NoKernelError(f"GRAFTQ_KERNEL={forced}: no such kernel; there are {', '.join(verdicts) or 'none'}")
    for provider in ranked:
        wanted = forced is None or provider.name == forced
        if wanted and isinstance(verdicts[provider.name], Accepted):
            return Selection(provider, verdicts)
    said = "; ".join(f"{name}: {verdict.reason}" for name, verdict in verdicts.items() if isinstance(verdict, Rejected))
    prefix = f"GRAFTQ_KERNEL={forced}" if forced else "no kernel"
    raise NoKernelError(f"{prefix} for {request.spec} on {request.device} in {request.dtype}: {said}")


def _judge(provider: KernelProvider | ExpertsProvider, request: Request | ExpertsRequest) -> Verdict:
    from graftq.quant_linear.layouts import AS_STORED, SeparateLayout

    try:
        verdict = provider.judge(request)  # type: ignore[arg-type] # requests and providers are of one kind
        layout = provider.layout(request.spec) if isinstance(verdict, Accepted) else None  # type: ignore[arg-type]
    except Exception as error:  # somebody else's provider: it loses the layer, the host keeps its model
        return Rejected(f"its own failure: {type(error).__name__}: {error}")
    if layout is not None and request.pinned and not isinstance(layout, AS_STORED):
        return Rejected("it repacks the weights, and these are offloaded", "keep the layer on one device")
    if layout is not None and getattr(request, "separate", False) and not isinstance(layout, SeparateLayout):
        return Rejected("it computes projections in one, and adapters add to each of them")
    return verdict
