"""The alignment-reversing data set: inputs on which GᵀG and GᵀKG disagree at initialisation.

Beaglehole, Mitliagkas and Agarwala, "Gradient descent induces alignment between weights and the
pre-activation tangents", App. F: two sets of inputs with labels 1 and 0, the second built from the
inverse of the first one's Gram matrix, so that XᵀX has little where XᵀYX has much. What their text
leaves open is an argument here; see :func:`alignment_reversing_data`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from feature_probe.errors import ConfigurationError, positive_integer

__all__ = ["alignment_reversing_data"]

#: Added to all labels (App. F, step 5).
_LABEL_SHIFT = 1e-5


def alignment_reversing_data(
    examples: int,
    dimension: int,
    balance: float,
    *,
    generator: torch.Generator,
    common: float = 1.0,
    own: float = 0.5,
    noise: float = 0.01,
    scale: float = 1.0,
    floor: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Sizes and a balance to inputs X and labels y (C-NFA paper, App. F).

    X₁, γn rows with label 1, has rows of mean 0 and covariance Σ = common·11ᵀ + own·I; with
    X₁ᵀX₁ = U₁S₁U₁ᵀ and V₂ the left singular vectors of X̃₂, drawn as X₁ is, X₂ = V₂S₁⁻¹U₁ᵀ with
    label 0. Then noise·N(0, I) is added to X, and 10⁻⁵ to y.

    Three things the paper leaves open:

    * **The inverse.** For γn < d, X₁ᵀX₁ has d − γn singular values of zero. Here they are inverted
      to 0, the pseudo-inverse, so that X₂ is in the span of X₁; with ``floor`` singular values are
      raised to that share of the largest one first. Taken as printed S₁⁻¹ is made of rounding: two
      data sets that differ by 10⁻¹⁴ then have nothing in common.
    * **The rows.** X₂ has (1−γ)n rows, for as many singular vectors; where there are more, those of
      the largest singular values of X₁ᵀX₁ are taken, as an SVD lists them (γ > ½). So X₂ᵀX₂ is the
      squared inverse on the span of those alone.
    * **The scale.** As printed X₁ᵀX₁ is about γnΣ, and 11ᵀ is d times a projector: X₂ is then far
      below X₁, and the cosine near 1 at any balance. The paper's "(X₁ᵀX₁)² ≈ Σ²" wants
      ``scale`` n^(−½), and Σ a spike of the size of the rest wants ``common`` 1/d.

    Args:
        examples: n.
        dimension: d.
        balance: γ, the share of label 1; both sets must have a row.
        generator: Source of all randomness, on the CPU.
        common: Variance that all coordinates share; 1 as printed.
        own: ε₁, variance of each coordinate's own; the paper's 0.5.
        noise: ε₂, standard deviation of what is added at the end; the paper's 0.01.
        scale: Factor of X₁ and X̃₂.
        floor: Least singular value of X₁ᵀX₁, as a share of the largest; None: the pseudo-inverse.
        dtype: Of the result.

    Returns:
        X, ``[n, d]``, and y, ``[n]``, the rows of label 1 first.

    Raises:
        ConfigurationError: for a size that is no positive integer, a balance that leaves a set
            empty, or a variance, scale or floor out of range.
        torch.linalg.LinAlgError: if a decomposition does not converge.
    """
    positive_integer("examples", examples)
    positive_integer("dimension", dimension)
    first = round(balance * examples)
    second = examples - first
    if not 0 < first < examples:
        raise ConfigurationError(
            f"balance must leave both sets a row, got {balance!r} of {examples} examples"
        )
    for name, value in (("common", common), ("noise", noise)):
        if not value >= 0:
            raise ConfigurationError(f"{name} must not be negative, got {value!r}")
    for name, value in (("own", own), ("scale", scale)):
        if not value > 0:
            raise ConfigurationError(f"{name} must be positive, got {value!r}")
    if floor is not None and not 0 < floor <= 1:
        raise ConfigurationError(f"floor must be in (0, 1], got {floor!r}")

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def draw(rows: int) -> Tensor:
        shared, each = normal(rows, 1), normal(rows, dimension)
        return scale * (math.sqrt(common) * shared + math.sqrt(own) * each)

    labelled, other = draw(first), draw(second)
    inverse, directions = _inverted(labelled, floor)
    left = _left_singular_vectors(other)
    count = min(left.shape[1], len(inverse))
    reversing = left[:, :count] @ (inverse[:count, None] * directions[:count])
    inputs = torch.cat([labelled, reversing]) + noise * normal(examples, dimension)
    labels = torch.cat([torch.ones(first), torch.zeros(second)]).double() + _LABEL_SHIFT
    return inputs.to(dtype), labels.to(dtype)


def _left_singular_vectors(rows: Tensor) -> Tensor:
    """V₂, ``[rows, min(rows, d)]``, the largest singular values' first."""
    left: Tensor
    if rows.shape[0] > rows.shape[1]:
        left = torch.linalg.svd(rows, full_matrices=False).U
    else:
        left = torch.linalg.eigh(rows @ rows.T).eigenvectors.flip(1)  # half the cost of an SVD
    return left


def _inverted(rows: Tensor, floor: float | None) -> tuple[Tensor, Tensor]:
    """S⁻¹ and Uᵀ of X₁ᵀX₁ = USUᵀ, the largest S first: those above rounding, or all with a floor.

    From the SVD of X₁ itself, as the singular values of X₁ᵀX₁ are the squares of its own.
    """
    _, singular, directions = torch.linalg.svd(rows, full_matrices=floor is not None)
    if floor is None:
        smallest = max(rows.shape) * torch.finfo(rows.dtype).eps * singular[0]
        kept = singular > smallest
        return singular[kept].square().reciprocal(), directions[kept]
    squares = torch.zeros(len(directions), dtype=rows.dtype)
    squares[: len(singular)] = singular.square()
    return squares.clamp_min(floor * squares[0]).reciprocal(), directions
