"""The solver's promises, on moments of correlated inputs and weights with outliers."""

import numpy as np
import pytest
import torch
from support.gptq import pack_stream

from graftq.quant_linear.making import columns, products
from graftq.quant_linear.making.columns import round_columns
from graftq.quant_linear.making.factor import factorize, normalized
from graftq.quant_linear.making.grid import Grid
from graftq.quant_linear.making.improve import objective
from graftq.quant_linear.making.moments import Moments
from graftq.quant_linear.making.packed import pack
from graftq.quant_linear.making.products import product, split
from graftq.quant_linear.making.solve import ORDERS, Method, Solution, solve
from graftq.quant_linear.packing import dequantize


def inputs(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    sizes = torch.logspace(0.7, -0.7, width)[torch.randperm(width, generator=generator)]
    return (torch.randn(tokens, width, generator=generator) @ mixing) * sizes


def weights(batch: int, outputs: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(batch, outputs, width, generator=generator) * 0.05
    weight[:, 0, 0] = 0.6
    return weight


def moments_of(batch: int, width: int, tokens: int = 400, drifting: bool = False) -> Moments:
    moments = Moments(batch, width, with_drift=drifting)
    for index in range(batch):
        x = inputs(tokens, width, index)
        noise = 0.2 * inputs(tokens, width, 50 + index)
        moments.add(x, x + noise if drifting else None, index=index)
    return moments


def independent_weight(tensors, bits: int, width: int, outputs: int) -> torch.Tensor:
    """Read AutoGPTQ's layout by Python integers."""

    def codes(words: np.ndarray, count: int) -> np.ndarray:
        out = np.empty((count, words.shape[1]), dtype=np.int64)
        for column in range(words.shape[1]):
            stream = int.from_bytes(np.ascontiguousarray(words[:, column]).tobytes(), "little")
            out[:, column] = [(stream >> (bits * place)) & (2**bits - 1) for place in range(count)]
        return out

    q = codes(tensors.qweight.numpy(), width)
    z = codes(tensors.qzeros.numpy().T, outputs).T + 1
    group = tensors.g_idx.numpy()
    return torch.from_numpy((q - z[group]).astype(np.float32) * tensors.scales.float().numpy()[group]).T


def error_of(solution: Solution, weight: torch.Tensor, moments: Moments, damp: float) -> torch.Tensor:
    hessian, _ = normalized(moments.gram)
    damped = hessian + damp * torch.eye(hessian.shape[-1])
    made = torch.stack([solution.weight(index) for index in range(len(weight))])
    return objective(split(damped), (weight - made).transpose(1, 2).contiguous()).sum(-1)


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("group_size", [-1, 32, 48], ids=lambda size: f"{size}g")
@pytest.mark.parametrize("bits", [2, 3, 4, 8], ids=lambda bits: f"{bits}bit")
def test_never_worse_than_nearest_and_read_back(bits: int, group_size: int, order: str, sym: bool):
    weight, moments = weights(2, 24, 112), moments_of(2, 112)
    method = Method(bits, group_size, sym, order, damp=0.05)
    solution = solve(weight, moments, method)
    measured = error_of(solution, weight, moments, 0.05)
    torch.testing.assert_close(measured, solution.error, rtol=2e-3, atol=1e-6)
    assert (solution.error <= solution.nearest).all()
    assert solution.error.sum() < 0.8 * solution.nearest.sum()
    for index, (tensors, spec) in enumerate(pack(solution)):
        made = solution.weight(index)
        assert torch.equal(dequantize(tensors, spec), made)
        assert torch.equal(independent_weight(tensors, bits, 112, 24), made)
        assert np.array_equal(pack_stream(solution.codes[index].numpy(), bits), tensors.qweight.numpy())
        assert spec.desc_act == (order == "grouped" and spec.num_groups > 1)


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("order", ["static", "stored"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_never_worse_than_plain_gptq_with_the_same_scales(bits: int, order: str, sym: bool):
    weight, moments = weights(1, 48, 256), moments_of(1, 256)
    solution = solve(weight, moments, Method(bits, 64, sym, order))
    hessian, _ = normalized(moments.gram)
    stored = torch.arange(256)[None]
    places = hessian.diagonal(dim1=1, dim2=2).argsort(-1, descending=True) if order == "static" else stored
    factor = factorize(hessian, places, 0.1)
    scales, zeros = solution.scales.float(), solution.zeros.float()
    target = weight.transpose(1, 2)
    index = places[:, :, None].expand_as(target)
    codes = round_columns(
        target.gather(1, index), factor.unit, (stored // 64)[:, places[0]], scales, zeros, Grid(bits, sym)
    )
    plain = torch.empty_like(codes).scatter_(1, index, codes) * scales[:, stored[0] // 64]
    ours = objective(factor.parts, (weight - solution.weight()).transpose(1, 2).contiguous())
    assert (ours <= objective(factor.parts, (target - plain).contiguous()) * 1.0001).all()


def gptq(weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """GPTQ as it was published: the inverse's factor, column by column, in float64."""
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    left, made = weight.clone(), torch.zeros_like(weight)
    for column in range(weight.shape[1]):
        code = torch.clamp(torch.round(left[:, column] / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        made[:, column] = code
        error = (left[:, column] - code * scale) / inverse[column, column]
        left[:, column:] -= error[:, None] * inverse[column, column:]
    return made


@pytest.mark.parametrize("wide", [1024, 128], ids=lambda wide: f"errors passed on every {wide} columns")
def test_the_loop_gives_the_codes_of_published_gptq(wide: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(columns, "WIDE", wide)
    weight = weights(1, 32, 300).double()
    hessian = normalized(moments_of(1, 300).gram)[0].double()
    damped = hessian + 0.01 * torch.eye(300)
    scale = torch.full((1, 1, 32), 0.03, dtype=torch.float64)
    upper = torch.linalg.cholesky(damped.flip(1, 2)).flip(1, 2)
    unit = upper / upper.diagonal(dim1=1, dim2=2)[:, None]
    zero = torch.full_like(scale, 8)
    groups = torch.zeros(1, 300, dtype=torch.int64)
    codes = round_columns(weight.transpose(1, 2).contiguous(), unit, groups, scale, zero, Grid(4, True))
    assert torch.equal(codes[0].T, gptq(weight[0], damped[0], scale[0, 0], 4))


@pytest.fixture
def half_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products as GPUs make them, of bfloat16 numbers and with float32 sums."""

    def add(out: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        made = torch.bmm(left.float(), right.float())
        return made if out is None else out.add_(made)

    monkeypatch.setattr(products, "_add", add)
    monkeypatch.setattr(products, "has_half_products", lambda device, dtype: True)


@pytest.mark.parametrize("is_exact", [False, True], ids=["both in two parts", "codes in one"])
def test_products_of_parts_are_those_of_float32_to_five_digits(is_exact: bool, half_products: None):
    left, right = torch.randn(2, 40, 300), torch.randn(2, 300, 24)
    right = (right * 100).round().clamp(-256, 256) if is_exact else right
    expected = torch.bmm(left.double(), right.double())
    made = product(split(left), split(right, is_exact))
    assert len(split(right, is_exact).parts) == 2 - is_exact
    assert (made - expected).norm() <= 3e-5 * expected.norm()


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("order", ORDERS)
def test_products_of_parts_give_solutions_as_good(order: str, sym: bool, half_products: None):
    weight, moments = weights(2, 48, 256), moments_of(2, 256, drifting=True)
    made = solve(weight, moments, Method(3, 64, sym, order))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "has_half_products", lambda device, dtype: False)
        expected = solve(weight, moments, Method(3, 64, sym, order))
    torch.testing.assert_close(made.error, expected.error, rtol=0.01, atol=0)
    assert (made.codes == expected.codes).float().mean() > 0.99


@pytest.mark.parametrize("order", ORDERS)
def test_each_step_helps(order: str):
    weight, moments = weights(1, 64, 256), moments_of(1, 256)
    steps = [
        Method(3, 64, order=order, search=False, refits=0),
        Method(3, 64, order=order, refits=0),
        Method(3, 64, order=order),
        Method(3, 64, order=order, refits=2, passes=2),
    ]
    errors = [solve(weight, moments, step).error.item() for step in steps]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8 * errors[0]


def test_weights_of_one_side_get_negative_scales():
    weight = weights(1, 32, 64).abs()
    solution = solve(weight, moments_of(1, 64), Method(3, 32))
    assert (solution.scales < 0).float().mean() > 0.5
    assert torch.equal(pack(solution)[0][0].scales, solution.scales[0])


def test_drift_aims_at_the_float_outputs():
    moments = Moments(1, 96, with_drift=True)
    x_float = inputs(600, 96)
    x = x_float + 0.3 * inputs(600, 96, 7)
    moments.add(x, x_float)
    weight = weights(1, 48, 96)

    def distance(drift: float) -> float:
        made = solve(weight, moments, Method(4, 32, drift=drift, damp=0.01)).weight()
        return float((x_float @ weight[0].T - x @ made.T).square().mean())

    assert distance(1.0) < distance(0.5) < distance(0.0)


def test_layers_side_by_side_share_an_order_and_split_again():
    weight, moments = weights(1, 64, 128), moments_of(1, 128)
    solution = solve(weight, moments, Method(4, 32, order="grouped"))
    [(first, spec)] = pack(solution, slice(0, 24))
    [(second, _)] = pack(solution, slice(24, 64))
    assert torch.equal(first.g_idx, second.g_idx)
    assert spec.out_features == 24
    whole = solution.weight()
    assert torch.equal(independent_weight(first, 4, 128, 24), whole[:24])
    assert torch.equal(independent_weight(second, 4, 128, 40), whole[24:])


def test_experts_of_a_batch_do_not_touch_each_other():
    weight, moments = weights(3, 32, 96), moments_of(3, 96)
    together = solve(weight, moments, Method(4, 32))
    alone = Moments(1, 96)
    alone.gram, alone.tokens = moments.gram[1:2], moments.tokens[1:2]
    single = solve(weight[1:2], alone, Method(4, 32))
    assert (together.codes[1] == single.codes[0]).float().mean() > 0.999
    torch.testing.assert_close(together.error[1:2], single.error, rtol=1e-3, atol=0)


def test_experts_with_few_or_no_tokens_lean_on_all():
    moments = Moments(3, 64)
    moments.add(inputs(500, 64), index=0)
    moments.add(inputs(3, 64, 1), index=1)
    pooled = moments.gram.sum(0)
    shrunk = moments.shrunk(16)
    everyone = shrunk.gram[2] / shrunk.gram[2].diagonal().mean()
    torch.testing.assert_close(everyone, pooled / pooled.diagonal().mean())
    solution = solve(weights(3, 32, 64), shrunk, Method(4, 32))
    assert (solution.error < solution.nearest).all()


@pytest.mark.parametrize("scale", [0.0, 1e-25, 1e15], ids=["none", "underflow", "huge"])
def test_inputs_that_never_come_or_have_no_usual_size(scale: float):
    moments = Moments(1, 64)
    moments.add(inputs(100, 64) * scale)
    solution = solve(weights(1, 32, 64), moments, Method(4, 32))
    assert torch.isfinite(solution.weight()).all()
    assert solution.error <= solution.nearest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_moments_of_half_precision_inputs_are_those_of_their_values(dtype: torch.dtype):
    device = "cuda" if torch.cuda.is_available() else "cpu"  # where products of halves are summed in float32
    x, x_float = (inputs(300, 64, seed).to(device, dtype) for seed in (0, 1))
    moments = Moments(1, 64, device, with_drift=True)
    moments.add(x, x_float)
    exact, exact_float = x.double(), x_float.double()
    torch.testing.assert_close(moments.gram[0].double(), exact.T @ exact, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(moments.drift[0].double(), (exact_float - exact).T @ exact, rtol=1e-5, atol=1e-3)


def test_fewer_tokens_than_columns_and_columns_that_never_fire():
    x = inputs(10, 64)
    x[:, ::3] = 0
    moments = Moments(1, 64)
    moments.add(x)
    solution = solve(weights(1, 32, 64), moments, Method(4, 32, damp=1e-7))
    assert torch.isfinite(solution.weight()).all()
    assert (solution.error <= solution.nearest).all()


@pytest.mark.parametrize("value", [0.0, 1e-9, 1e6], ids=["zero", "tiny", "large"])
def test_scales_stay_normal_numbers_of_float16(value: float):
    weight = weights(1, 32, 64).sign() * value
    solution = solve(weight, moments_of(1, 64), Method(4, 32))
    size = solution.scales.float().abs()
    assert ((size >= 2.0**-14) & (size <= 65504)).all()
    if not value:
        assert not solution.weight().any()


def test_no_rows_change_nothing():
    moments = moments_of(1, 32)
    before = moments.gram.clone()
    moments.add(torch.empty(0, 32))
    assert torch.equal(before, moments.gram)
    assert moments.tokens.tolist() == [400]


def test_what_is_not_a_number_is_refused():
    weight = weights(1, 32, 64)
    moments = moments_of(1, 64)
    moments.add(torch.full((1, 64), torch.nan))
    with pytest.raises(ValueError, match="inputs hold NaN"):
        solve(weight, moments, Method(4, 32))
    weight[0, 3, 3] = torch.inf
    with pytest.raises(ValueError, match="weight holds NaN"):
        solve(weight, moments_of(1, 64), Method(4, 32))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"bits": 5}, "bits=5"),
        ({"group_size": 0}, "group_size=0"),
        ({"order": "best"}, "order='best'"),
        ({"damp": 0}, "damp=0"),
        ({"damp": 1.0}, "damp=1.0"),
        ({"drift": 2}, "drift=2"),
    ],
    ids=["bits", "group", "order", "no-damp", "all-damp", "drift"],
)
def test_methods_that_cannot_be(fault: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Method(**{"bits": 4, **fault})
