"""Random Jacobian products are unbiased; exact ones are exact, or refused."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn

from feature_probe import ConfigurationError, FeatureProbe, Report, measure

N = 6


def linear_model() -> tuple[nn.Module, Tensor]:
    """Two Linear layers under a head; the first is applied to every token."""
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)
    )
    return model, torch.randn(N, 2, 3)


def conv_model() -> tuple[nn.Module, Tensor]:
    """A plain and a grouped convolution under a head."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 2), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=2), nn.Flatten(), nn.Linear(4, 3)
    )
    return model, torch.randn(N, 2, 3, 3)


def batch_norm_model() -> tuple[nn.Module, Tensor]:
    """Batch norm in training mode: outputs of one example depend on the inputs of all."""
    model = nn.Sequential(
        nn.Linear(3, 4),
        nn.BatchNorm1d(4),
        nn.Tanh(),
        nn.Linear(4, 4, bias=False),
        nn.BatchNorm1d(4),
        nn.Tanh(),
        nn.Linear(4, 2),
    )
    return model, torch.randn(N, 3)


MODELS = {"linear": linear_model, "conv": conv_model, "batch norm": batch_norm_model}


@functools.cache
def made(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The model, its batch and targets, in float64."""
    torch.manual_seed(2)
    model, x = MODELS[name]()
    model, x = model.double(), x.double()
    with torch.no_grad():
        target = torch.randn(model.eval()(x).shape, dtype=torch.float64)
    return model, x, target


def report_of(name: str, **options: Any) -> Report:
    """A measurement of the backward NFA, whose matrix is K."""
    model, x, y = made(name)
    settings: dict[str, Any] = {"weight_decay": 0.1, "relations": ("bnfa",), "powers": (1.0,)}
    return measure(model, [(x, y)], nn.MSELoss(), progress=False, **{**settings, **options})


def k_of(report: Report) -> Tensor:
    """K of all layers, as one vector."""
    return torch.cat([report.matrix(layer, "bnfa", 1.0).flatten() for layer in report.layers])


def layers_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The Linear and convolution modules."""
    return {
        name: (name,)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def supervised(output: Tensor, target: Tensor) -> Tensor:
    """Any loss: K does not depend on it."""
    return (output - target).square().mean()


def own_example_k(name: str) -> Tensor:
    """The oracle's K, one example at a time, in eval mode."""
    model, x, y = made(name)
    rows = oracle.collect(
        model.eval(), oracle.one_by_one((x, y)), oracle.supervised(supervised), layers_of(model)
    )
    return torch.cat(
        [oracle.mean_gradient_square(r, "output", "output").flatten() for r in rows.values()]
    )


def cross_example_jacobians(name: str) -> list[Tensor]:
    """The oracle's ∂f_m/∂z_n over the whole training-mode batch, ``[m, c, n, d_out]`` by layer."""
    model, x, y = made(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    forward = oracle.supervised(supervised)
    rows = oracle.collect(model.train(), [(x, y)], forward, layers_of(model))
    model.load_state_dict(state)
    model.eval()
    outputs = y.shape[1]
    return [r.jac[0].reshape(N, outputs, N, r.jac.shape[-1]) for r in rows.values()]


def flat(matrices: list[Tensor]) -> Tensor:
    """The entries of all layers' matrices."""
    return torch.cat([matrix.flatten() for matrix in matrices])


def draws(count: int, name: str, **options: Any) -> Tensor:
    """K of all layers for seeds 0 .. count−1: ``[count, entries]``."""
    return torch.stack([k_of(report_of(name, seed=seed, **options)) for seed in range(count)])


def deviation(sample: Tensor, expected: Tensor) -> float:
    """‖mean − expected‖ in units of its standard error (root mean square over the entries)."""
    error = (sample.mean(0) - expected).square().sum()
    variance = (sample.var(0) / len(sample)).sum()
    return float((error / variance).sqrt())


@pytest.mark.parametrize("name", ["linear", "conv"])
@pytest.mark.parametrize("num_probes", [1, 2])
def test_random_k_is_unbiased(name: str, num_probes: int) -> None:
    """The mean of K over 200 seeds is the oracle's K within sampling error."""
    expected = own_example_k(name)
    sample = draws(200, name, jacobian="random", num_probes=num_probes)
    spread = sample.var(0).sum().sqrt() / expected.norm()
    assert float(spread) > 0.05  # single draws do scatter
    assert deviation(sample, expected) < 2  # far stricter than 4 for the single worst entry
    z = (sample.mean(0) - expected) / (sample.std(0) / math.sqrt(len(sample))).clamp_min(1e-12)
    assert float(z.abs().max()) < 4
    # the test has power: a bias of the size of v's cross terms would show
    assert deviation(sample, 1.3 * expected) > 4


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_the_error_falls_with_the_number_of_probes(name: str) -> None:
    """The root mean square error over seeds falls like num_probes^(−½)."""
    expected = own_example_k(name)
    counts = (1, 4, 16, 64)
    errors = []
    for count in counts:
        sample = draws(24, name, jacobian="random", num_probes=count)
        errors.append(float((sample - expected).square().sum(1).mean().sqrt()))
    logs = torch.tensor([[math.log(count), 1.0] for count in counts])
    slope = torch.linalg.lstsq(logs, torch.tensor(errors).log()[:, None]).solution[0].item()
    assert -0.6 < slope < -0.4, errors


@pytest.mark.parametrize("name", ["linear", "conv", "batch norm"])
def test_exact_is_the_oracle_whatever_the_seed(name: str) -> None:
    """Where examples do not interact the random signs of the exact mode have no effect."""
    expected = own_example_k(name)
    for seed in (0, 1, 2):
        found = k_of(report_of(name, jacobian="exact", seed=seed))
        assert float((found - expected).norm() / expected.norm()) < 1e-12


@pytest.mark.parametrize("options", [{"jacobian": "exact"}, {"jacobian": "random"}], ids=str)
def test_under_batch_norm_k_is_unbiased_for_all_cross_terms(options: dict[str, Any]) -> None:
    """In training mode K's mean over seeds is (1/n) Σ_n Σ_m J_mnᵀJ_mn within sampling error."""
    jacobians = cross_example_jacobians("batch norm")
    target = flat([torch.einsum("mcnd,mcne->de", j, j) / N for j in jacobians])
    own = flat([torch.einsum("ncnd,ncne->de", j, j) / N for j in jacobians])
    same_sign = flat([torch.einsum("mcnd,lcne->de", j, j) / N for j in jacobians])
    model, _, _ = made("batch norm")
    model.train()
    try:
        sample = draws(300, "batch norm", eval_mode=False, **options)
    finally:
        model.eval()
    assert deviation(sample, target) < 2
    # the wrong targets are far outside: own example only, and one sign for the whole batch
    assert deviation(sample, own) > 4
    assert deviation(sample, same_sign) > 4


def test_the_seed_decides_the_random_numbers() -> None:
    """The same seed gives the same K bitwise, another seed another; the global one has no part."""
    first = k_of(report_of("linear", jacobian="random", seed=7))
    torch.manual_seed(99)
    assert torch.equal(k_of(report_of("linear", jacobian="random", seed=7)), first)
    assert not torch.equal(k_of(report_of("linear", jacobian="random", seed=8)), first)


def test_probes_of_different_batches_are_independent() -> None:
    """Twice the same batch gives fresh probes: half the variance of once."""
    model, x, y = made("linear")
    expected = own_example_k("linear")

    def error(times: int) -> float:
        total = 0.0
        for seed in range(60):
            report = measure(
                model,
                [(x, y)] * times,
                nn.MSELoss(),
                weight_decay=0.1,
                relations=("bnfa",),
                powers=(1.0,),
                jacobian="random",
                seed=seed,
                progress=False,
            )
            total += float((k_of(report) - expected).square().sum())
        return total

    assert 2.5 < error(1) / error(4) < 6


def loop(name: str, steps: int, **options: Any) -> Report:
    """Steps at learning rate zero on the same batch, all in one window."""
    model, x, y = made(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, weight_decay=0.1)
    with FeatureProbe(
        model,
        optimizer=optimizer,
        every=lambda step: step == steps - 1,
        window=steps,
        relations=("bnfa",),
        powers=(1.0,),
        keep_matrices=True,
        **options,
    ) as probe:
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    assert probe.report is not None
    return probe.report


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_random_probes_in_the_loop_converge_to_the_exact_k(name: str) -> None:
    """Over a window of 200 steps at frozen weights the error is about 1/√200 of a single step's."""
    expected = own_example_k(name)
    single = torch.stack([k_of(loop(name, 1, seed=seed)) for seed in range(20)])
    rms = (single - expected).square().sum(1).mean().sqrt()
    error = (k_of(loop(name, 200)) - expected).norm()
    assert float(rms / expected.norm()) > 0.05
    assert float(error / rms) < 3 / math.sqrt(200)


@pytest.mark.parametrize("run", ["measure", "loop"])
def test_exact_is_refused_above_max_outputs(run: str) -> None:
    """With c = 3 outputs a limit of 3 passes; a limit of 2 is refused with both numbers."""
    name = "linear"
    call: Callable[..., Report] = (
        functools.partial(report_of, name) if run == "measure" else functools.partial(loop, name, 1)
    )
    assert call(jacobian="exact", max_outputs=3).records
    model, _, _ = made(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConfigurationError, match=r"max_outputs") as error:
        call(jacobian="exact", max_outputs=2)
    assert "3" in str(error.value)
    assert "2" in str(error.value)
    assert not any(module._forward_hooks for module in model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert call(jacobian="random", max_outputs=2).records
