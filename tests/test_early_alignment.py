"""The dual form of the init-centred NFA's start, against networks differentiated one by one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from feature_probe.errors import ConfigurationError
from feature_probe.theory.early_alignment import (
    AlignmentSpeed,
    dual_alignment_speed,
    expected_kernel,
    kernel_alignment_speed,
    zero_output_alignment_speed,
)

N, TOKENS, D, K, C = 7, 3, 5, 6, 4


class Tokens(nn.Module):
    """A layer shared by tokens, whose outputs then mix, and C outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(K, D).double() / math.sqrt(D))
        self.mix = torch.randn(TOKENS, TOKENS).double()
        self.head = torch.randn(C, TOKENS, K).double() / K

    def rest(self, z: Tensor) -> Tensor:
        """Outputs ``[n, C]`` of the layer's ``[n, TOKENS, K]``."""
        h = torch.einsum("pq,nqk->npk", self.mix, torch.tanh(z)) + z.square()
        return torch.einsum("cpk,npk->nc", self.head, h)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``[n, C]`` of inputs ``[n, TOKENS, D]``."""
        return self.rest(x @ self.weight.T)


def brute_force(net: Tokens, x: Tensor, loss: object) -> tuple[Tensor, Tensor]:
    """G by autograd, and K one example, output and position at a time."""
    value = loss(net(x))  # type: ignore[operator]
    (gradient,) = torch.autograd.grad(value, net.weight)
    kernel = torch.zeros(K, K).double()
    for i in range(len(x)):
        z = (x[i : i + 1] @ net.weight.T).detach().requires_grad_()
        for c in range(C):
            (row,) = torch.autograd.grad(net.rest(z)[0, c], z)
            for p in range(TOKENS):
                kernel += torch.outer(row[0, p], row[0, p]) / len(x)
    return gradient, kernel


def rows_of(net: Tokens, x: Tensor) -> tuple[Tensor, Tensor]:
    """𝒥 and H, a row for every (i, c, p), by vectorised Jacobians."""
    z = (x @ net.weight.T).detach()
    jacobian = torch.func.vmap(torch.func.jacrev(lambda one: net.rest(one[None])[0]))(z)
    inputs = x[:, None].expand(N, C, TOKENS, D)
    return jacobian.reshape(-1, K), inputs.reshape(-1, D)


def cross_entropy_case() -> tuple[Tokens, Tensor, Tensor]:
    """A network, its inputs and labels."""
    torch.manual_seed(0)
    return Tokens(), torch.randn(N, TOKENS, D).double(), torch.randint(C, (N,))


def test_the_dual_form_is_the_gradient_and_the_kernel() -> None:
    """GᵀG and GᵀKG for cross-entropy, four outputs and three positions."""
    net, x, labels = cross_entropy_case()
    gradient, kernel = brute_force(net, x, lambda f: F.cross_entropy(f, labels))
    jacobian, inputs = rows_of(net, x)
    each = (net(x).softmax(1) - F.one_hot(labels, C)).detach()  # ∂ℓ_i/∂f_ic
    derivatives = each[:, :, None].expand(N, C, TOKENS).reshape(-1)
    speed = dual_alignment_speed(jacobian, inputs, derivatives, N)
    nfm, agop = gradient.T @ gradient, gradient.T @ kernel @ gradient
    torch.testing.assert_close(speed.nfm, nfm, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(speed.agop, agop, rtol=1e-10, atol=1e-14)
    cosine = torch.trace(nfm.T @ agop) / math.sqrt(
        torch.trace(nfm @ nfm) * torch.trace(agop @ agop)
    )
    assert speed.cosine == pytest.approx(float(cosine), rel=1e-12)
    assert speed.cosine < 0.999


def test_adding_the_kernel_over_outputs_is_another_number() -> None:
    """Eq. 3 with an n × n kernel, as for one output, is wrong for four."""
    net, x, labels = cross_entropy_case()
    gradient, kernel = brute_force(net, x, lambda f: F.cross_entropy(f, labels))
    jacobian, _ = rows_of(net, x)
    by_output = jacobian.reshape(N, C, TOKENS, K)
    added = torch.einsum("icpk,jcqk->ipjq", by_output, by_output).reshape(N * TOKENS, -1)
    each = (net(x).softmax(1) - F.one_hot(labels, C)).detach().norm(dim=1)
    wrong = kernel_alignment_speed(
        added, x.reshape(-1, D), each[:, None].expand(N, TOKENS).reshape(-1), N
    )
    right = AlignmentSpeed(gradient.T @ gradient, gradient.T @ kernel @ gradient)
    assert abs(wrong.cosine - right.cosine) > 1e-3


def test_they_are_second_derivatives_of_gradient_flow() -> None:
    """W_cᵀW_c and W_cᵀK_tW_c after a short time t are t²·GᵀG and t²·GᵀKG to first order in t."""
    net, x, labels = cross_entropy_case()
    gradient, kernel = brute_force(net, x, lambda f: F.cross_entropy(f, labels))
    errors = []
    for time in (1e-3, 1e-4):
        start = net.weight.detach().clone()
        steps = 20
        for _ in range(steps):
            (now,) = torch.autograd.grad(F.cross_entropy(net(x), labels), net.weight)
            net.weight.data -= time / steps * now
        _, moved = brute_force(net, x, lambda f: F.cross_entropy(f, labels))
        change = net.weight.detach() - start
        net.weight.data.copy_(start)
        nfm, agop = change.T @ change / time**2, change.T @ moved @ change / time**2
        expected = gradient.T @ gradient, gradient.T @ kernel @ gradient
        errors.append(
            max(
                float((a - b).norm() / b.norm()) for a, b in zip((nfm, agop), expected, strict=True)
            )
        )
    assert errors[1] < 1e-3
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.2)


def test_equation_4_is_the_square_loss_of_a_network_with_output_zero() -> None:
    """One output: Eq. 4 in the paper's matrices, and the gradient of ½(f − f₀ − y)²."""
    torch.manual_seed(1)
    x, y = torch.randn(N, D).double(), torch.randn(N).double()
    weight = torch.randn(K, D).double().requires_grad_()
    readout = torch.randn(K).double()
    output = torch.relu(x @ weight.T) @ readout
    loss = (output - output.detach() - y).square().sum() / 2 / N
    (gradient,) = torch.autograd.grad(loss, weight)
    jacobian = (x @ weight.T > 0).double().detach() * readout
    speed = zero_output_alignment_speed(jacobian, x, y)
    torch.testing.assert_close(speed.nfm, gradient.T @ gradient, rtol=1e-10, atol=1e-14)
    signs, kernel = torch.diag(y), jacobian @ jacobian.T
    once = x.T @ signs @ kernel @ signs @ x
    twice = x.T @ signs @ kernel @ kernel @ signs @ x
    equation_4 = torch.trace(once @ twice) / (
        torch.trace(once @ once).sqrt() * torch.trace(twice @ twice).sqrt()
    )
    assert speed.cosine == pytest.approx(float(equation_4), rel=1e-12)


