"""Loops as people write them, each one iteration of a run that can be probed or not."""

# ruff: noqa: D102, D103 (one-line iterations that their name describes)

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from loops.exact import LAMBDA, Net
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel


@dataclass
class Run:
    """What a loop uses; everything in it is compared bit for bit."""

    model: Net
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    others: list[nn.Module] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    step: int = 0

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.optimizers[-1]

    def batch(self, n: int = 4) -> tuple[Tensor, Tensor]:
        return torch.randn(n, 2, 4, 4), torch.randint(3, (n,))

    def loss(self, n: int = 4) -> Tensor:
        x, y = self.batch(n)
        loss = F.cross_entropy(self.model(x), y)
        self.losses.append(loss.item())
        return loss


Iteration = Callable[[Run], None]
Optimizers = Callable[[Net], list[torch.optim.Optimizer]]


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": LAMBDA, **options}
    return torch.optim.SGD(model.parameters(), **settings)


def adam(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=LAMBDA, **options)


def lbfgs(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, **options)


@dataclass(frozen=True)
class Feature:
    """One way of writing a loop.

    Attributes:
        iterate: One iteration.
        optimizers: What is made for the model; all of them are given to the probe.
        others: More modules that the loop uses, with the optimizers among the run's last ones.
        options: Of the probe.
        scaler: Whether the gradient scaler is enabled.
        probes: How many probes the model bears.
    """

    iterate: Iteration
    optimizers: Optimizers = lambda model: [sgd(model)]
    others: Callable[[Net], list[nn.Module]] = lambda model: []
    options: dict[str, Any] = field(default_factory=dict)
    scaler: bool = False
    probes: int = 1


def plain(run: Run) -> None:
    run.optimizer.zero_grad()
    run.loss().backward()
    run.optimizer.step()


def autocast(dtype: torch.dtype) -> Iteration:
    def iterate(run: Run) -> None:
        run.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = run.loss()
        run.scaler.scale(loss).backward()
        run.scaler.step(run.optimizer)
        run.scaler.update()

    return iterate


def overflowing(clip: bool, parts: int = 1) -> Iteration:
    def iterate(run: Run) -> None:
        for _ in range(parts):
            factor = float("inf") if run.step % 7 in (2, 4) else 1.0 / parts
            run.scaler.scale(run.loss() * factor).backward()
        if clip:
            run.scaler.unscale_(run.optimizer)
            nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad()

    return iterate


def accumulation(divide: bool, clip: bool = False) -> Iteration:
    def iterate(run: Run) -> None:
        run.optimizer.zero_grad(set_to_none=False)
        for n in (4, 4, 2):
            (run.loss(n) / (3 if divide else 1)).backward()
            if clip:
                nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)
        run.optimizer.step()

    return iterate


def cleared(how: str) -> Iteration:
    def iterate(run: Run) -> None:
        loss = run.loss()
        grads = [p.grad for p in run.model.parameters() if p.grad is not None]
        if how == "none":
            for parameter in run.model.parameters():
                parameter.grad = None
        elif how == "foreach" and grads:
            torch._foreach_zero_(grads)
        elif how == "model":
            run.model.zero_grad(set_to_none=False)
        loss.backward()
        run.optimizer.step()

    return iterate


def halves(model: Net) -> list[torch.optim.Optimizer]:
    rest = nn.ModuleList([model.norm, model.hidden, model.head])
    return [sgd(model.conv), adam(rest)]


def each_steps(run: Run) -> None:
    run.model.zero_grad()
    run.loss().backward()
    for optimizer in run.optimizers:
        optimizer.step()


def alternating(run: Run) -> None:
    for optimizer in run.optimizers:
        run.model.zero_grad()
        run.loss().backward()
        optimizer.step()


def two_losses(run: Run) -> None:
    run.optimizer.zero_grad()
    x, y = run.batch()
    output = run.model(x)
    F.cross_entropy(output, y).backward(retain_graph=True)
    output.square().mean().backward()
    run.optimizer.step()


def tokenwise(run: Run) -> None:
    run.optimizer.zero_grad()
    for _ in range(2):
        x, y = run.batch()
        output = run.model(x)
        F.cross_entropy(output, y, reduction="sum").backward(retain_graph=True)
        output.square().sum().backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()


def adversarial(run: Run) -> None:
    x, y = run.batch()
    attack = torch.zeros_like(x, requires_grad=True)
    for _ in range(2):
        loss = F.cross_entropy(run.model(x + attack), y)
        (direction,) = torch.autograd.grad(loss, attack)
        attack = (attack + 0.1 * direction.sign()).detach().requires_grad_()
    run.optimizer.zero_grad()
    F.cross_entropy(run.model((x + attack).detach()), y).backward()
    run.optimizer.step()


def penalty(run: Run) -> None:
    x, y = run.batch()
    x.requires_grad_()
    loss = F.cross_entropy(run.model(x), y)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    run.optimizer.zero_grad()
    (loss + gradient.square().sum()).backward()
    run.optimizer.step()


def discarded(run: Run) -> None:
    run.loss().backward()
    plain(run)


