"""RFMs as estimators: scikit-learn's checks, tensors and arrays, what is kept, bad input."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from feature_probe import ConfigurationError, FeatureProbeError
from feature_probe.rfm import (
    Gaussian,
    Iteration,
    Laplace,
    LpExponential,
    RecursiveFeatureMachine,
    RecursiveFeatureMachineClassifier,
)

Both = RecursiveFeatureMachine | RecursiveFeatureMachineClassifier


def parity(count: int, seed: int = 0, inputs: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Signs of the first two coordinates multiplied: no linear part, two features."""
    x = np.random.default_rng(seed).choice([-1.0, 1.0], size=(count, inputs))
    return x, x[:, 0] * x[:, 1]


#: At which parities are learned: 30 inputs of size 1, a wide kernel, next to no ridge.
LEARNING: dict[str, Any] = {
    "kernel": "gaussian", "bandwidth": 5.0 * 30**0.5, "ridge": 1e-6, "geometric_averaging": True
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:iteration .* M has grown:RuntimeWarning")
@pytest.mark.parametrize(
    "estimator",
    [
        RecursiveFeatureMachine(),
        RecursiveFeatureMachine(update="nfa", bandwidth="median", solver="iterative"),
        RecursiveFeatureMachine(kernel=Gaussian(2.0), geometric_averaging=True, diagonal=True),
        RecursiveFeatureMachineClassifier(),
        RecursiveFeatureMachineClassifier(update="none", label_encoding="signed"),
        RecursiveFeatureMachineClassifier(update="nfa", power=0.5, rescale="trace"),
    ],
    ids=repr,
)
def test_scikit_learns_own_checks(estimator: Both) -> None:
    """Every check of check_estimator; its one skip is of the array API."""
    checks = pytest.importorskip("sklearn.utils.estimator_checks")
    results = checks.check_estimator(estimator, on_skip=None)
    assert len(results) > 40
    skipped = {result["check_name"] for result in results if result["status"] == "skipped"}
    assert skipped <= {"check_array_api_input"}
    assert {result["status"] for result in results} <= {"passed", "skipped"}


@pytest.mark.parametrize(
    "own",
    [{"update": "fact"}, {"update": "nfa", "rescale": "trace", "geometric_averaging": False}],
)
def test_features_are_learned_where_a_kernel_fails(own: dict[str, Any]) -> None:
    """A parity of two among thirty: plain kernel regression knows little, M finds the two."""
    x, y = parity(300, inputs=30)
    held = parity(500, seed=1, inputs=30)
    plain = RecursiveFeatureMachineClassifier(update="none", **LEARNING).fit(x, y)
    model = RecursiveFeatureMachineClassifier(**(LEARNING | own)).fit(x, y)
    assert plain.score(*held) < 0.9
    assert model.score(*held) > 0.99
    matrix = model.feature_matrix_
    assert matrix[:2, :2].trace() > 0.7 * matrix.trace()


def test_the_first_machine_is_kernel_ridge_regression() -> None:
    """Without iterations: scikit-learn's KernelRidge, α = nλ."""
    ridge = pytest.importorskip("sklearn.kernel_ridge")
    x, y = parity(60)
    own = RecursiveFeatureMachine(kernel="gaussian", bandwidth=3.0, ridge=1e-2, iterations=0)
    theirs = ridge.KernelRidge(alpha=0.6, kernel="rbf", gamma=1 / 18).fit(x, y)
    held = parity(40, seed=1)[0]
    np.testing.assert_allclose(own.fit(x, y).predict(held), theirs.predict(held), rtol=1e-9)


def test_tensors_and_arrays_give_the_same_and_what_they_are() -> None:
    """Tensors in, tensors out, in the dtype of the inputs; several outputs keep their columns."""
    x, y = parity(80)
    wide = np.stack([y, -2 * y], axis=1)
    by_array = RecursiveFeatureMachine().fit(x, wide)
    by_tensor = RecursiveFeatureMachine().fit(torch.tensor(x), torch.tensor(wide))
    found = by_tensor.predict(torch.tensor(x))
    assert isinstance(found, torch.Tensor)
    assert found.shape == (80, 2)
    assert isinstance(by_array.predict(x), np.ndarray)
    np.testing.assert_array_equal(found.numpy(), by_array.predict(x))
    np.testing.assert_array_equal(by_tensor.feature_matrix_.numpy(), by_array.feature_matrix_)
    alone = RecursiveFeatureMachine().fit(x, y)
    narrow = RecursiveFeatureMachine().fit(x.astype(np.float32), y)
    assert narrow.feature_matrix_.dtype == np.float32
    assert narrow.predict(x[:5].astype(np.float32)).dtype == np.float32
    np.testing.assert_allclose(narrow.predict(x), alone.predict(x), atol=1e-3)
    asked = RecursiveFeatureMachine(dtype="float32").fit(x, y)
    assert asked.feature_matrix_.dtype == np.float32


def test_labels() -> None:
    """Strings and numbers, both encodings; scores of two classes are one number a point."""
    x, y = parity(120)
    names = np.where(y > 0, "even", "odd")
    for encoding in ("one_hot", "signed"):
        model = RecursiveFeatureMachineClassifier(label_encoding=encoding).fit(x, names)
        assert set(model.predict(x)) == {"even", "odd"}
        assert model.score(x, names) == 1
        outputs = model.decision_function(x)
        assert outputs.shape == (120,)
        np.testing.assert_array_equal(outputs > 0, model.predict(x) == model.classes_[1])
    numbers = torch.tensor(y).long()
    found = (
        RecursiveFeatureMachineClassifier().fit(torch.tensor(x), numbers).predict(torch.tensor(x))
    )
    assert torch.equal(found, numbers)
    with pytest.raises(ConfigurationError, match="label_encoding"):
        RecursiveFeatureMachineClassifier(label_encoding="other").fit(x, names)


def test_history_has_matrices_and_agreement() -> None:
    """One entry an iteration: M_t, and the probe's own records of it; FACT comes to M."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(200, 6))
    y = np.tanh(x[:, 0] + x[:, 1]) + 0.1 * draw.normal(size=200)
    model = RecursiveFeatureMachine(
        kernel="quadratic", bandwidth=3.0, geometric_averaging=True, iterations=15, history=True
    ).fit(x, y)
    assert [entry.number for entry in model.history_] == list(range(16))
    np.testing.assert_array_equal(model.history_[0].feature_matrix, np.eye(6))
    np.testing.assert_array_equal(model.history_[-1].feature_matrix, model.feature_matrix_)
    labels = [record.label for record in model.history_[0].records]
    assert labels == ["fact", "fact_sym", "nfa^1"]
    fact = [entry.records[0].cosine for entry in model.history_]
    assert fact[-1] > 0.9999 > 0.8 > fact[0]
    assert model.history_[-1].records[0].residual < 0.01  # M is FACT, not its multiple
    assert model.history_[3].records[0].step == 3
    assert model.history_[0].records[0].weight_decay == 1e-3
    short = RecursiveFeatureMachine(iterations=2).fit(x, y)
    assert [entry.records for entry in short.history_] == [(), (), ()]
    assert short.history_[0].feature_matrix is None


def test_records_of_an_iteration_are_of_its_matrices() -> None:
    """The cosine in a record is that of M_t with the FACT that the iteration itself holds."""
    x, y = parity(60)
    seen: list[Iteration] = []
    model = RecursiveFeatureMachine(iterations=2, history=True, callbacks=[seen.append])
    model.fit(x, y)
    for iteration, entry in zip(seen, model.history_, strict=True):
        m = iteration.machine.features.matrix
        for record, other in zip(
            entry.records, (iteration.fact, None, iteration.agop), strict=True
        ):
            if other is not None:
                cosine = (m * other).sum() / m.norm() / other.norm()
                assert record.cosine == pytest.approx(float(cosine), abs=1e-9)


def test_reports_go_where_the_probes_go(tmp_path: Path) -> None:
    """Event files and JSON lines in a folder; a sink of one's own."""

    class Sink:
        def __init__(self) -> None:
            self.steps: list[int] = []
            self.closed = 0

        def write(self, report: Any) -> None:
            self.steps.append(report.step)

        def close(self) -> None:
            self.closed += 1

    sink = Sink()
    x, y = parity(50)
    RecursiveFeatureMachine(iterations=2, log_dir=tmp_path, sinks=[sink]).fit(x, y)
    assert (sink.steps, sink.closed) == ([0, 1, 2], 1)
    assert list(tmp_path.glob("events.out.tfevents*"))
    lines = (tmp_path / "feature_probe.jsonl").read_text(encoding="utf-8").splitlines()
    assert sum('"relation": "fact"' in line or '"relation":"fact"' in line for line in lines) >= 3


def test_a_sink_that_fails_costs_no_fit(caplog: pytest.LogCaptureFixture) -> None:
    """Its fault is logged, and the fit goes on."""

    class Broken:
        def write(self, report: Any) -> None:
            raise OSError("disk full")

        def close(self) -> None:
            """Nothing."""

    x, y = parity(30)
    model = RecursiveFeatureMachine(iterations=1, sinks=[Broken()]).fit(x, y)
    assert len(model.history_) == 2
    assert "disk full" in caplog.text


def test_the_best_iteration_on_held_out_points_is_kept() -> None:
    """By validation points or a share of the points; it stops after so many without gain."""
    x, y = parity(200)
    held = parity(200, seed=1)
    model = RecursiveFeatureMachine(
        kernel="gaussian", bandwidth=5.0, geometric_averaging=True, iterations=20, patience=2
    )
    model.fit(x, y, validation=held)
    scores = [entry.validation_score for entry in model.history_]
    assert model.n_iter_ == int(np.argmax(scores))
    assert model.score(*held) == pytest.approx(max(scores))
    assert len(scores) == model.n_iter_ + 3 < 21
    split = RecursiveFeatureMachineClassifier(validation_fraction=0.25, iterations=2).fit(x, y)
    assert len(split.machine_.x) == 150
    assert all(0 <= entry.validation_score <= 1 for entry in split.history_)
    with pytest.raises(ConfigurationError, match="patience"):
        RecursiveFeatureMachine(patience=2).fit(x, y)


def test_a_share_of_every_class_is_held_out() -> None:
    """Whatever the split draws, no class is lost, and one point of it at least is trained on."""
    x = np.random.default_rng(0).normal(size=(60, 3))
    y = np.array(["a"] * 40 + ["b"] * 19 + ["c"])
    for seed in range(5):
        model = RecursiveFeatureMachineClassifier(
            "none", validation_fraction=0.3, random_state=seed
        ).fit(x, y)
        assert model.classes_.tolist() == ["a", "b", "c"]
        assert model.decision_function(x).shape == (60, 3)
        assert len(model.machine_.x) == 60 - 12 - 6
        kept = {tuple(row) for row in model.machine_.x.tolist()}
        assert tuple(x[-1]) in kept
        assert sum(tuple(row) in kept for row in x[:40]) == 28
    with pytest.raises(ConfigurationError, match="fewer than 2 to validate on"):
        RecursiveFeatureMachineClassifier(validation_fraction=0.2).fit(x[:4], ["a", "b"] * 2)


@pytest.mark.parametrize(
    "validation", [np.zeros((9, 10)), (np.zeros((9, 10)),), (np.zeros((9, 10)), [1.0]),
                   (np.zeros((1, 10)), [1.0]), True]
)  # fmt: skip
def test_bad_validation_points(validation: Any) -> None:
    """Not a pair, of different lengths, or one point, which has no R²."""
    x, y = parity(30)
    with pytest.raises(ConfigurationError, match="validation must"):
        RecursiveFeatureMachine().fit(x, y, validation=validation)


def test_a_target_out_of_scale_is_warned_of() -> None:
    """FACT grows with y²: M then makes every point alone, and R² falls below that of no features.

    Standardising y, or M's trace, is what the message says, and what helps.
    """
    x = np.random.default_rng(0).normal(size=(500, 5))
    y = x[:, 0] * x[:, 1]
    x, test_x, y, test_y = x[:300], x[300:], y[:300], y[300:]
    settings: dict[str, Any] = {"bandwidth": 3.0, "ridge": 1e-3, "iterations": 3}
    with pytest.warns(RuntimeWarning, match="standardise y"):
        large = RecursiveFeatureMachine(**settings).fit(x, 1e4 * y)
    assert large.score(test_x, 1e4 * test_y) < 0.1
    scaled = RecursiveFeatureMachine(rescale="trace", **settings).fit(x, 1e4 * y)
    assert scaled.score(test_x, 1e4 * test_y) > 0.8
    assert RecursiveFeatureMachine(**settings).fit(x, y).score(test_x, test_y) > 0.5


def test_a_matrix_that_no_update_needs_is_had_with_history() -> None:
    """A callback that asks for AGOP under FACT is told how; any answer but True goes on."""
    x, y = parity(30)
    seen: list[torch.Tensor] = []

    def read(iteration: Iteration) -> torch.Tensor:
        seen.append(iteration.agop)
        return iteration.fact

    with pytest.raises(FeatureProbeError, match="history=True"):
        RecursiveFeatureMachine(iterations=1, callbacks=[read]).fit(x, y)
    RecursiveFeatureMachine(iterations=1, callbacks=[read], history=True).fit(x, y)
    assert [matrix.shape for matrix in seen] == [(10, 10)] * 2


def test_numbers_may_be_numpys() -> None:
    """Searches over parameters hand over NumPy's own."""
    x, y = parity(30)
    model = RecursiveFeatureMachine(
        iterations=np.int64(1), ridge=np.float32(0.5), bandwidth=np.float64(3.0), memory=np.int64(1)
    )
    assert model.fit(x, y).n_iter_ == 1
    assert RecursiveFeatureMachine("none", dtype=np.float32).fit(x, y).predict(x).dtype == "float32"
    assert RecursiveFeatureMachine("none", random_state=None).fit(x, y).n_iter_ == 5


def test_callbacks_may_end_the_fit() -> None:
    """Called with each iteration; what was reached is kept."""
    x, y = parity(50)
    seen: list[int] = []

    def stop(iteration: Iteration) -> bool:
        seen.append(iteration.number)
        return iteration.number == 2

    model = RecursiveFeatureMachine(iterations=9, callbacks=[stop]).fit(x, y)
    assert seen == [0, 1, 2]
    assert model.n_iter_ == 2


def test_units_do_not_matter_to_fact() -> None:
    """Inputs and bandwidth a hundred times larger: FACT-RFM is the same, NFA-RFM if rescaled."""
    x, y = parity(80)
    x = x + 0.1 * np.random.default_rng(0).normal(size=x.shape)

    def difference(**own: Any) -> float:
        near = RecursiveFeatureMachine(bandwidth=5.0, iterations=2, **own).fit(x, y).predict(x)
        model = RecursiveFeatureMachine(bandwidth=500.0, iterations=2, **own)
        return float(np.abs(model.fit(100 * x, y).predict(100 * x) - near).max())

    assert difference(update="fact") < 1e-6
    assert difference(update="nfa", rescale="trace") < 1e-6
    assert difference(update="nfa") > 0.01


def test_categorical_columns() -> None:
    """Strings become columns of zeros and ones; one that was not seen is all zeros."""
    draw = np.random.default_rng(0)
    colour = draw.choice(["red", "green", "blue"], 150)
    number = draw.normal(size=150)
    x = np.array(list(zip(number, colour, strict=True)), dtype=object)
    y = np.where(colour == "red", number, -number)
    model = RecursiveFeatureMachine(categorical=[1], bandwidth=3.0, ridge=1e-4).fit(x, y)
    assert model.columns_.names == ["x0", "x1=blue", "x1=green", "x1=red"]
    assert model.feature_matrix_.shape == (4, 4)
    assert model.score(x, y) > 0.9
    unseen = np.array([[0.5, "white"]], dtype=object)
    assert np.isfinite(model.predict(unseen)).all()
    with pytest.raises(ConfigurationError, match="column 1 is not numbers"):
        RecursiveFeatureMachine(categorical=[0]).fit(x, y)
    with pytest.raises(ConfigurationError, match="column 7"):
        RecursiveFeatureMachine(categorical=[7]).fit(x, y)


def test_categories_that_are_not_there_or_of_another_type_are_refused() -> None:
    """Missing values, at fit and at predict; numbers for names; columns that nobody named."""
    x = np.array([["a", 1], ["b", 2], ["a", 3], ["b", 5]], dtype=object)
    y = np.arange(4.0)
    model = RecursiveFeatureMachine("none", categorical=[0]).fit(x, y)
    for missing in (None, np.nan, pytest.importorskip("pandas").NA):
        hole = x.copy()
        hole[1, 0] = missing
        for use in (lambda data: RecursiveFeatureMachine("none", categorical=[0]).fit(data, y),
                    model.predict):  # fmt: skip
            with pytest.raises(ConfigurationError, match="column 0 has missing values"):
                use(hole)
    mixed = x.copy()
    mixed[0, 0] = 7
    with pytest.raises(ConfigurationError, match="several types: number, str"):
        RecursiveFeatureMachine("none", categorical=[0]).fit(mixed, y)
    numbers = x.copy()
    numbers[:, 0] = 7
    with pytest.raises(ConfigurationError, match="another type than in training"):
        model.predict(numbers)
    with pytest.raises(ConfigurationError, match=r"categorical="):
        RecursiveFeatureMachine("none").fit(x, y)


def test_the_median_bandwidth_is_the_median() -> None:
    """Of distances between different points, in the kernel's own norm."""
    x, y = parity(40)
    x = x + 0.1 * np.random.default_rng(0).normal(size=x.shape)
    upper = np.triu_indices(40, 1)
    for kernel, norm in (("laplace", 2), (LpExponential(p=1.0), 1)):
        distances = np.linalg.norm(x[:, None] - x[None], ord=norm, axis=2)[upper]
        model = RecursiveFeatureMachine(kernel=kernel, bandwidth="median", iterations=0).fit(x, y)
        assert model.machine_.kernel.bandwidth == pytest.approx(
            np.sort(distances)[(len(distances) - 1) // 2]
        )
    with pytest.raises(ConfigurationError, match="coincide"):
        RecursiveFeatureMachine(bandwidth="median").fit(np.ones((9, 2)), np.arange(9.0))


def test_copies_and_pickles_predict_the_same() -> None:
    """What was fitted can be stored."""
    x, y = parity(50)
    model = RecursiveFeatureMachine(iterations=1).fit(x, y)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        np.testing.assert_array_equal(other.predict(x), model.predict(x))


BAD = [
    ({"update": "newton"}, "update must be one of"),
    ({"kernel": "linear"}, "unknown kernel 'linear'"),
    ({"kernel": 3}, "unknown kernel 3"),
    ({"kernel": Laplace}, r"Laplace\(\)"),
    ({"bandwidth": 0.0}, "bandwidth must be a positive number"),
    ({"bandwidth": "mean"}, "bandwidth"),
    ({"ridge": -1.0}, "ridge"),
    ({"ridge": float("nan")}, "ridge"),
    ({"iterations": 1.5}, "iterations"),
    ({"power": 0.0}, "power"),
    ({"rescale": "norm"}, "rescale"),
    ({"solver": "lu"}, "solver"),
    ({"memory": 0.0}, "memory"),
    ({"memory": "all"}, "memory"),
    ({"update": "nfa", "geometric_averaging": True}, 'of update="fact"'),
    ({"power": 0.5}, 'of update="nfa"'),
    ({"diagonal": "yes"}, "diagonal must be True or False"),
    ({"history": "no"}, "history must be True or False"),
    ({"callbacks": print}, "callbacks must be"),
    ({"categorical": None}, "categorical must be"),
    ({"categorical": 3}, "categorical must be"),
    ({"validation_fraction": 1.0}, "validation_fraction"),
    ({"validation_fraction": 0.99}, "fewer than 2"),
    ({"random_state": "x"}, "random_state"),
    ({"dtype": "float16"}, "dtype"),
    ({"kernel": lambda u, v: u.sum() + v.sum()}, "must return"),
    ({"kernel": lambda u, v: torch.cdist(u, v)}, "gradient is not finite|singular|not finite"),
]


@pytest.mark.parametrize(
    ("parameters", "message"), BAD, ids=[str(bad[1]) + str(i) for i, bad in enumerate(BAD)]
)
def test_bad_parameters(parameters: dict[str, Any], message: str) -> None:
    """A clear error that names the parameter."""
    x, y = parity(40)
    with pytest.raises(FeatureProbeError, match=message):
        RecursiveFeatureMachine(**parameters).fit(x, y)


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("estimator", [RecursiveFeatureMachine, RecursiveFeatureMachineClassifier])
def test_bad_data(estimator: type[Both], tensor: bool) -> None:
    """NaN, infinity, wrong shapes and lengths: a ValueError; from tensors and arrays."""
    x, y = parity(20)
    hole, far = x.copy(), x.copy()
    hole[3, 2], far[1, 1] = np.nan, np.inf

    def given(values: np.ndarray) -> Any:
        return torch.tensor(values) if tensor else values

    for inputs, targets in (
        (hole, y), (far, y), (x[:, 0], y), (x[:, :, None], y), (x[:, :0], y), (x[:1], y[:1]),
        (x, y[:5]), (x, np.full(20, np.nan)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"\w"):
            estimator().fit(given(inputs), given(targets))
    model = estimator(iterations=1).fit(given(x), given(y))
    for inputs in (x[:, :4], hole, x[0]):
        with pytest.raises(ValueError, match=r"\w"):
            model.predict(given(inputs))


def test_one_class() -> None:
    """Nothing to tell apart."""
    x, _ = parity(20)
    with pytest.raises(ConfigurationError, match="at least two classes"):
        RecursiveFeatureMachineClassifier().fit(x, np.ones(20))


def test_degenerate_data_have_defined_results() -> None:
    """Constant columns are left alone, rows may be doubled, there may be more columns than rows."""
    x, y = parity(40)
    constant = np.concatenate([x, np.full((40, 1), 7.0)], axis=1)
    model = RecursiveFeatureMachine(kernel="gaussian", bandwidth=5.0, update="nfa")
    found = model.fit(constant, y).predict(constant)
    np.testing.assert_allclose(found, model.fit(x, y).predict(x), rtol=1e-8)
    doubled = RecursiveFeatureMachine().fit(np.repeat(x, 2, axis=0), np.repeat(y, 2))
    assert np.isfinite(doubled.feature_matrix_).all()
    wide = np.random.default_rng(0).normal(size=(12, 40))
    assert np.isfinite(RecursiveFeatureMachine().fit(wide, wide[:, 0]).predict(wide)).all()
    same = RecursiveFeatureMachine().fit(np.ones((9, 2)), np.arange(9.0))
    np.testing.assert_allclose(same.predict(np.ones((1, 2))), 4.0, rtol=2e-3)
    with pytest.raises(FeatureProbeError, match="singular"):
        RecursiveFeatureMachine(ridge=0.0).fit(np.repeat(x, 2, axis=0), np.repeat(y, 2))


def test_iterative_and_direct_agree() -> None:
    """With little memory the other solver, the same predictions."""
    x, y = parity(200)
    direct = RecursiveFeatureMachine(iterations=2).fit(x, y)
    small = RecursiveFeatureMachine(iterations=2, memory=1e-4, tolerance=1e-8).fit(x, y)
    assert {entry.solver for entry in direct.history_} == {"cholesky"}
    assert {entry.solver for entry in small.history_} == {"iterative"}
    np.testing.assert_allclose(small.predict(x), direct.predict(x), atol=1e-5)


def test_a_kernel_object_keeps_its_bandwidth_unless_another_is_given() -> None:
    """By name it is 10."""
    x, y = parity(30)
    for kernel, asked, used in (
        (Laplace(3.0), None, 3.0), (Laplace(3.0), 4.0, 4.0), ("laplace", None, 10.0)
    ):  # fmt: skip
        model = RecursiveFeatureMachine(kernel=kernel, bandwidth=asked, iterations=0).fit(x, y)
        assert model.machine_.kernel.bandwidth == used


WITHOUT = """
import sys
sys.modules["sklearn"] = None
import numpy as np, torch
from feature_probe.rfm import RecursiveFeatureMachine, RecursiveFeatureMachineClassifier
x = np.random.default_rng(0).normal(size=(60, 4))
y = x[:, 0] * x[:, 1]
model = RecursiveFeatureMachine(ridge=1e-6).fit(x, y)
assert model.score(x, y) > 0.9, model.score(x, y)
assert model.get_params()["ridge"] == 1e-6
assert model.set_params(ridge=1.0).ridge == 1.0
assert "ridge=1.0" in repr(model)
labels = RecursiveFeatureMachineClassifier().fit(x.tolist(), (y > 0).tolist())
assert labels.score(x, y > 0) > 0.9
for bad in ([[float("nan")] * 4] * 60, [["a"] * 4] * 60, x[0]):
    try:
        model.fit(bad, y)
    except ValueError:
        continue
    raise SystemExit("accepted")
try:
    RecursiveFeatureMachine().predict(x)
except Exception as error:
    assert "not fitted" in str(error)
try:
    model.set_params(ridges=1.0)
except ValueError as error:
    print("ridges" in str(error))
"""


def test_without_scikit_learn() -> None:
    """It works by itself."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"
