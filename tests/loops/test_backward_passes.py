"""Backward passes that are not one a step: several on a forward, by-products, and none at all."""

from __future__ import annotations

import copy
from typing import Any

import oracle
import pytest
import torch
from loops.exact import (
    assert_close,
    assert_gradients,
    assert_sums,
    data,
    gradients_of,
    joined,
    net,
    probe_of,
    rows_of,
    sgd,
    sums_of,
)
from torch import Tensor, nn
from torch.nn import functional as F

from feature_probe import NotMeasuredError


def two_losses(output: Tensor, y: Tensor) -> Tensor:
    """Their sum, a mean over examples."""
    return F.mse_loss(output, y) + output.pow(4).mean()


def test_two_losses_on_one_forward() -> None:
    """E needs the sum of both gradients: from the second step on; the first says why it is not."""
    model = net()
    optimizer = sgd(model)
    with probe_of(model, optimizer) as probe:
        for step in range(4):
            x, y = data(7)
            rows = rows_of(model, x, y, two_losses)
            optimizer.zero_grad()
            output = model(x)
            F.mse_loss(output, y).backward(retain_graph=True)
            output.pow(4).mean().backward()
            optimizer.step()
            kinds = ("gradient", "jacobian") if step == 0 else ("gradient", "jacobian", "loss")
            assert_sums(probe.report, rows, only=kinds)
            if step == 0:
                assert "from the next step on" in probe.report.record("0", "enfa").status
                with pytest.raises(NotMeasuredError, match="several backward passes"):
                    probe.report.matrix("0", "enfa")
            assert probe.report.settings["discarded"] == 0


def test_the_first_backward_of_a_forward_is_thrown_away() -> None:
    """zero_grad between two backward passes on one forward: K is kept, E is of the second."""
    model = net()
    optimizer = sgd(model)
    with probe_of(model, optimizer) as probe:
        for _ in range(2):
            x, y = data(7)
            rows = rows_of(model, x, y)
            optimizer.zero_grad()
            output = model(x)
            output.pow(4).mean().backward(retain_graph=True)
            optimizer.zero_grad()
            F.mse_loss(output, y).backward()
            optimizer.step()
            assert_sums(probe.report, rows)
            assert probe.report.settings["discarded"] == 1


@pytest.mark.parametrize("through", ["autograd.grad", "autograd.backward"])
@pytest.mark.parametrize("head", [True, False])
def test_adversarial_training(through: str, head: bool) -> None:
    """Passes that look for the adversarial input add to no parameter's gradient: not counted."""
    model = net()
    optimizer = sgd(model)
    include = None if head else ["0", "2"]
    with probe_of(model, optimizer, include=include) as probe:
        for _ in range(3):
            x, y = data(7)
            attack = torch.zeros_like(x, requires_grad=True)
            for _ in range(3):
                loss = F.mse_loss(model(x + attack), y)
                if through == "autograd.grad":
                    (direction,) = torch.autograd.grad(loss, attack)
                else:
                    loss.backward(inputs=[attack])
                    direction = attack.grad
                attack = (attack + 0.1 * direction.sign()).detach().requires_grad_()
            x = (x + attack).detach()
            rows = rows_of(model, x, y)
            rows = rows if head else {name: rows[name] for name in ("0", "2")}
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            assert_sums(probe.report, rows)
            assert probe.report.settings["discarded"] == 0


