"""Several optimizers, closures, two-step optimizers and averaged copies, against the oracle."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loops.exact import (
    LAMBDA,
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
from torch.optim.swa_utils import AveragedModel

from feature_probe import FeatureProbe


def backward(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """One loss and its gradients."""
    loss = F.mse_loss(model(x), y)
    loss.backward()
    return loss


@pytest.mark.parametrize("swapped", [False, True])
def test_two_optimizers_with_weights_from_before_their_steps(swapped: bool) -> None:
    """W and G of each layer are those its own optimizer started from; λ is of its own group."""
    model = net()
    optimizers = [sgd(model[0]), sgd([*model[2].parameters(), *model[4].parameters()])]
    if swapped:
        optimizers.reverse()
    with probe_of(model, optimizers) as probe:
        for step in range(3):
            x, y = data(7)
            rows = rows_of(model, x, y)
            model.zero_grad()
            backward(model, x, y)
            for optimizer in optimizers:
                optimizer.step()
            assert_sums(probe.report, rows)
            assert probe.report.step == step
            assert {record.weight_decay for record in probe.report.records} == {LAMBDA}


def test_an_optimizer_that_steps_after_the_last_one_listed() -> None:
    """Its layers come with the next step: G and E of the step before, at weights of the report."""
    model = net()
    first, second = (
        sgd(model[0], lr=0.0),
        sgd([*model[2].parameters(), *model[4].parameters()], lr=0.0),
    )
    with probe_of(model, [first, second]) as probe:
        rows: dict[str, Any] = {}
        for _ in range(3):
            x, y = data(7)
            before, rows = rows, rows_of(model, x, y)
            model.zero_grad()
            backward(model, x, y)
            second.step()
            if before:
                expected = rows | {"0": before["0"]}
                assert_sums(probe.report, expected)
            first.step()


def test_alternating_optimizers_keep_their_own_accounts() -> None:
    """Each layer's K, E and G are of the passes whose gradients its own optimizer used."""
    model = net()
    first, last = sgd(model[0]), sgd([*model[2].parameters(), *model[4].parameters()])
    with probe_of(model, [first, last]) as probe:
        for _ in range(3):
            x, y = data(5)
            rows = rows_of(model, x, y)
            model.zero_grad()
            backward(model, x, y)
            first.step()
            model.zero_grad(set_to_none=False)
            x, y = data(8)
            later = rows_of(model, x, y)
            backward(model, x, y)
            last.step()
            for layer, own in {"0": rows, "2": later, "4": later}.items():
                for kind, expected in sums_of(own[layer]).items():
                    found = getattr(probe.report.statistics[layer], kind)
                    assert_close(found, expected, f"{layer} {kind}", 1e-9)
            assert probe.report.settings["discarded"] == 0
            assert {record.n_examples for record in probe.report.records} == {8}


def test_an_optimizer_that_accumulates_while_another_steps() -> None:
    """One steps every time, one after two passes with a zero_grad of its own."""
    model = net()
    slow, fast = sgd(model[0]), sgd([*model[2].parameters(), *model[4].parameters()], lr=0.0)
    parts: list[Any] = []
    with probe_of(model, [slow, fast], every=lambda step: step % 2 == 1, window=2) as probe:
        for step in range(4):
            x, y = data(6)
            parts = [rows_of(model, x, y)] if step % 2 == 0 else [*parts, rows_of(model, x, y)]
            (F.mse_loss(model(x), y) / 2).backward()
            if step % 2 == 1:
                slow.step()
            fast.step()
            if step % 2 == 1:
                found = probe.report.statistics["0"]
                both = [sums_of(part["0"]) for part in parts]
                for kind in ("gradient", "jacobian", "loss"):
                    expected = (both[0][kind] + both[1][kind]) / 2
                    assert_close(getattr(found, kind), expected, kind, 1e-9)
                slow.zero_grad()
            fast.zero_grad()


