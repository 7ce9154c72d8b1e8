"""Balanced initialisation: Algorithm 1 and Lemma B.1 of the paper on the NFA of deep networks."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from feature_probe import ConfigurationError, balanced_init_

WIDTHS = {
    "as in the paper": (20, 64, 64, 64, 64),
    "two layers": (3, 5, 4),
    "all sizes differ": (4, 9, 5, 12, 4),
    "square": (6, 6, 6),
    "one input": (1, 7, 3),
}


def chain(widths: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[nn.Linear]:
    """Linears with PyTorch's own initial weights."""
    return [nn.Linear(before, after, dtype=dtype) for before, after in pairwise(widths)]


def weights(layers: list[nn.Linear]) -> list[Tensor]:
    """Copies of the weights."""
    return [layer.weight.detach().clone() for layer in layers]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str
)
@pytest.mark.parametrize("name", WIDTHS)
def test_neighbouring_layers_are_balanced(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """W_l W_lᵀ = W_{l+1}ᵀ W_{l+1}, to the rounding of the layers' own dtype."""
    layers = chain(WIDTHS[name], dtype)
    balanced_init_(layers)
    found = [weight.double() for weight in weights(layers)]
    for before, after in pairwise(found):
        difference = torch.linalg.norm(before @ before.T - after.T @ after)
        assert difference <= tolerance * torch.linalg.norm(before @ before.T)


@pytest.mark.parametrize("name", WIDTHS)
def test_the_chain_keeps_the_first_layers_singular_values(name: str) -> None:
    """Every layer has those of W_1, and W_1 itself is unchanged where no factor is asked for."""
    layers = chain(WIDTHS[name])
    before = weights(layers)
    balanced_init_(layers, scale="none")
    after = weights(layers)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    values = torch.linalg.svdvals(before[0])
    for old, new in zip(before[1:], after[1:], strict=True):
        assert not torch.allclose(old, new)
        found = torch.linalg.svdvals(new)
        torch.testing.assert_close(found[: len(values)], values, rtol=1e-10, atol=1e-13)
        assert (found[len(values) :] < 1e-12).all()


def test_the_nfa_holds_at_power_one_over_the_depth() -> None:
    """(JᵀJ)^{1/L} = W_1ᵀW_1 at once (Theorem 3.1 at t = 0), by numpy-like algebra of its own."""
    layers = chain(WIDTHS["as in the paper"])
    balanced_init_(layers)
    found = weights(layers)
    product = torch.linalg.multi_dot(found[::-1])
    values, basis = torch.linalg.eigh(product.T @ product)
    root = basis * values.clamp_min(0) ** (1 / len(found)) @ basis.T
    torch.testing.assert_close(root, found[0].T @ found[0], rtol=1e-8, atol=1e-10)


def test_the_columns_are_haar() -> None:
    """U_2's columns are orthonormal and uniform: over draws the mean is 0 and E[u uᵀ] = I/d."""
    draw = torch.Generator().manual_seed(1)
    columns = []
    for _ in range(4000):
        first, second = torch.eye(3, 2, dtype=torch.float64), torch.zeros(3, 3).double()
        balanced_init_([first, second], scale="none", generator=draw)
        columns.append(second[:, :2])
    stacked = torch.stack(columns)
    gram = stacked.transpose(1, 2) @ stacked
    torch.testing.assert_close(gram, torch.eye(2).double().expand_as(gram))
    # left singular vectors of eye(3, 2) are ±e_1, ±e_2, whose sign is one and the same each time
    assert stacked.mean(0).abs().max() < 5 * math.sqrt(1 / 3 / len(stacked))
    second_moment = (stacked.unsqueeze(2) * stacked.unsqueeze(1)).mean(0)  # [i, j, column]
    expected = torch.eye(3).double() / 3
    for column in range(2):
        torch.testing.assert_close(second_moment[..., column], expected, rtol=0, atol=0.03)
    # E[u_i⁴] = 3/(d(d + 2)) on the sphere of d = 3
    assert (stacked**4).mean().item() == pytest.approx(1 / 5, abs=0.01)


@pytest.mark.parametrize("sizes", [(20, 64, 64), (3, 8, 5), (7, 7, 9)])
def test_lemma_b1_and_the_factors(sizes: tuple[int, int, int]) -> None:
    """Lemma B.1 by Monte Carlo; "equal" makes the two expectations equal, Eq. B.2 does not."""
    draw = torch.Generator().manual_seed(0)
    d1, d2, d3 = sizes

    def squared_norm(inputs: int, outputs: int, factor: float = 1.0) -> float:
        uniform = 2 * torch.rand(20000, outputs, inputs, generator=draw) - 1
        found = factor * uniform / math.sqrt(inputs)
        small = found if inputs <= outputs else found.transpose(1, 2)
        return float(torch.linalg.matrix_norm(small.transpose(1, 2) @ small).square().mean())

    def lemma(inputs: int, outputs: int) -> float:
        return outputs / inputs * (1 / 5 + (inputs + outputs - 2) / 9)

    second = squared_norm(d2, d3)
    assert second == pytest.approx(lemma(d2, d3), rel=0.01)
    factors = {}
    for scale in ("paper", "equal", "none"):
        layers = chain((d1, d2, d3))
        before = layers[0].weight.detach().clone()
        balanced_init_(layers, scale=scale)  # type: ignore[arg-type]
        ratio = layers[0].weight.detach() / before
        factors[scale] = float(ratio.flatten()[0])
        torch.testing.assert_close(ratio, torch.full_like(ratio, factors[scale]))
    printed = math.sqrt(d1 * d3 * (5 * d2 + 5 * d3 - 1) / (d2**2 * (5 * d1 + 5 * d2 - 1)))
    assert factors["paper"] == pytest.approx(printed, rel=1e-12)
    assert factors["none"] == 1.0
    assert squared_norm(d1, d2, factors["equal"]) == pytest.approx(second, rel=0.015)
    wrong = squared_norm(d1, d2, factors["paper"])
    assert wrong == pytest.approx(second * printed**2, rel=0.015)


def test_a_generator_makes_it_reproducible() -> None:
    """The same seed gives the same weights, another one others; the global state is untouched."""
    layers = chain(WIDTHS["as in the paper"])
    start = weights(layers)
    found = []
    state = torch.get_rng_state()
    for seed in (3, 3, 4):
        for layer, weight in zip(layers, start, strict=True):
            layer.weight.detach().copy_(weight)
        balanced_init_(layers, generator=torch.Generator().manual_seed(seed))
        found.append(weights(layers))
    assert torch.equal(torch.get_rng_state(), state)
    for first, second in zip(*found[:2], strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert not torch.allclose(found[0][1], found[2][1])


def test_biases_and_gradients_are_left_alone() -> None:
    """Only weights are written, in place, and they still want gradients."""
    layers = chain((3, 5, 4))
    biases = [layer.bias.detach().clone() for layer in layers]
    places = [layer.weight for layer in layers]
    balanced_init_(layers)
    for layer, bias, place in zip(layers, biases, places, strict=True):
        assert layer.weight is place
        assert layer.weight.requires_grad
        assert layer.weight.grad_fn is None
        assert torch.equal(layer.bias, bias)


def test_what_cannot_be_balanced_is_refused() -> None:
    """Each refusal names the layer, what was given and what is allowed, and writes nothing."""
    good = chain((3, 5, 4))
    parametrised = parametrizations.weight_norm(nn.Linear(5, 4, dtype=torch.float64))
    infinite = torch.full((5, 3), math.inf, dtype=torch.float64)
    square = nn.Linear(3, 3, dtype=torch.float64)
    refused: dict[str, tuple[object, ...]] = {
        "two or more, got 0": (),
        "two or more, got 1": (good[0],),
        r"layer 2: gives 2 outputs, fewer than the chain's 3 inputs": (
            good[0],
            torch.zeros(2, 5).double(),
        ),
        "layer 1: gives 2 outputs": (torch.zeros(2, 3), torch.zeros(4, 2)),
        "layer 2: takes 6 inputs, but the layer before gives 5": (
            good[0],
            torch.zeros(4, 6).double(),
        ),
        r"layer 2: .* got torch.float32 \(layer 1: torch.float64\)": (good[0], nn.Linear(5, 4)),
        r"layer 1: .* got torch.float16": (torch.zeros(5, 3).half(), torch.zeros(4, 5).half()),
        "layer 2: .* hold data, on one device, got meta": (
            good[0],
            nn.Linear(5, 4, dtype=torch.float64, device="meta"),
        ),
        "layer 2: .* got ReLU": (good[0], nn.ReLU(), good[1]),
        r"layer 2: .* got \[5\]": (good[0], torch.zeros(5)),
        "layer 2: its weight is computed": (good[0], parametrised),
        "there twice": (square, square),
        "not finite": (infinite, good[1]),
    }
    before = weights(good)
    for match, layers in refused.items():
        with pytest.raises(ConfigurationError, match=match):
            balanced_init_(layers)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=re.escape("got 'half'")):
        balanced_init_(good, scale="half")  # type: ignore[arg-type]
    for layer, weight in zip(good, before, strict=True):
        assert torch.equal(layer.weight, weight)
