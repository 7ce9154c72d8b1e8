"""Ranks: this process among those that make reports together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from feature_probe.capture.sharding import reshard
from feature_probe.errors import ConfigurationError
from feature_probe.layers.targets import Target
from feature_probe.models import unwrap
from feature_probe.processes.headers import Held
from feature_probe.processes.reduction import (
    GroupChoice,
    Part,
    Reduced,
    broadcast_numbers,
    reduce_window,
    resolve_group,
)
from feature_probe.sums.observer import Observer
from feature_probe.sums.window import Window
from feature_probe.theory.relations import Sum


class Ranks:
    """The process group of a probe, and this process's place in it.

    Args:
        model: The model as it was given, in its wrappers. Parameters that ``fully_shard`` left
            gathered are put back: they are not the ones that the optimizer holds.
        given: As in :func:`feature_probe.distributed.resolve_group`.

    Attributes:
        group: The group; None: this process alone.
        rank: This process's number in it.
        count: How many there are.

    Raises:
        ConfigurationError: as ``resolve_group``.
    """

    def __init__(self, model: nn.Module, given: GroupChoice) -> None:
        self.group = resolve_group(model, given)
        self.rank = 0 if self.group is None else dist.get_rank(self.group)
        self.count = 1 if self.group is None else dist.get_world_size(self.group)
        self._wrappers = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
        reshard(unwrap(model))

    @property
    def is_writer(self) -> bool:
        """Whether this process writes reports: the first one does, alone."""
        return self.rank == 0

    @property
    def settings(self) -> dict[str, int]:
        """What a report says about it."""
        return {} if self.group is None else {"processes": self.count}

    def of_the_first(self, numbers: Sequence[int]) -> Sequence[int]:
        """The numbers that the group's first process gives. Every rank must call it."""
        return numbers if self.group is None else broadcast_numbers(numbers, self.group)

    def reduce(
        self,
        window: Window,
        targets: Sequence[Target],
        observer: Observer,
        step: int,
        *,
        kept: Mapping[int, Tensor] | None = None,
        in_training: bool = True,
    ) -> Reduced:
        """Make one window of all ranks'. Every rank must call it.

        Args:
            window: This rank's sums, settled; must not be used afterwards.
            targets: The measured layers.
            observer: Knows their weights, which gradients are their parameters', and what this
                rank could not measure, so that no sum is reported that lacks a rank's part.
            step: The step of the report.
            kept: Weights to use in place of those as they stand now.
            in_training: Whether gradients that are no parameter's are of one rank's loss, of which
                training minimises the mean; False: sums over examples, which add up.

        Raises:
            ConfigurationError: within DDP's ``join()``, before anything is communicated.
            FeatureProbeError: on every rank alike, if the ranks do not belong together.
            Exception: what the process group raises where a rank does not answer in time.
        """
        if self.group is not None and any(ddp._join_config.enable for ddp in self._wrappers):
            raise ConfigurationError(
                "within DistributedDataParallel.join() some ranks stop early and would miss a "
                "report the others wait for; give process_group=None, and log_dir= on one rank, "
                "for a report of that rank's batches"
            )
        recorder = observer.recorder
        if self.group is not None:
            window.problems |= _problems(observer)
        parts = []
        for index, target in enumerate(targets):
            weight = recorder.reader.weights.get(index, target.parameter)
            weight = (kept or {}).get(index, weight)
            shared = in_training and recorder.reader.uses_parameter(index)
            local: Held = "mean" if in_training else "sum"
            depth = (observer.depths or {}).get(target.name)
            parts.append(Part(target.name, "shared" if shared else local, weight, depth))
        return reduce_window(window, parts, self.group, step)


def _problems(observer: Observer) -> dict[tuple[int, Sum], str]:
    """Everything that this rank cannot measure, also what is no matter of one window."""
    problems = dict(observer.problems)
    for index, reason in observer.recorder.reader.problems.items():
        kinds: tuple[Sum, ...] = ("jacobian", "loss", "jacobian_change")
        if not observer.recorder.reader.uses_parameter(index):
            kinds = ("gradient", *kinds)
        problems |= {(index, kind): reason for kind in kinds}
    return problems
