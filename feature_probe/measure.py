"""measure: every relation at frozen weights, over a whole loader. The reference for the loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from feature_probe.capture.evaluation import (
    Forward,
    LossFunction,
    left_as_found,
    runner,
    to_device,
)
from feature_probe.capture.passes import InitialPass
from feature_probe.capture.shadow import eagerly, nonreentrant_checkpoints
from feature_probe.capture.sharding import unreduced
from feature_probe.errors import ConfigurationError, positive_integer
from feature_probe.layers.targets import Discovery, Selection, Target
from feature_probe.models import unwrap
from feature_probe.processes.ranks import Ranks
from feature_probe.processes.reduction import GroupChoice
from feature_probe.reports.assembly import Assembler
from feature_probe.reports.decay import WeightDecay
from feature_probe.reports.doctor import Doctor
from feature_probe.reports.intervals import Parts, check_batches
from feature_probe.reports.report import Report
from feature_probe.reports.structure_settings import Structure
from feature_probe.reports.structuring import Structuring
from feature_probe.sums.initial import Given, InitialWeights
from feature_probe.sums.initial_network import InitialNetwork
from feature_probe.sums.jacobian import JacobianSettings
from feature_probe.sums.ledger import Positions, Reduction
from feature_probe.sums.observer import JACOBIANS, Observer, ObserverSettings
from feature_probe.sums.stepping import parse_optimizers
from feature_probe.sums.window import Window
from feature_probe.theory.projection import MAX_DIM
from feature_probe.theory.relations import Relation, Sum, parse_powers, parse_relations

#: The sums that need no loss.
JACOBIAN_SUMS = frozenset[Sum](JACOBIANS)


def measure(
    model: nn.Module,
    loader: Iterable[Any],
    loss_fn: LossFunction | None = None,
    *,
    weight_decay: float | Mapping[str, float] | None = None,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    relations: Iterable[str] | str = ("fact", "bfact", "nfa", "enfa"),
    powers: Iterable[float] | float = (0.5, 1.0),
    include: Selection = None,
    exclude: Selection = None,
    output: Callable[[Any], Any] | None = None,
    forward: Forward | None = None,
    jacobian: Literal["exact", "random"] = "exact",
    num_probes: int = 1,
    positions: Positions = "expand",
    loss_reduction: Reduction = "mean",
    training_batch_size: int | None = None,
    eval_mode: bool = True,
    progress: bool = True,
    max_dim: int = MAX_DIM,
    max_outputs: int = 1024,
    seed: int = 0,
    step: int = 0,
    jackknife: int | None = None,
    population: int | None = None,
    initial: Report | None = None,
    initial_weights: Given = None,
    structure: bool | Structure = False,
    process_group: GroupChoice = "auto",
) -> Report:
    """Measure the relations at the model's weights as they stand, over a whole data set.

    The definitions, exactly: G, K and E are means over all examples of ``loader``, however it is
    split into batches (evaluation mode; a loss that is a mean or a sum of per-example losses). The
    model's gradients, training flags, buffers and the random state are as before afterwards.

    Cost: one forward and one backward pass over the data, and with jacobian="exact" one
    activation-only backward pass per output coordinate.

    Args:
        model: The module to measure; batches are moved to the device of its first parameter.
        loader: Batches, each ``(input, target)``; without a loss a bare input will do.
        loss_fn: ``loss_fn(output, target) -> scalar``. Not needed for nfa and bnfa.
        weight_decay: λ of the loss (λ/2)‖W‖² beside ``loss_fn``, one number or by layer name.
        optimizer: Read λ from its groups instead.
        relations: Names in :data:`feature_probe.RELATIONS`.
        powers: The powers s of AGOPˢ and eNFAˢ.
        include: Layers to measure, as in :class:`feature_probe.FeatureProbe`.
        exclude: Layers to leave out.
        output: Picks f, shape ``[n, ...]``, out of what the model (or ``forward``) returns; the
            loss still gets what the model returned.
        forward: ``(model, batch) -> (output, loss)`` for batches of any other shape, instead of
            ``loss_fn``. It must call ``model`` once; f is the output it returns; the loss may be
            None where none is needed.
        jacobian: "exact" or "random".
        num_probes: Random products per batch.
        positions: "expand" or "reduce", as in the probe.
        loss_reduction: "mean": ``loss_fn`` is a mean over the batch. "sum": it is a sum, and G is
            ``training_batch_size`` times the mean gradient, as the optimizer saw it.
        training_batch_size: B of training, needed with "sum" and only there.
        eval_mode: Measure in evaluation mode; False leaves the modes as they are.
        progress: Show a progress bar.
        max_dim: Layers with more output rows per group than this have K and E measured in a fixed
            random subspace of so many dimensions; their records say so.
        max_outputs: Most output coordinates that "exact" accepts.
        seed: Seed of the random signs.
        step: Step to write into the records.
        jackknife: In how many groups of batches to split the data for a 90 % interval of the
            cosines of nfa, enfa and their kin (8 or more), by a bias-corrected grouped jackknife;
            None: no intervals. It holds that many copies of the sums and scores every layer as
            often. FACT of a sample says little of FACT of all the data, and gets none.
        population: Examples in the data set that ``loader`` is a sample of, without replacement,
            which narrows the intervals; None: a sample of unlimited data.
        initial: What this function returned for this very network before training, on the same
            data and in the same way. A score that is also above the one there is called "aligned"
            at half the distance from chance that is asked for without. Another untrained network
            will not do: they differ among themselves by more than chance.
        initial_weights: W₀ for the centred relations: a state dict, a file of one, or the model as
            it was. "double_centered_nfa" and "ptk_centered_nfa" need all parameters and buffers,
            and a model that can be copied: the copy is run on every batch too.
        structure: True or a :class:`feature_probe.Structure`, as in
            :class:`feature_probe.FeatureProbe`.
        process_group: The processes that measure one data set together, each with a part of it as
            its ``loader``; as in :class:`feature_probe.FeatureProbe`. All get the same report. The
            parts may be uneven; with ``fully_shard``, all must have the same number of batches.
            All must call ``measure``: to measure on one rank alone give None.

    Returns:
        The report, with its matrices.

    Raises:
        ConfigurationError: for a bad argument, an empty loader, an ``initial`` of other layers or
            another way of measuring, a batch of another shape than
            ``(input, target)`` without ``forward``, or a model output that is no tensor without
            ``output``.
    """
    ranks = Ranks(model, process_group)
    model = unwrap(model)
    asked = parse_relations(relations)
    needs = frozenset(needs for relation in asked for needs in relation.sums)
    scale = _gradient_scale(loss_reduction, training_batch_size)
    run = runner(loss_fn, forward, loss_needed=not needs <= JACOBIAN_SUMS)
    discovery = Discovery(model, include, exclude)
    targets = discovery.targets
    settings = ObserverSettings(
        needs, JacobianSettings(jacobian, num_probes, max_outputs), output, positions,
        loss_reduction, max_dim, seed, (ranks.rank, ranks.count),
    )  # fmt: skip
    decay = WeightDecay(discovery, parse_optimizers(optimizer), weight_decay)
    observer = Observer(model, discovery, settings, _raise, in_training=False, inject_leaf=True)
    assembler = Assembler(
        model, discovery, observer, decay, asked, parse_powers(powers), Doctor(decay), scale,
        initial_weights=_initial_weights(model, asked, initial_weights),
        structuring=Structuring.of(structure, targets),
    )  # fmt: skip
    network = None
    if any(relation.needs_initial_network for relation in asked):
        network = InitialNetwork(model, initial_weights, include, exclude, inject_leaf=True)
    compared: dict[str, Any] = {
        "jacobian": jacobian,
        "positions": positions,
        "eval_mode": eval_mode,
    }
    if jacobian == "random":
        compared["num_probes"] = num_probes
    before = _initial_scores(initial, targets, compared)
    groups = [Window() for _ in range(_groups(jackknife, loader))]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with (
        left_as_found(model, eval_mode),
        eagerly(),
        nonreentrant_checkpoints(),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        observer.recorder.arm()
        try:
            for number, batch in enumerate(_with_progress(loader, progress and ranks.is_writer)):
                batch = to_device(batch, device)
                with _beside(network, run, batch) as also:
                    out, loss = run(model, batch)
                    observer.finish(out, also())
                gradients = _weight_gradients(observer, targets, loss, needs)
                group = groups[number % len(groups)]
                _add_batch(group, observer.take(), targets, gradients, loss_reduction)
        finally:
            observer.recorder.disarm()
    reduced = [ranks.reduce(group, targets, observer, step, in_training=False) for group in groups]
    parts = Parts.of([part.window for part in reduced], population, jacobian)
    window = parts.whole
    if window.examples == 0:
        raise ConfigurationError("nothing was measured: the loader gave no batch")
    described: dict[str, Any] = {
        "source": "measure",
        "jacobian": jacobian,
        "num_probes": num_probes,
        "positions": positions,
        "loss_reduction": loss_reduction,
        "eval_mode": eval_mode,
        **ranks.settings,
    }
    if jackknife is not None:
        parts.check()
        described |= {"jackknife": jackknife, "population": population}
    weights = {i: weight for i, weight in enumerate(reduced[-1].weights) if weight is not None}
    return assembler.report(
        window,
        step,
        described,
        keep=True,
        weights=weights,
        depths=reduced[-1].depths,
        initial=before,
        parts=None if jackknife is None else parts,
    )


def _initial_scores(
    initial: Report | None, targets: Sequence[Target], settings: Mapping[str, Any]
) -> dict[tuple[str, str], float]:
    """The cosines of a report of the untrained network, by layer and label."""
    if initial is None:
        return {}
    if not isinstance(initial, Report):
        raise ConfigurationError(
            "initial must be the report that measure() returned for the network before training, "
            f"got {type(initial).__name__}"
        )
    if not set(initial.layers) & {target.name for target in targets}:
        raise ConfigurationError(
            f"initial has none of this model's layers: it has {', '.join(initial.layers[:5])}"
        )
    for name, value in settings.items():
        if initial.settings.get(name) != value:
            raise ConfigurationError(
                f"initial was measured with {name}={initial.settings.get(name)!r}, this with "
                f"{value!r}: scores compare only if measured in the same way"
            )
    return {(r.layer, r.label): r.cosine for r in initial.records}


def _initial_weights(
    model: nn.Module, relations: Sequence[Relation], given: Given
) -> InitialWeights | None:
    """W₀, where a relation asks for it."""
    centered = [r for r in relations if r.needs_initial_weights or r.needs_initial_network]
    if not centered:
        return None
    if given is None:
        raise ConfigurationError(
            f"{centered[0].name} needs initial_weights=, the state dict from before training"
        )
    return InitialWeights(model, given)


@contextlib.contextmanager
def _beside(
    network: InitialNetwork | None,
    run: Callable[[nn.Module, Any], tuple[Any, Tensor | None]],
    batch: Any,
) -> Iterator[Callable[[], InitialPass | None]]:
    """A function that runs a batch on the initial network too, where there is one."""
    if network is None:
        yield lambda: None
    else:
        with network.beside(batch) as follow:
            yield lambda: follow(lambda module: run(module, batch)[0])


def _groups(jackknife: int | None, loader: Iterable[Any]) -> int:
    if jackknife is None:
        return 1
    positive_integer("jackknife", jackknife)
    if jackknife < 2:
        raise ConfigurationError("jackknife needs two groups or more, and 8 for its intervals")
    with contextlib.suppress(TypeError):  # a loader of iterable data does not know its length
        check_batches(jackknife, len(loader))  # type: ignore[arg-type]
    return jackknife


def _gradient_scale(reduction: str, training_batch_size: int | None) -> float:
    if reduction == "sum" and training_batch_size is None:
        raise ConfigurationError(
            "loss_reduction='sum' needs training_batch_size=: the gradient the optimizer saw is "
            "that many times the mean (for full-batch training the size of the data set)"
        )
    if reduction != "sum" and training_batch_size is not None:
        raise ConfigurationError("training_batch_size only acts with loss_reduction='sum'")
    if training_batch_size is not None and training_batch_size < 1:
        raise ConfigurationError(f"training_batch_size must be positive: {training_batch_size!r}")
    return float(training_batch_size or 1)


def _weight_gradients(
    observer: Observer, targets: Sequence[Target], loss: Tensor | None, needs: frozenset[Sum]
) -> dict[int, Tensor | None]:
    """Run the loss backward through the hooks; gradients of the weights that are parameters."""
    if loss is None or needs <= JACOBIAN_SUMS:
        return {}
    if loss.dim() != 0:
        raise ConfigurationError(
            f"the loss must be a scalar, got shape {tuple(loss.shape)}; reduce it by mean or sum"
        )
    if not loss.requires_grad:
        return {}
    own = {
        index: observer.recorder.gathered.standing_for(target.parameter)
        for index, target in enumerate(targets)
        if target.parameter is not None and observer.recorder.reader.uses_parameter(index)
    }
    # the edges make the layers' hooks fire where no parameter below them is asked for
    wanted: list[Any] = [*own.values(), *observer.edges]
    if not wanted:
        return {}
    with unreduced(observer.model):
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    return dict(zip(own, gradients, strict=False))


def _add_batch(
    window: Window,
    batch: Window,
    targets: Sequence[Target],
    gradients: Mapping[int, Tensor | None],
    reduction: Reduction,
) -> None:
    """Add a batch, its gradient weighted by its examples, so that any split adds up to the same."""
    weight = float(batch.examples) if reduction == "mean" else 1.0
    for index in range(len(targets)):
        moments = batch.layer(index)
        gradient = gradients.get(index)
        if gradient is not None:
            moments.add_gradient(gradient)
        if moments.gradient is not None:
            moments.gradient.mul_(weight)
        moments.gradient_weight = float(batch.examples)
    window.merge(batch)


def _raise(error: Exception, where: str) -> None:
    raise error


def _with_progress(loader: Iterable[Any], progress: bool) -> Iterator[Any]:
    bar: Iterator[Any] = iter(tqdm(loader, desc="measure", unit="batch", disable=not progress))
    return bar
