"""Picking f, the tensor whose Jacobian is meant, out of what a model returned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from feature_probe.errors import ConfigurationError


def select_output(output: Any, chooser: Callable[[Any], Any] | None) -> Tensor:
    """The tensor f ``[n, ...]`` in what a model returned.

    Raises:
        ConfigurationError: if there is no floating tensor with an example axis.
    """
    f = output
    if chooser is not None:
        try:
            f = chooser(output)
        except Exception as error:  # whatever the user's function raises
            raise ConfigurationError(
                f"output= raised {type(error).__name__}: {error}; the model returned a "
                f"{type(output).__name__}"
            ) from error
    if not isinstance(f, Tensor):
        raise ConfigurationError(_no_tensor(output, f, chooser is None))
    if f.dim() == 0:
        raise ConfigurationError(
            "the model's output is a scalar (a loss?); give output= to pick the tensor f of "
            "shape [n, ...] whose Jacobian is meant, e.g. output=lambda out: out[1]"
        )
    if not f.is_floating_point():
        raise ConfigurationError(f"the model's output has dtype {f.dtype}; f must be floating")
    return f


def _no_tensor(output: Any, chosen: Any, direct: bool) -> str:
    if not direct:
        return f"output= returned {type(chosen).__name__}; it must return the tensor f [n, ...]"
    if isinstance(output, Mapping):
        inside = f" with keys {', '.join(map(repr, output))}"
        example = "output=lambda out: out['logits']"
    elif isinstance(output, (tuple, list)):
        inside, example = f" of {len(output)}", "output=lambda out: out[0]"
    else:
        inside, example = "", "output=lambda out: out.logits"
    return (
        f"the model returned a {type(output).__name__}{inside}, not a tensor; give output= to pick "
        f"f, e.g. {example}"
    )