def relu_network(width: int, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """𝒥 of the first of two hidden ReLU layers by autograd, and the first weight."""
    shapes = [(width, D), (width, width), (1, width)]
    weights = [
        torch.randn(s, generator=generator, dtype=torch.float64) / math.sqrt(s[1]) for s in shapes
    ]
    z = (x @ weights[0].T).requires_grad_()
    output = torch.relu(torch.relu(z) @ weights[1].T) @ weights[2].T
    (jacobian,) = torch.autograd.grad(output.sum(), z)
    return jacobian, weights[0]


def test_averages_of_the_kernel_are_averages_of_both_sides() -> None:
    """E[𝒦] and E[𝒦²] give the means of GᵀG and GᵀKG over the very networks averaged."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    y = torch.randn(N, generator=generator, dtype=torch.float64)
    jacobians = [relu_network(width, x, generator)[0] for width in (3, 8, 5)]
    expected = expected_kernel(iter(jacobians))
    assert expected.draws == 3
    speed = kernel_alignment_speed(expected.mean, x, -y, N, expected.mean_square)
    nfm, agop = torch.zeros(D, D).double(), torch.zeros(D, D).double()
    for jacobian in jacobians:
        gradient = -jacobian.T @ torch.diag(y) @ x / N
        nfm += gradient.T @ gradient / 3
        agop += gradient.T @ (jacobian.T @ jacobian / N) @ gradient / 3
    torch.testing.assert_close(speed.nfm, nfm, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(speed.agop, agop, rtol=1e-10, atol=1e-14)
    first_order = kernel_alignment_speed(expected.mean, x, -y, N)
    assert abs(first_order.cosine - speed.cosine) > 1e-4


def test_the_first_order_prediction_is_that_of_wide_networks() -> None:
    """One network's cosine comes to that of E[𝒦] as the width grows."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    y = torch.randn(N, generator=generator, dtype=torch.float64)
    gaps = []
    for width in (16, 512):
        draws = [relu_network(width, x, generator)[0] for _ in range(12)]
        predicted = kernel_alignment_speed(expected_kernel(draws).mean, x, -y, N).cosine
        seen = [zero_output_alignment_speed(jacobian, x, y).cosine for jacobian in draws]
        gaps.append(sum(abs(value - predicted) for value in seen) / len(seen))
    assert gaps[1] < 0.4 * gaps[0]
    assert gaps[1] < 0.01


def test_no_gradient_has_no_cosine() -> None:
    """NaN where a side is zero, not 0."""
    rows = torch.ones(N, K).double()
    speed = zero_output_alignment_speed(rows, torch.ones(N, D).double(), torch.zeros(N).double())
    assert math.isnan(speed.cosine)


def test_a_tiny_gradient_has_its_cosine() -> None:
    """The cosine does not depend on the scale of the labels."""
    torch.manual_seed(4)
    jacobian, x, y = torch.randn(N, K).double(), torch.randn(N, D).double(), torch.randn(N).double()
    usual = zero_output_alignment_speed(jacobian, x, y).cosine
    assert zero_output_alignment_speed(jacobian, x, 1e-50 * y).cosine == pytest.approx(usual)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3), torch.ones(3, 2), torch.ones(3), 3), r"jacobian must be .*\(3,\)"),
        ((torch.ones(3, 4), torch.ones(3, 2), torch.ones(2), 3), r"derivatives \[rows\].*\(2,\)"),
        ((torch.ones(4, 4), torch.ones(3, 2), torch.ones(3), 3), r"kernel must be \[3, 3\]"),
        ((torch.ones(3, 4), torch.ones(3, 2), torch.ones(3), 0), "examples must be a positive"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    arguments: tuple[Tensor, Tensor, Tensor, int], message: str
) -> None:
    """The error says what was given."""
    with pytest.raises(ConfigurationError, match=message):
        dual_alignment_speed(*arguments)


def test_averages_need_networks_on_the_same_rows() -> None:
    """None, or different numbers of rows, is refused."""
    with pytest.raises(ConfigurationError, match="no network"):
        expected_kernel([])
    with pytest.raises(ConfigurationError, match="3 rows, then 4"):
        expected_kernel([torch.ones(3, 2), torch.ones(4, 2)])
