"""Whether a model's layers are a chain, each fed by the one before it alone, and how long it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge

from feature_probe.capture.passes import Call


def remaining_depths(
    output: Tensor, calls: Sequence[Call], edges: Sequence[GradientEdge]
) -> dict[int, int]:
    """L − l + 1 of every layer, if the layers are a chain: 1 for the last, L for the first.

    A chain is what deep linear networks are, with anything between the layers that has no matrix of
    its own: every way back from the output meets the layers one at a time, in one order, once each.

    Args:
        output: f, with its graph.
        calls: The forward pass's calls.
        edges: Where the gradient of each is read.

    Returns:
        By target; empty where the layers are no chain (residual connections, branches, reuse).
    """
    where: dict[Any, int] = {edge.node: call.index for call, edge in zip(calls, edges, strict=True)}
    if len(set(where.values())) < len(calls):
        return {}
    found: dict[int, int] = {}
    starts = [output.grad_fn]
    while met := _next_layers(starts, where):
        if len(met) > 1:
            return {}
        (node,) = met
        if where[node] in found:
            return {}
        found[where[node]] = len(found) + 1
        starts = [following for following, _ in node.next_functions]
    return found if len(found) == len(calls) else {}


def _next_layers(starts: Sequence[Any], where: Mapping[Any, int]) -> set[Any]:
    """The layers met first on the ways back from some nodes."""
    met: set[Any] = set()
    seen: set[Any] = set()
    open_nodes = [node for node in starts if node is not None]
    while open_nodes:
        node = open_nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in where:
            met.add(node)
            if len(met) > 1:
                break
            continue
        open_nodes += [following for following, _ in node.next_functions if following is not None]
    return met