def by_hand(run: Run) -> None:
    parameters = list(run.model.parameters())
    gradients = torch.autograd.grad(run.loss(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    run.optimizer.step()


def evaluating(run: Run) -> None:
    run.optimizer.zero_grad()
    loss = run.loss()
    run.model.eval()
    run.loss()
    with torch.no_grad():
        run.loss()
    run.model.train()
    loss.backward()
    run.optimizer.step()


def closure(keyword: bool) -> Iteration:
    def iterate(run: Run) -> None:
        x, y = run.batch()

        def evaluate() -> Tensor:
            run.optimizer.zero_grad()
            loss = F.cross_entropy(run.model(x), y)
            loss.backward()
            run.losses.append(loss.item())
            return loss

        if keyword:
            run.optimizer.step(closure=evaluate)
        else:
            run.optimizer.step(evaluate)

    return iterate


class Maker(nn.Module):
    """A generator with its own optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 32)
        self.optimizer = [sgd(self.linear)]

    def forward(self, z: Tensor) -> Tensor:
        return self.linear(z).unflatten(1, (2, 4, 4))


def adversaries(frozen: bool) -> Iteration:
    def iterate(run: Run) -> None:
        maker = run.others[0]
        assert isinstance(maker, Maker)
        run.optimizer.zero_grad()
        fake, (real, y) = maker(torch.randn(4, 5)), run.batch()
        (F.cross_entropy(run.model(real), y) + run.model(fake.detach()).square().mean()).backward()
        run.optimizer.step()
        maker.optimizer[0].zero_grad()
        run.model.requires_grad_(not frozen)
        (-run.model(maker(torch.randn(4, 5))).square().mean()).backward()
        maker.optimizer[0].step()
        run.model.requires_grad_(True)

    return iterate


def averaging(run: Run) -> None:
    average = run.others[0]
    assert isinstance(average, AveragedModel)
    plain(run)
    average.update_parameters(run.model)
    run.others[1:] = [copy.deepcopy(run.model)]
    x, y = run.batch()
    for twin in run.others:
        F.cross_entropy(twin(x), y).backward()
        twin.zero_grad()


def sharpness_aware(run: Run) -> None:
    parameters = list(run.model.parameters())
    x, y = run.batch()
    F.cross_entropy(run.model(x), y).backward()
    moves = [0.05 * p.grad.sign() for p in parameters]
    with torch.no_grad():
        torch._foreach_add_(parameters, moves)
    run.optimizer.zero_grad()
    F.cross_entropy(run.model(x), y).backward()
    with torch.no_grad():
        torch._foreach_sub_(parameters, moves)
    run.optimizer.step()
    run.optimizer.zero_grad()


def failing(run: Run) -> None:
    if run.step % 3 == 1:
        run.model.fail = True
        with contextlib.suppress(MemoryError):
            run.loss()
        run.model.fail = False
    plain(run)


def siamese(run: Run) -> None:
    run.optimizer.zero_grad()
    F.mse_loss(run.model(run.batch()[0]), run.model(run.batch()[0])).backward()
    run.optimizer.step()


def skipping(run: Run) -> None:
    run.optimizer.zero_grad()
    for skip in (True, run.step % 2 == 0):
        run.model.skip = skip
        (run.loss() / 2).backward()
    run.optimizer.step()


def made(name: str) -> Optimizers:
    makers: dict[str, Callable[[Net], torch.optim.Optimizer]] = {
        "sgd fused": lambda model: sgd(model, fused=True),
        "adam fused": lambda model: adam(model, fused=True),
        "adam foreach": lambda model: adam(model, foreach=True),
        "adam": adam,
        "lbfgs": lbfgs,
        "lbfgs strong_wolfe": lambda model: lbfgs(model, line_search_fn="strong_wolfe"),
        "head": lambda model: sgd(model.head),
    }
    return lambda model: [makers[name](model)]


def all_features() -> Iterator[tuple[str, Feature]]:
    """Every way of writing a loop, by name."""
    yield "plain", Feature(plain)
    yield "two probes", Feature(two_losses, probes=2)
    yield "autocast bf16", Feature(autocast(torch.bfloat16))
    yield "autocast fp16, scaler", Feature(autocast(torch.float16), scaler=True)
    for name in ("adam", "adam foreach", "adam fused", "sgd fused"):
        make = made(name)
        yield f"overflows {name}", Feature(overflowing(False), make, scaler=True)
    yield "overflows, clipped", Feature(overflowing(True), scaler=True)
    yield "overflows, clipped, fused", Feature(overflowing(True), made("sgd fused"), scaler=True)
    yield "overflows in accumulation", Feature(overflowing(True, 2), scaler=True)
    yield "loss_scale=", Feature(plain, options={"loss_scale": lambda: 2.0})
    yield "accumulation", Feature(accumulation(True))
    yield "accumulation, undivided, clipped", Feature(accumulation(False, clip=True))
    for how in ("none", "foreach", "model"):
        yield f"cleared between: {how}", Feature(cleared(how))
    yield "two optimizers", Feature(each_steps, halves)
    yield "alternating optimizers", Feature(alternating, halves)
    yield "optimizer of a part", Feature(plain, made("head"))
    yield "two losses", Feature(two_losses)
    yield (
        "summed, reduced, retained",
        Feature(tokenwise, options={"positions": "reduce", "loss_reduction": "sum"}),
    )
    yield "adversarial inputs", Feature(adversarial)
    yield "gradient penalty", Feature(penalty)
    yield "discarded backward", Feature(discarded)
    yield "p.grad by hand", Feature(by_hand)
    yield "evaluation between", Feature(evaluating)
    yield "closure", Feature(closure(False))
    yield "adam closure=", Feature(closure(True), made("adam"))
    yield "lbfgs", Feature(closure(False), made("lbfgs"))
    yield "lbfgs strong_wolfe", Feature(closure(True), made("lbfgs strong_wolfe"))
    yield "gan", Feature(adversaries(frozen=False), others=lambda model: [Maker()])
    yield "gan, frozen", Feature(adversaries(frozen=True), others=lambda model: [Maker()])
    yield "averages and copies", Feature(averaging, others=lambda model: [AveragedModel(model)])
    yield "sharpness-aware", Feature(sharpness_aware)
    yield "errors caught", Feature(failing)
    yield "siamese", Feature(siamese)
    yield "layers not reached", Feature(skipping)


FEATURES = dict(all_features())
