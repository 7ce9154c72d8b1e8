"""Cotangents: which vector-Jacobian products of the model's output make up K.

K = (1/n) Σ_i Σ_p J_ipᵀJ_ip needs products vᵀJ of the output f with respect to the layers'
pre-activations. Both kinds draw an independent random sign per example, so that cross terms between
examples that interact (batch norm in training mode) vanish in expectation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from feature_probe.errors import ConfigurationError, positive_integer


@dataclass(frozen=True)
class JacobianSettings:
    """How K is formed.

    Attributes:
        kind: "exact": one product per output coordinate; "random": products with independent ±1
            per example and coordinate, unbiased for K.
        num_probes: Random products a forward pass; ignored by "exact", which is refused with it.
        max_outputs: Most output coordinates c that "exact" accepts.
    """

    kind: Literal["exact", "random"] = "random"
    num_probes: int = 1
    max_outputs: int = 1024

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.kind not in ("exact", "random"):
            raise ConfigurationError(f"jacobian must be 'exact' or 'random', got {self.kind!r}")
        for name in ("num_probes", "max_outputs"):
            positive_integer(name, getattr(self, name))
        if self.kind == "exact" and self.num_probes != 1:
            raise ConfigurationError(
                f"num_probes={self.num_probes} only acts with jacobian='random'; 'exact' uses one "
                "product per output coordinate"
            )

    def check(self, output: Tensor) -> None:
        """Refuse an exact Jacobian of too many coordinates.

        Raises:
            ConfigurationError: if c, the entries of f for one example, exceeds ``max_outputs``.
        """
        outputs = math.prod(output.shape[1:])
        if self.kind == "exact" and outputs > self.max_outputs:
            raise ConfigurationError(
                f"jacobian='exact' needs one backward pass per output coordinate and the model has "
                f"{outputs} (output shape {tuple(output.shape)}), more than max_outputs="
                f"{self.max_outputs}; use jacobian='random', or raise max_outputs"
            )

    def products(self, output: Tensor) -> int:
        """Vector-Jacobian products a forward pass."""
        return math.prod(output.shape[1:]) if self.kind == "exact" else self.num_probes


def cotangents(
    output: Tensor, settings: JacobianSettings, generator: torch.Generator
) -> Iterator[tuple[Tensor, float]]:
    """The vectors v of one forward pass, each with the factor its product is scaled by.

    Args:
        output: f, shape ``[n, ...]``.
        settings: Exact or random.
        generator: The probe's own, on the output's device; the user's random state is not used.

    Yields:
        v with the shape of f, and the scale such that K·n = Σ_v scale² Σ (vᵀJ)ᵀ(vᵀJ).
    """
    if settings.kind == "random":
        for _ in range(settings.num_probes):
            yield random_signs(output.shape, output, generator), settings.num_probes**-0.5
        return
    flat = output.reshape(output.shape[0], -1)
    for coordinate in range(flat.shape[1]):
        v = torch.zeros(flat.shape, dtype=output.dtype, device=output.device)
        v[:, coordinate] = random_signs(flat.shape[:1], output, generator)
        yield v.reshape(output.shape), 1.0


def random_signs(shape: torch.Size, like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent ±1, in the dtype and on the device of ``like``."""
    bits = torch.randint(0, 2, shape, generator=generator, device=like.device)
    return (2 * bits - 1).to(like.dtype)


def vector_jacobian_products(
    output: Tensor, edges: Sequence[GradientEdge], v: Tensor
) -> Sequence[Tensor | None]:
    """vᵀ∂f/∂z for each recorded edge z; None where f does not depend on it.

    The graph is kept for the user's own backward pass. No parameter gradient is computed.
    """
    return torch.autograd.grad(
        output, edges, grad_outputs=v, retain_graph=True, allow_unused=True, create_graph=False
    )
