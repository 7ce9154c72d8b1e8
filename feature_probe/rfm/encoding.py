"""What users give, as tensors, and the way back: arrays and tensors, categories, class labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from feature_probe.errors import ConfigurationError

LabelEncoding = Literal["one_hot", "signed"]
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Place:
    """Where the computation happens, and in which form results go back.

    Attributes:
        device: Of tensors.
        dtype: float32 or float64.
        as_tensor: Whether the user gave tensors, and gets them.
    """

    device: torch.device
    dtype: torch.dtype
    as_tensor: bool

    @classmethod
    def of(cls, x: Any, device: Any, dtype: Any) -> Place:
        """Where the inputs are and in their dtype, if nothing else is asked for.

        Raises:
            ConfigurationError: for a dtype that is neither float32 nor float64.
        """
        is_tensor = isinstance(x, Tensor)
        found = device if device is not None else (x.device if is_tensor else "cpu")
        own = x.dtype if is_tensor else getattr(torch, str(getattr(x, "dtype", "")), torch.float64)
        if dtype is None:
            return cls(torch.device(found), torch.float32 if own is torch.float32 else
                       torch.float64, is_tensor)  # fmt: skip
        name = dtype.__name__ if isinstance(dtype, type) else str(dtype)  # np.float32: a type
        asked = dtype if isinstance(dtype, torch.dtype) else _DTYPES.get(name)
        if asked is None or asked not in _DTYPES.values():
            raise ConfigurationError(f"dtype must be float32 or float64, got {dtype!r}")
        return cls(torch.device(found), asked, is_tensor)

    def tensor(self, values: Any) -> Tensor:
        """As a tensor there."""
        if isinstance(values, Tensor):
            return values.detach().to(self.device, self.dtype)
        return torch.tensor(np.asarray(values, dtype=float), dtype=self.dtype, device=self.device)

    def give_back(self, values: Tensor, as_tensor: bool | None = None) -> Any:
        """As what the user gave."""
        wanted = self.as_tensor if as_tensor is None else as_tensor
        return values if wanted else values.cpu().numpy()


def plain(values: Any) -> np.ndarray[Any, Any]:
    """A tensor or anything like an array, as a NumPy array."""
    if isinstance(values, Tensor):
        return np.asarray(values.detach().cpu().numpy())
    return np.asarray(values)


@dataclass(frozen=True)
class Columns:
    """Which columns hold categories, and which.

    A category becomes a column of zeros and ones, in the place of its column's number; one that was
    not there in training is all zeros. Missing values are refused, in training and after it, and so
    are categories of another type than those in training.

    Attributes:
        categories: By column's index.
        count: Columns of the input.
    """

    categories: dict[int, np.ndarray[Any, Any]]
    count: int

    @classmethod
    def of(cls, x: np.ndarray[Any, Any], categorical: Sequence[int]) -> Columns:
        """Learn the categories.

        Raises:
            ConfigurationError: for a column that there is not, or with missing or mixed values.
        """
        count = x.shape[1]
        for column in categorical:
            if isinstance(column, bool) or not isinstance(column, (int, np.integer)):
                raise ConfigurationError(f"categorical must be column indices, got {column!r}")
            if not 0 <= column < count:
                raise ConfigurationError(
                    f"categorical column {column} is not among the {count} columns of X"
                )
        found = {}
        for column in categorical:
            values = x[:, column]
            if len(kinds := _kinds(values, column)) > 1:
                raise ConfigurationError(
                    f"categorical column {column} has values of several types: {', '.join(kinds)}"
                )
            found[int(column)] = np.unique(values)
        return cls(found, count)

    @property
    def names(self) -> list[str]:
        """Of the encoded columns: ``x3``, or ``x3=red``."""
        return [
            name
            for column in range(self.count)
            for name in (
                [f"x{column}={value}" for value in self.categories[column]]
                if column in self.categories
                else [f"x{column}"]
            )
        ]

    def __call__(self, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """``[n, count]`` of anything, to ``[n, d]`` of numbers.

        Raises:
            ConfigurationError: where a column that holds no categories is not numbers.
        """
        parts = []
        for column in range(self.count):
            if column in self.categories:
                known = self.categories[column]
                if _kinds(x[:, column], column) != _kinds(known, column):
                    raise ConfigurationError(
                        f"categorical column {column} has values of another type than in training, "
                        f"such as {x[0, column]!r} for {known[0]!r}"
                    )
                parts.append(x[:, column, None] == known)
            else:
                try:
                    parts.append(x[:, column, None].astype(float))
                except (TypeError, ValueError) as error:
                    raise ConfigurationError(
                        f"column {column} is not numbers ({error}); name it in categorical="
                    ) from None
        return np.concatenate(parts, axis=1).astype(float)


def _kinds(values: np.ndarray[Any, Any], column: int) -> list[str]:
    """What the values of a categorical column are: numbers or names of other types.

    Raises:
        ConfigurationError: where a value is missing: None, NaN or pandas' NA.
    """
    kinds = set()
    for value in values.tolist():
        absent = value is None or (isinstance(value, float) and math.isnan(value))
        if absent or type(value).__name__ in ("NAType", "NaTType"):
            raise ConfigurationError(
                f"categorical column {column} has missing values: give them a category of their own"
            )
        if isinstance(value, (bool, int, float, np.number, np.bool_)):
            kinds.add("number")
        else:
            kinds.add("str" if isinstance(value, str) else type(value).__name__)
    return sorted(kinds)


def encoded_labels(
    labels: np.ndarray[Any, Any], classes: np.ndarray[Any, Any], encoding: LabelEncoding
) -> np.ndarray[Any, Any]:
    """One column a class, ``[n, c]``: 1 for the own class, 0 ("one_hot") or −1 ("signed") else."""
    own = labels[:, None] == classes
    return np.where(own, 1.0, 0.0 if encoding == "one_hot" else -1.0)