def test_an_optimizer_that_steps_several_times_in_a_step() -> None:
    """A critic's two steps to the other's one: its sums are over both of its batches."""
    model = net()
    critic, last = sgd(model[0], lr=0.0), sgd([*model[2].parameters(), *model[4].parameters()])
    with probe_of(model, [critic, last]) as probe:
        for _ in range(2):
            rows = []
            for n, optimizer in ((5, critic), (3, critic), (6, last)):
                x, y = data(n)
                rows.append(rows_of(model, x, y))
                model.zero_grad()
                backward(model, x, y)
                optimizer.step()
            both = sums_of(joined([{"0": part["0"]} for part in rows[:2]])["0"])
            found = probe.report.statistics["0"]
            for kind in ("jacobian", "loss"):
                assert_close(getattr(found, kind), both[kind], kind, 1e-9)
            steps = [sums_of(part["0"])["gradient"] for part in rows[:2]]
            assert_close(found.gradient, (steps[0] + steps[1]) / 2, "gradient", 1e-9)
            for kind in ("gradient", "jacobian", "loss"):
                expected = sums_of(rows[2]["4"])[kind]
                assert_close(getattr(probe.report.statistics["4"], kind), expected, kind, 1e-9)


def test_an_optimizer_of_a_part_of_the_model() -> None:
    """Layers it does not hold are measured at their fixed weights; the premise says so."""
    model, (x, y) = net(), data(7)
    optimizer = sgd(model[4])
    with probe_of(model, optimizer, weight_decay=LAMBDA) as probe:
        for _ in range(2):
            model.zero_grad()
            rows = rows_of(model, x, y)
            backward(model, x, y)
            optimizer.step()
            assert_sums(probe.report, rows)
    assert probe.report.record("0", "fact").premise == "not held by the optimizer"
    assert probe.report.record("4", "fact").premise == ""


class Twice(torch.optim.SGD):
    """A subclass that steps through its parent: torch runs the step hooks for each."""

    def step(self, closure: Callable[[], Tensor] | None = None) -> Any:
        """The parent's."""
        return super().step(closure)


@pytest.mark.parametrize("with_closure", [False, True])
def test_an_optimizer_that_calls_its_parents_step(with_closure: bool) -> None:
    """One step of it is one step, also where hooks run around both."""
    model = net()
    torch.optim.SGD(net().parameters())  # from now on torch's hooks are around SGD.step, too
    optimizer = Twice(model.parameters(), lr=0.2, weight_decay=LAMBDA)
    with probe_of(model, optimizer) as probe:
        for step in range(3):
            x, y = data(5)
            rows = rows_of(model, x, y)
            optimizer.zero_grad()
            if with_closure:
                optimizer.step(lambda x=x, y=y: backward(model, x, y))
            else:
                backward(model, x, y)
                optimizer.step()
            assert_sums(probe.report, rows)
            assert probe.report.step == step


CLOSURES: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": sgd,
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.05, weight_decay=LAMBDA),
    "lbfgs": lambda model: torch.optim.LBFGS(model.parameters(), lr=0.3, max_iter=4),
    "lbfgs strong_wolfe": lambda model: torch.optim.LBFGS(
        model.parameters(), max_iter=4, line_search_fn="strong_wolfe"
    ),
}


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("name", CLOSURES)
def test_closures_are_measured_at_their_first_evaluation(name: str, keyword: bool) -> None:
    """W, G, K and E are those before the step, however often the optimizer evaluates."""
    model = net()
    optimizer = CLOSURES[name](model)
    evaluations = []
    with probe_of(model, optimizer, weight_decay=LAMBDA) as probe:
        for step in range(3):
            x, y = data(7)

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                evaluations.append(len(evaluations))
                optimizer.zero_grad()
                return backward(model, x, y)

            rows = rows_of(model, x, y)
            before = copy.deepcopy(model.state_dict())
            value = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
            assert value.item() == pytest.approx(F.mse_loss(called(before, x), y).item())
            assert_sums(probe.report, rows)
            assert (probe.report.step, probe.faults) == (step, 0)
            assert probe.report.settings["discarded"] == 0
    assert (len(evaluations) > 3) == ("lbfgs" in name)