def penalised(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Loss with a penalty on the gradient by the input."""
    x = x.clone().requires_grad_()
    output = model(x)
    loss = F.mse_loss(output, y)
    each = (output - y).square().mean(1)
    (gradient,) = torch.autograd.grad(each.sum(), x, create_graph=True)
    return output, loss + 0.5 * gradient.square().sum(1).mean()


def test_a_gradient_penalty() -> None:
    """create_graph: G is the whole loss's, K the output's, E of the derivative by z of it all."""
    model = net()
    optimizer = sgd(model)
    with probe_of(model, optimizer) as probe:
        for _ in range(3):
            x, y = data(7)
            twin = copy.deepcopy(model)
            layers = {name: (name,) for name in ("0", "2", "4")}
            rows = oracle.collect(
                twin, oracle.one_by_one((x, y)), lambda m, s: penalised(m, *s), layers
            )
            optimizer.zero_grad()
            penalised(model, x, y)[1].backward()
            gradients = gradients_of(model)
            optimizer.step()
            assert_sums(probe.report, rows, only=("jacobian", "loss"))
            assert_gradients(probe.report, gradients)


def test_gradients_set_from_autograd_grad() -> None:
    """p.grad filled from one autograd.grad: measured; from several: G alone, and why."""
    model = net()
    optimizer = sgd(model)
    parameters = list(model.parameters())
    with probe_of(model, optimizer) as probe:
        for passes in (1, 2, 3, 1):
            sums = [torch.zeros_like(p) for p in parameters]
            for _ in range(passes):
                x, y = data(7)
                rows = rows_of(model, x, y)
                found = torch.autograd.grad(F.mse_loss(model(x), y), parameters)
                sums = [a + b / passes for a, b in zip(sums, found, strict=True)]
            for parameter, gradient in zip(parameters, sums, strict=True):
                parameter.grad = gradient
            gradients = gradients_of(model)
            optimizer.step()
            if passes == 1:
                assert_sums(probe.report, rows)
                continue
            assert_gradients(probe.report, gradients)
            for relation in ("nfa", "enfa"):
                assert "autograd.grad" in probe.report.record("0", relation).status


@pytest.mark.parametrize("positions", ["expand", "reduce"])
def test_two_probes_on_one_model(positions: str) -> None:
    """Each one's products run through the graph of the other: neither sees them."""
    model = net()
    optimizer = sgd(model)
    options = {"positions": positions}
    with (
        probe_of(model, optimizer, **options) as one,
        probe_of(model, optimizer, include=["2"], **options) as two,
    ):
        for _ in range(3):
            x, y = data(7)
            rows = rows_of(model, x, y)
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            assert_sums(one.report, rows)
            assert_sums(two.report, {"2": rows["2"]})


@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_evaluation_with_gradients_is_not_counted(when: str) -> None:
    """Forward passes whose graph is never used, or used for the input alone, anywhere."""
    model = net()
    optimizer = sgd(model)

    def evaluate() -> None:
        x, y = data(3)
        x.requires_grad_()
        model(x)
        torch.autograd.grad(F.mse_loss(model(x), y), x)

    with probe_of(model, optimizer) as probe:
        for _ in range(3):
            x, y = data(7)
            rows = rows_of(model, x, y)
            optimizer.zero_grad()
            if when == "before":
                evaluate()
            loss = F.mse_loss(model(x), y)
            if when == "between":
                evaluate()
            loss.backward()
            if when == "after":
                evaluate()
            optimizer.step()
            assert_sums(probe.report, rows)
            assert probe.report.settings["discarded"] == 0


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("order", ["discriminator first", "generator first"])
def test_a_discriminator(order: str, frozen: bool) -> None:
    """Its passes inside the generator's loss are by-products: dropped, or none where frozen."""
    torch.manual_seed(4)
    judge = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    maker = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    judging, making = sgd(judge), sgd(maker)

    def loss_fn(output: Tensor, real: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(output, real)

    def make() -> None:
        making.zero_grad()
        judge.requires_grad_(not frozen)
        fake = judge(maker(torch.randn(6, 2).double()))
        loss_fn(fake, torch.ones(6, 1).double()).backward()
        making.step()
        judge.requires_grad_(True)

    with probe_of(judge, judging) as probe, probe_of(maker, making) as other:
        for step in range(3):
            if order == "generator first":
                make()
            real, fake = torch.randn(6, 4).double(), maker(torch.randn(6, 2).double()).detach()
            ones, zeros = torch.ones(6, 1).double(), torch.zeros(6, 1).double()
            rows = joined(
                [rows_of(judge, real, ones, loss_fn), rows_of(judge, fake, zeros, loss_fn)]
            )
            judging.zero_grad()
            ((loss_fn(judge(real), ones) + loss_fn(judge(fake), zeros)) / 2).backward()
            judging.step()
            if order == "discriminator first":
                make()
            assert_sums(probe.report, rows)
            assert probe.report.step == step
            late = int(order == "discriminator first" and step == 0)
            assert probe.report.settings["discarded"] == (0 if frozen or late else 1)
    assert other.report.step == 2
    assert other.faults == 0


def test_a_generator() -> None:
    """G probed: the discriminator's loss on detached samples does not count, its own does."""
    torch.manual_seed(4)
    judge = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    maker = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    judging, making = sgd(judge), sgd(maker)
    with probe_of(maker, making) as probe:
        for detached in (True, False, True):
            noise = torch.randn(6, 2).double()
            samples = maker(noise)  # for the discriminator, which may forget to detach
            judging.zero_grad()
            judge(samples.detach() if detached else samples).mean().backward()
            judging.step()
            making.zero_grad()
            noise = torch.randn(6, 2).double()
            twin = copy.deepcopy(judge)
            rows = rows_of(maker, noise, noise, lambda out, _, twin=twin: twin(out).square().mean())
            judge(maker(noise)).square().mean().backward()
            making.step()
            assert_sums(probe.report, rows)
            assert probe.report.settings["discarded"] == int(not detached)


def test_probed_while_frozen() -> None:
    """Attached while every parameter is frozen, thawed later: measured from then on."""
    model = net()
    optimizer = sgd(model)
    model.requires_grad_(False)
    with probe_of(model, optimizer) as probe:
        model(data(7)[0])
        model.requires_grad_(True)
        for _ in range(2):
            x, y = data(7)
            rows = rows_of(model, x, y)
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            assert_sums(probe.report, rows)


def test_two_forwards_in_one_loss() -> None:
    """A siamese pair: two passes, one loss; each input is an example, and their number doubles."""
    model = net()
    optimizer = sgd(model)
    with probe_of(model, optimizer) as probe:
        for _ in range(2):
            a, b = data(6)[0], data(6)[0]
            twin = copy.deepcopy(model)
            found: list[dict[str, Any]] = []
            for mine, other in ((a, b), (b, a)):
                partner = {
                    tuple(x.tolist()): twin(y[None]).detach()
                    for x, y in zip(mine, other, strict=True)
                }
                found.append(
                    oracle.collect(
                        twin,
                        [(x[None], partner[tuple(x.tolist())]) for x in mine],
                        lambda m, s: (out := m(s[0]), (out - s[1]).square().mean()),
                        {name: (name,) for name in ("0", "2", "4")},
                    )
                )
            rows = joined(found)
            optimizer.zero_grad()
            F.mse_loss(model(a), model(b)).backward()
            gradients = gradients_of(model)
            optimizer.step()
            assert_sums(probe.report, rows, only=("jacobian", "loss"), loss=4.0)
            assert_gradients(probe.report, gradients)


def test_passes_that_do_not_reach_every_layer() -> None:
    """Layers skipped by some passes: means over all examples, as if their gradient were zero."""

    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.maybe = nn.Linear(4, 5), nn.Linear(5, 5)
            self.last = nn.Linear(5, 3)
            self.skip = False

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.first(x))
            x = x if self.skip else x + torch.tanh(self.maybe(x))
            return self.last(x)

    model = Skipping().double()
    optimizer = sgd(model)
    with probe_of(model, optimizer) as probe:
        for _ in range(2):
            parts, sums = [], {}
            optimizer.zero_grad()
            for skip in (True, False, True):
                model.skip = skip
                x, y = data(4)
                parts.append(rows_of(model, x, y))
                (F.mse_loss(model(x), y) / 3).backward()
            optimizer.step()
            sums = {name: sums_of(part) for name, part in parts[1].items()}
            for layer in ("first", "last"):
                rows = joined([{layer: part[layer]} for part in parts])
                sums[layer] = sums_of(rows[layer])
            for layer, expected in sums.items():
                times = 1 / 3 if layer == "maybe" else 1.0
                for kind in ("gradient", "jacobian", "loss"):
                    found = getattr(probe.report.statistics[layer], kind)
                    assert_close(found, expected[kind] * times, f"{layer} {kind}", 1e-9)
