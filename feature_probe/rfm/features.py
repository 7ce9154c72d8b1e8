"""Feature matrices of kernel machines: FACT and AGOP from dual weights, and what W becomes of them.

f(x) = Σ_j k(Wx, Wx_j) α_j with α = (K + nλI)⁻¹y is the first layer W of a machine on u = Wx. With
g_i = Σ_j (α_jᵀα_i) ∂k(u, u_j)/∂u at u_i and J_i = ∂f/∂u at u_i,

    FACT = Wᵀ T,  T = Σ_i g_i x_iᵀ                       (FACT paper, Lemma F.1: no λ is left in it)
    AGOP = Wᵀ K W,  K = (1/n) Σ_i Σ_c J_ic J_icᵀ         (NFA-RFM update)

W is kept symmetric; where features are only weighed (diagonal M), W, T and K are vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from feature_probe.errors import FeatureProbeError
from feature_probe.rfm.kernels import Kernel

Rule = Literal["fact", "fact_inner_product", "nfa", "none"]
RULES: tuple[Rule, ...] = ("fact", "fact_inner_product", "nfa", "none")
Rescaling = Literal["trace", "max"]
#: Arrays of a block's size that are there at once while gradients are summed.
_ARRAYS = 6
#: Bytes beyond which larger blocks are no faster.
_LARGEST = 2**28
_LEAST_ROWS = 16


@dataclass(frozen=True)
class FeatureMap:
    """x ↦ W(x − origin).

    Attributes:
        root: W, symmetric and positive semi-definite: ``[d, d]``, or its diagonal ``[d]``.
        origin: What is taken off points before, ``[d]``: less rounding where the kernel is one of
            distances; None: nothing.
    """

    root: Tensor
    origin: Tensor | None = None

    @classmethod
    def identity(
        cls, inputs: int, diagonal: bool, like: Tensor, origin: Tensor | None = None
    ) -> FeatureMap:
        """W = I, in the dtype and on the device of ``like``."""
        ones = torch.ones(inputs, dtype=like.dtype, device=like.device)
        return cls(ones if diagonal else torch.diag(ones), origin)

    @property
    def diagonal(self) -> bool:
        """Whether features are only weighed."""
        return self.root.dim() == 1

    @property
    def matrix(self) -> Tensor:
        """M = WᵀW: ``[d, d]`` or ``[d]``."""
        return self.root.square() if self.diagonal else self.root @ self.root

    def __call__(self, x: Tensor) -> Tensor:
        """W(x − origin) of each row: ``[n, d]`` to ``[n, d]``."""
        shifted = x if self.origin is None else x - self.origin
        return shifted * self.root if self.diagonal else shifted @ self.root


@dataclass(frozen=True)
class FeatureSums:
    """The sums behind FACT and AGOP, in coordinates of u = Wx.

    Attributes:
        slope: T, None if not asked for.
        jacobian: K, None if not asked for.
    """

    slope: Tensor | None
    jacobian: Tensor | None

    def fact(self, features: FeatureMap) -> Tensor:
        """FACT: ``[d, d]`` or ``[d]``."""
        slope = _present(self.slope)
        return features.root * slope if features.diagonal else features.root @ slope

    def agop(self, features: FeatureMap) -> Tensor:
        """AGOP: ``[d, d]`` or ``[d]``."""
        jacobian = _present(self.jacobian)
        if features.diagonal:
            return features.matrix * jacobian
        return features.root @ jacobian @ features.root


def blocks(rows: int, columns: int, dtype: torch.dtype, memory: int) -> Iterator[slice]:
    """Slices of the rows of a matrix, such that a few arrays of a slice's size fit in memory.

    Args:
        rows: Of the matrix.
        columns: Of the matrix.
        dtype: Of its entries.
        memory: Bytes.
    """
    at_once = max(_LEAST_ROWS, min(memory, _LARGEST) // (_ARRAYS * columns * dtype.itemsize))
    return (slice(start, start + at_once) for start in range(0, rows, at_once))


def feature_sums(
    kernel: Kernel,
    features: FeatureMap,
    x: Tensor,
    dual: Tensor,
    *,
    fact: bool = True,
    agop: bool = True,
    memory: int = 2**30,
) -> FeatureSums:
    """T and K of a kernel machine at its own training points, a block of points at a time.

    Args:
        kernel: k.
        features: W.
        x: Training points, ``[n, d]``.
        dual: α = (K + nλI)⁻¹y, ``[n, c]``.
        fact: Whether T is wanted: n²d operations.
        agop: Whether K is wanted: n²dc operations.
        memory: Bytes that a block's arrays may take.
    """
    if not (fact or agop):
        return FeatureSums(None, None)
    count, inputs = x.shape
    u = features(x)
    shape = (inputs,) if features.diagonal else (inputs, inputs)
    slope = x.new_zeros(shape) if fact else None
    jacobian = x.new_zeros(shape) if agop else None
    # the gradients of all outputs at a point are c·d numbers more
    for rows in blocks(count, count + inputs * dual.shape[1], x.dtype, memory):
        pairs = kernel.pairs(u[rows], u)
        if slope is not None:
            gradients = pairs.weighted(dual[rows] @ dual.T)
            slope += _moment(gradients, x[rows], features.diagonal)
        if jacobian is not None:
            stacked = pairs.stacked(dual).flatten(0, 1)
            jacobian += _moment(stacked, stacked, features.diagonal) / count
    return FeatureSums(slope, jacobian)


def _moment(left: Tensor, right: Tensor, diagonal: bool) -> Tensor:
    return (left * right).sum(0) if diagonal else left.T @ right


def next_features(
    rule: Rule,
    features: FeatureMap,
    sums: FeatureSums,
    *,
    power: float = 1.0,
    geometric_averaging: bool = False,
    rescaling: Rescaling | None = None,
) -> FeatureMap:
    """W of the next iteration (FACT paper, §4 and §5), the algebra in float64.

    Args:
        rule: "nfa": W ← AGOP^{s/2}. "fact": W ← (FACT·FACTᵀ)^{1/4}, or with geometric averaging
            (FACT·M·M·FACTᵀ)^{1/8}. "fact_inner_product": M ← (FACT·M)^{1/2}, of kernels of the
            inner product whose k' is a positive definite kernel. "none": W stays.
        features: W.
        sums: T or K at it.
        power: s > 0 of "nfa".
        geometric_averaging: See "fact".
        rescaling: "trace": M is divided by tr(M)/d; "max": by its largest entry; None: by nothing,
            as in the paper.

    Raises:
        FeatureProbeError: where FACT·M is not positive semi-definite and the rule needs it, or
            where a matrix is not finite.
    """
    root = features.root.double()
    wide = FeatureMap(root)
    if rule == "none":
        return features
    if rule == "nfa":
        agop = FeatureSums(None, _present(sums.jacobian).double()).agop(wide)
        found = _symmetric_power(_finite(agop, "AGOP"), power / 2)
    else:
        fact = FeatureSums(_present(sums.slope).double(), None).fact(wide)
        averaged = rule == "fact_inner_product" or geometric_averaging
        product = _finite(_times(fact, wide.matrix) if averaged else fact, "FACT")
        if rule == "fact_inner_product":
            found = _symmetric_power(_semi_definite(product), 0.25)
        else:
            found = _left_power(product, 0.25 if averaged else 0.5)
    return FeatureMap(_rescaled(found, rescaling).to(features.root.dtype), features.origin)


def _times(left: Tensor, right: Tensor) -> Tensor:
    return left * right if left.dim() == 1 else left @ right


def _left_power(matrix: Tensor, power: float) -> Tensor:
    """(A·Aᵀ)^{power/2}, by singular values of A, which A·Aᵀ would square."""
    if matrix.dim() == 1:
        return matrix.abs() ** power
    left, values, _ = torch.linalg.svd(matrix)
    return _symmetric((left * values**power) @ left.T)


def _symmetric_power(matrix: Tensor, power: float) -> Tensor:
    """A^power of a positive semi-definite matrix; what is below 0 is rounding."""
    if matrix.dim() == 1:
        return matrix.clamp(min=0) ** power
    values, vectors = torch.linalg.eigh(_symmetric(matrix))
    return _symmetric((vectors * values.clamp(min=0) ** power) @ vectors.T)


def _semi_definite(product: Tensor) -> Tensor:
    """FACT·M, if it is what Proposition 5.1 says of it."""
    values = product if product.dim() == 1 else torch.linalg.eigvalsh(_symmetric(product))
    skew = 0.0 if product.dim() == 1 else float((product - product.T).norm())
    if float(values.min()) < -1e-6 * float(values.max()) or skew > 1e-4 * float(product.norm()):
        raise FeatureProbeError(
            "FACT·M is not symmetric and positive semi-definite, so that (FACT·M)^{1/2} is not "
            "defined: the kernel's k' is no positive definite kernel (Proposition 5.1); take "
            'update="fact" with geometric_averaging=True'
        )
    return product


def _rescaled(root: Tensor, rescaling: Rescaling | None) -> Tensor:
    if rescaling is None:
        return root
    matrix = FeatureMap(root).matrix
    diagonal = matrix if matrix.dim() == 1 else matrix.diagonal()
    size = diagonal.mean() if rescaling == "trace" else matrix.abs().max()
    return root if float(size) == 0 else root / size.sqrt()


def _finite(matrix: Tensor, name: str) -> Tensor:
    if not bool(matrix.isfinite().all()):
        raise FeatureProbeError(f"{name} is not finite: the machine's predictions overflow")
    return matrix


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def _present(matrix: Tensor | None) -> Tensor:
    if matrix is None:
        raise FeatureProbeError(
            "this update does not form that matrix here, and the last iteration forms none: fit "
            "with history=True to have FACT and AGOP at every iteration"
        )
    return matrix