def called(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The network's output at stored weights."""
    model = net()
    model.load_state_dict(state)
    return model(x)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation as commonly written, around a base optimizer."""

    def __init__(self, params: Any, base: torch.optim.Optimizer, rho: float = 0.3) -> None:
        super().__init__(params, {"rho": rho})
        self.base_optimizer = base
        self.param_groups = base.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        """To the worst point near by."""
        held = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in held]).norm()
        for p in held:
            self.state[p]["old"] = p.detach().clone()
            p.add_(p.grad, alpha=0.3 / float(norm))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        """Back, and a step with the gradient from there."""
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["old"])
        self.base_optimizer.step()
        self.zero_grad()


def test_sharpness_aware_steps() -> None:
    """Given SAM's base optimizer: W is the unmoved weight; G, K and E those at the moved one."""
    model = net()
    base = sgd(model)
    sam = SAM(model.parameters(), base)
    with probe_of(model, base) as probe:
        for step in range(3):
            x, y = data(7)
            weights = {name: p.detach().clone() for name, p in model.named_parameters()}
            backward(model, x, y)
            sam.first_step()
            rows = rows_of(model, x, y)
            backward(model, x, y)
            gradients = gradients_of(model)
            sam.second_step()
            assert_gradients(probe.report, gradients)
            for layer, own in rows.items():
                found = probe.report.statistics[layer]
                assert torch.equal(found.weight[0], weights[f"{layer}.weight"])
                for kind in ("gradient", "jacobian", "loss"):
                    assert_close(getattr(found, kind), sums_of(own)[kind], kind, 1e-9)
            assert probe.report.step == step
            assert probe.report.settings["discarded"] == 1


@pytest.mark.parametrize("moment", ["before", "in forward", "after forward", "after backward"])
def test_copies_made_in_a_window_carry_nothing(moment: str) -> None:
    """deepcopy, AveragedModel and torch.save anywhere in a step; the copies' passes not counted."""

    class Copying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()
            self.hook: Callable[[], None] | None = None

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner[:2](x)
            if self.hook is not None:
                self.hook()
            return self.inner[2:](x)

    model = Copying()
    optimizer = sgd(model)
    copies: list[nn.Module] = []

    def make() -> None:
        model.hook = None
        file = io.BytesIO()
        torch.save(model.inner, file)
        file.seek(0)
        copies.extend(
            [
                copy.deepcopy(model.inner),
                AveragedModel(model.inner),
                torch.load(file, weights_only=False),
            ]
        )

    with probe_of(model, optimizer) as probe:
        for _ in range(2):
            x, y = data(7)
            rows = rows_of(model, x, y)
            if moment == "before":
                make()
            model.hook = make if moment == "in forward" else None
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            if moment == "after forward":
                make()
            loss.backward()
            if moment == "after backward":
                make()
            for twin in copies:
                backward(twin, x, y)
                with torch.no_grad():
                    twin(x)
            optimizer.step()
            assert_sums(probe.report, rows)
            assert probe.report.settings["discarded"] == 0
    assert len(copies) == 6
    for twin in copies:
        found = [h for m in twin.modules() for h in m._forward_hooks.values()]
        found += [h for m in twin.modules() for h in m._forward_pre_hooks.values()]
        assert all("inert" in repr(hook) for hook in found)
        assert not any(p._post_accumulate_grad_hooks for p in twin.parameters())


def test_an_average_updated_each_step() -> None:
    """An exponential moving average in the loop, evaluated there: the numbers are the model's."""
    model = net()
    average = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = sgd(model)
    with probe_of(model, optimizer) as probe:
        for _ in range(3):
            x, y = data(7)
            rows = rows_of(model, x, y)
            optimizer.zero_grad()
            loss = backward(model, x, y) + F.mse_loss(average(x), y)
            assert bool(loss.isfinite())
            optimizer.step()
            average.update_parameters(model)
            average(x)
            assert_sums(probe.report, rows)


def test_a_probe_of_the_average_says_that_it_is_not_trained() -> None:
    """Nothing breaks where the probe is put on the average: refused, as the optimizer's is not."""
    model = net()
    average = AveragedModel(model)
    with pytest.raises(Exception, match="was it made for another model"):
        FeatureProbe(average, optimizer=sgd(model))
