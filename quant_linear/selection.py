"""Which kernel runs a layer, or the experts of a layer: a pure function over providers, answered with reasons."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from graftq.quant_linear.experts_spec import ExpertsSpec
from graftq.quant_linear.spec import QuantSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

    from graftq.quant_linear.layouts import ExpertsLayout, Layout

S = TypeVar("S", QuantSpec, ExpertsSpec)


@dataclass(frozen=True)
class Request(Generic[S]):
    """What a layer asks for: a linear layer by its projection, or the experts of a layer all together.

    Attributes:
        spec: The projection (:class:`QuantSpec`) or the experts (:class:`ExpertsSpec`).
        device: Device type the layer computes on, as in ``torch.device.type`` ("cpu", "cuda").
        dtype: Activation dtype.
        pinned: The weights must stay in the checkpoint's layout (they are offloaded, and brought in
            as stored for each call).
        separate: Of experts: each projection must stay a layer of its own, since something is added to its output
            (:meth:`~graftq.quant_linear.experts.QuantExperts.adding`).
    """

    spec: S
    device: str
    dtype: torch.dtype
    pinned: bool = False
    separate: bool = False


@dataclass(frozen=True)
class Accepted:
    """The kernels run this request, exactly as the reference would up to rounding.

    Attributes:
        repacks: Whether the layout rearranges the checkpoint's tensors. If not, they stay under their names and in
            their layers.
        note: What a user should know about the results, said once; "" for nothing.
    """

    repacks: bool = True
    note: str = ""


@dataclass(frozen=True)
class Rejected:
    """The kernels do not run this request.

    Attributes:
        reason: Why not.
        remedy: What a user could do about it, if anything.
    """

    reason: str
    remedy: str = ""


Verdict = Accepted | Rejected


class ExpertsModule(Protocol):
    """What kernels may ask of a :class:`~graftq.quant_linear.experts.QuantExperts`.

    Attributes:
        spec: The experts.
        num_experts: How many they are.
        layout: The arrangement that is bound.
        form: The form that its ``pack`` has chosen.
        activate: From ``up``'s output [tokens, width] to ``down``'s input [tokens, intermediate].
        post_expert_norm: Applied to each expert's output before it is weighted, or None.
    """

    spec: ExpertsSpec
    num_experts: int
    layout: ExpertsLayout
    form: Hashable
    activate: Any
    post_expert_norm: nn.Module | None

    @property
    def tensors(self) -> Mapping[str, torch.Tensor | None]:
        """The packed tensors by name, in :attr:`layout`."""

    @property
    def up_bias(self) -> torch.Tensor | None:
        """The layer's own bias for gate and up, [num_experts, width]."""

    @property
    def down_bias(self) -> torch.Tensor | None:
        """The layer's own bias for down, [num_experts, hidden]."""

    def get_submodule(self, target: str) -> nn.Module:
        """An expert by its number, or a projection by ``{expert}.{name}``, while each is a layer of its own."""

    def add(self, to: Any, expert: int, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """``output`` of a projection, and what adapters add to it."""


class ExpertsKernels(Protocol):
    """Kernels for all experts of a layer at once."""

    def judge(self, request: Request[ExpertsSpec]) -> Verdict:
        """Say whether these kernels run ``request``, and if not, why. Has no side effects."""

    def layout(self, spec: ExpertsSpec) -> ExpertsLayout:
        """The arrangement of the weights that :meth:`experts` reads."""

    def experts(
        self, module: ExpertsModule, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """What ``module.forward`` is to return; ``module.tensors`` has the weights in :meth:`layout`."""


class KernelProvider(Protocol):
    """A family of kernels behind one name; the object that ``graftq_kernels`` hooks return.

    Attributes:
        name: What users write into ``GRAFTQ_KERNEL``.
        priority: Among the providers that accept a request, the highest wins. The reference is 0.
        experts: The same family's kernels for experts, or None: then experts run one by one, each projection by
            :meth:`linear`, unless another provider has some.
    """

    name: str
    priority: int

    @property
    def experts(self) -> ExpertsKernels | None:
        """As above; a provider without this attribute has none."""

    def judge(self, request: Request[QuantSpec]) -> Verdict:
        """Say whether this provider runs ``request``, and if not, why. Has no side effects."""

    def prepare(self) -> None:
        """Do what is needed once before weights are packed: import operators, warm caches. Optional; idempotent."""

    def layout(self, spec: QuantSpec) -> Layout:
        """The arrangement of the weights that :meth:`linear` reads."""

    def linear(self, x: torch.Tensor, packed: Mapping[str, torch.Tensor], spec: QuantSpec) -> torch.Tensor:
        """``x @ W.T + bias`` for ``x`` of shape [..., in_features]; returns [..., out_features].

        ``packed`` has the tensors of :meth:`layout` by name; ``packed.get`` of one that is not there gives None.
        """


@dataclass(frozen=True)
class Selection:
    """The outcome for one request.

    Attributes:
        provider: The provider that was chosen.
        verdicts: What every provider said, by name.
    """

    provider: KernelProvider
    verdicts: Mapping[str, Verdict]

    @property
    def experts(self) -> ExpertsKernels:
        """The provider's kernels for experts; it has some if the request was for experts."""
        assert self.provider.experts is not None
        return self.provider.experts


class NoKernelError(RuntimeError):
    """No provider, or not the forced one, runs a request."""


def select(
    request: Request[Any],
    providers: Iterable[KernelProvider],
    forced: str | None = None,
    unusable: Mapping[str, Rejected] | None = None,
) -> Selection:
    """Choose the accepted provider of highest priority; ties go to the alphabetically first name.

    Args:
        request: The layer's wish, or that of a layer's experts; for these, providers without such kernels are left out.
        providers: All registered providers.
        forced: The only provider allowed (``GRAFTQ_KERNEL``), or None.
        unusable: Providers that are not to be asked, by name, and why.

    Raises:
        NoKernelError: if nothing accepts, or ``forced`` is unknown or rejects; with every reason.
    """
    if isinstance(request.spec, ExpertsSpec):
        providers = [provider for provider in providers if getattr(provider, "experts", None) is not None]
    ranked = sorted(providers, key=lambda provider: (-provider.priority, provider.name))
    verdicts = {each.name: (unusable or {}).get(each.name) or _judge(each, request) for each in ranked}
    if forced is not None and forced not in verdicts:
        raise NoKernelError(f"GRAFTQ_KERNEL={forced}: no such kernel; there are {', '.join(verdicts) or 'none'}")
    for provider in ranked:
        wanted = forced is None or provider.name == forced
        if wanted and isinstance(verdicts[provider.name], Accepted):
            return Selection(provider, verdicts)
    said = "; ".join(f"{name}: {verdict.reason}" for name, verdict in verdicts.items() if isinstance(verdict, Rejected))
    prefix = f"GRAFTQ_KERNEL={forced}" if forced else "no kernel"
    raise NoKernelError(f"{prefix} for {request.spec} on {request.device} in {request.dtype}: {said}")


def failure(error: BaseException) -> Rejected:
    """The verdict for a provider that has raised ``error``: it loses the layer, and the host keeps its model."""
    return Rejected(f"its own failure: {type(error).__name__}: {error}")


def _judge(provider: KernelProvider, request: Request[Any]) -> Verdict:
    try:
        judge = provider.experts if isinstance(request.spec, ExpertsSpec) else provider
        assert judge is not None
        verdict = judge.judge(request)
    except Exception as error:
        return failure(error)
    if isinstance(verdict, Accepted) and verdict.repacks:
        if request.pinned:
            return Rejected("it repacks the weights, and these are offloaded", "keep the layer on one device")
        if request.separate:
            return Rejected("it computes projections in one, and adapters add to each of them")
    return verdict
