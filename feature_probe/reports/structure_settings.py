"""What structural quantities are asked for: powers, reference matrices, depths; checked early."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from feature_probe.errors import ConfigurationError, positive_integer
from feature_probe.layers.targets import Target
from feature_probe.theory.factored import Factored
from feature_probe.theory.relations import parse_powers
from feature_probe.theory.subspaces import Subspace, leading_subspace, symmetric_blocks

#: 1/32 to 4, four to an octave: 1, 1/2 and 1/4 are among them.
DEFAULT_POWERS = tuple(2.0 ** (quarter / 4) for quarter in range(-20, 9))
#: Eigenvalues of a reference up to this, in units of its largest, do not count in its rank.
_RANK_TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class Structure:
    """What ``FeatureProbe(structure=...)`` and ``measure(structure=...)`` shall find out.

    ``structure=True`` stands for ``Structure()``.

    Attributes:
        powers: The s at which C(s) is given, for every asked relation that has a power.
        eigenvalues: How many of each spectrum are kept.
        references: By layer name a matrix that WᵀW and AGOP are compared with, such as
            :func:`feature_probe.egop` of the target function for the first layer: symmetric,
            ``[d_in, d_in]``, or ``[groups, d_in, d_in]`` for a grouped layer.
        rank: Dimension of the leading eigenspaces compared, one number or by layer name; None: the
            rank of the reference, its eigenvalues above 10⁻⁶ of the largest.
        depths: L − l + 1 by layer name, for networks that are no chain all through, or that end in
            something that shall not count: 1 for the last layer. None: as found in the first pass.

    Raises:
        ConfigurationError: for a bad argument; what concerns the model's layers is checked by
            whoever is given this.
    """

    powers: Sequence[float] = DEFAULT_POWERS
    eigenvalues: int = 64
    references: Mapping[str, Any] = field(default_factory=dict)
    rank: int | Mapping[str, int] | None = None
    depths: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "powers", tuple(sorted(parse_powers(self.powers))))
        positive_integer("eigenvalues", self.eigenvalues)
        if not isinstance(self.references, Mapping):
            raise ConfigurationError(
                f"references must map layer names to matrices, got {type(self.references).__name__}"
            )
        if not self.references and self.rank is not None:
            raise ConfigurationError("rank is that of references, and there are none")
        ranks = (
            self.rank
            if isinstance(self.rank, Mapping)
            else {"": 1 if self.rank is None else self.rank}
        )
        for layer, rank in {**ranks, **(self.depths or {})}.items():
            positive_integer(f"the rank or depth of {layer!r}" if layer else "rank", rank)
        depths = list((self.depths or {}).values())
        if len(set(depths)) < len(depths):
            raise ConfigurationError(f"depths must all be different, got {depths}")


@dataclass(frozen=True)
class Reference:
    """A reference matrix, decomposed once.

    Attributes:
        matrix: As thin factors.
        space: Its leading eigenspace.
        dimension: d over all blocks.
    """

    matrix: Factored
    space: Subspace
    dimension: int


def parse_structure(
    structure: bool | Structure, targets: Sequence[Target]
) -> tuple[Structure, dict[str, Reference]] | None:
    """Check what was asked for against the layers there are.

    Returns:
        What is asked for and its references by layer; None if nothing is.

    Raises:
        ConfigurationError: for another type, and for layers that are not measured, a reference
            that is not symmetric or of another shape, or a rank that says nothing.
    """
    if structure is False:
        return None
    asked = Structure() if structure is True else structure
    if not isinstance(asked, Structure):
        raise ConfigurationError(
            f"structure must be True, False or a Structure(...), got {type(asked).__name__}"
        )
    known = {target.name: target for target in targets}
    ranks = asked.rank if isinstance(asked.rank, Mapping) else {}
    for what, names in (
        ("references", asked.references),
        ("rank", ranks),
        ("depths", asked.depths or {}),
    ):
        for name in names:
            if name not in known:
                raise ConfigurationError(
                    f"{what} names {name!r}, which is no measured layer: {', '.join(known)}"
                )
    for name in ranks:
        if name not in asked.references:
            raise ConfigurationError(f"rank names {name!r}, which has no reference")
    references = {
        name: _reference(
            known[name],
            matrix,
            ranks.get(name) if isinstance(asked.rank, Mapping) else asked.rank,
        )
        for name, matrix in asked.references.items()
    }
    return asked, references


def _reference(target: Target, given: Any, rank: int | None) -> Reference:
    name = f"the reference of {target.name!r}"
    try:
        matrix = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"{name} must be a matrix, got {given!r}") from error
    blocks = symmetric_blocks(matrix, name)
    wanted = (target.groups, target.d_in, target.d_in)
    if tuple(blocks.shape) != wanted:
        shown = list(wanted if target.groups > 1 else wanted[1:])
        raise ConfigurationError(f"{name} must be {shown}, got {list(matrix.shape)}")
    values, vectors = torch.linalg.eigh(blocks)
    rows, dimension = vectors.mT, target.groups * target.d_in
    top = float(values.abs().max())
    if top == 0 or float(values.max()) <= 0:
        raise ConfigurationError(f"{name} has no positive eigenvalue")
    if rank is None:
        rank = int((values > _RANK_TOLERANCE * top).sum())
        if rank == dimension:
            raise ConfigurationError(
                f"{name} has full rank, and whole spaces always overlap: give rank="
            )
    if rank >= dimension:
        raise ConfigurationError(
            f"rank {rank} of {name} must be below {dimension}: whole spaces always overlap"
        )
    space, reason = leading_subspace(values, rows, rank)
    if space is None:
        raise ConfigurationError(f"{name} has {reason}; give another rank=")
    # eigenvectors without weight do not count: an EGOP of low rank stays thin
    kept = (values.abs() > torch.finfo(values.dtype).eps * top).any(0)
    rows, values = rows[:, kept], values[:, kept]
    return Reference(Factored(values[..., None] * rows, rows), space, dimension)
