"""Random, untrained networks: none of their layers may be called aligned.

Small networks of every kind of networks.py and ten of timm's, each measured on few examples with
random probes and on many with exact Jacobians (timm's: with random probes). The small ones also
beside the report of another such network as ``initial``: that is not what it asks for, as untrained
networks differ among themselves by more than chance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from feature_probe import Record, measure
from verdict_lab.networks import ACTIVATIONS, NETWORKS, make_data

WIDTHS = (8, 16, 24, 48)
#: Small architectures and the side of the images they are shown.
TIMM = {
    "resnet10t": 64,
    "resnet18": 48,
    "mobilenetv3_small_050": 64,
    "efficientnet_lite0": 64,
    "convnext_atto": 64,
    "regnetx_002": 64,
    "vit_tiny_patch16_224": 224,
    "deit_tiny_patch16_224": 224,
    "mixer_s32_224": 224,
    "ghostnet_050": 64,
}
measured = partial(measure, relations=("nfa", "enfa"), progress=False)


@dataclass(frozen=True)
class Untrained:
    """One measurement of a network without training, alone or beside that of another."""

    name: str
    records: list[Record]
    beside_another: bool = False

    @property
    def judged(self) -> int:
        """Records that a verdict of alignment was possible for."""
        settled = ("trivial", "undefined", "not applicable")
        return sum(record.verdict not in settled for record in self.records)

    @property
    def alarms(self) -> list[str]:
        """The records that were called aligned."""
        return [
            f"{self.name}, {r.layer}, {r.label}: {r.because}"
            for r in self.records
            if r.verdict == "aligned"
        ]


def small_networks(count: int) -> Iterator[Untrained]:
    """Networks of all kinds, widths and activations in turn, each measured four times."""
    for number in range(count):
        kind = list(NETWORKS)[number % len(NETWORKS)]
        width = WIDTHS[number // len(NETWORKS) % len(WIDTHS)]
        activation = list(ACTIVATIONS)[number // 32 % len(ACTIVATIONS)]
        torch.manual_seed(number)
        network = NETWORKS[kind](width, ACTIVATIONS[activation])
        other = NETWORKS[kind](width, ACTIVATIONS[activation])
        for examples in (24, 512):
            loader = DataLoader(TensorDataset(*make_data(kind, examples, number)), batch_size=128)
            jacobian: Literal["random", "exact"] = "random" if examples == 24 else "exact"
            report = measured(network, loader, F.cross_entropy, jacobian=jacobian)
            name = f"{kind} of width {width}, {activation}, {examples} examples, {jacobian} K"
            yield Untrained(name, report.records)
            before = measured(other, loader, F.cross_entropy, jacobian=jacobian)
            report = measured(network, loader, F.cross_entropy, jacobian=jacobian, initial=before)
            yield Untrained(name, report.records, beside_another=True)


def timm_networks() -> Iterator[Untrained]:
    """timm's on a few random images, random probes."""
    for number, (name, side) in enumerate(TIMM.items()):
        torch.manual_seed(number)
        network = timm.create_model(name, num_classes=10)
        data = TensorDataset(torch.randn(12, 3, side, side), torch.randint(0, 10, (12,)))
        report = measured(
            network, DataLoader(data, batch_size=6), F.cross_entropy, jacobian="random"
        )
        yield Untrained(f"timm {name}", report.records)
