"""Diagnosis: what is known of one layer beside its scores, so that these can be judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from feature_probe.reports.record import plain_data

#: Whether training has brought a layer to rest. "not applicable": it cannot come to rest in the
#: sense of FACT (no decay, frozen, scale-invariant).
State = Literal["at stationarity", "approaching", "far", "not applicable", "cannot tell"]
#: How the optimizer's weight decay acts; "given": λ was given and no optimizer.
DecayForm = Literal["none", "coupled", "decoupled", "unknown", "given"]
_NAN = float("nan")


@dataclass(frozen=True)
class Diagnosis:
    """One layer at one step. Numbers that are not known are NaN.

    Attributes:
        layer: Name.
        optimizer: Class of the optimizer that trains it; "" if none does.
        decay_form: How its weight decay acts: "coupled" (in the gradient: at rest G = −λW),
            "decoupled" (at rest U = −λW with the update U), "none", "unknown", or "given".
        weight_decay: λ.
        decay_age: Σ ηλ(1−δ)/(1−μ) for SGD, Σ ηλ for decoupled decay, over all steps since the run
            began: e to the minus this is what decay alone leaves of the initial weight.
        decay_age_note: Why the age is not known, "" if it is.
        window_age: The same over the steps of the window that this report is of.
        drift: ‖W_T − W_0‖/‖W_T‖ over the window.
        stationarity: ‖λW + G‖/‖λW‖, or U for G under decoupled decay: 0 at rest.
        noise: What minibatch noise alone adds to it, taking the window's steps as independent.
        decay_ratio: λ̂/λ = −Σ⟨W_t,G_t⟩/(λ Σ‖W_t‖²) over the window's steps.
        fluctuation: What minibatch noise takes from λ̂/λ at rest: their sum is 1 there, for SGD.
        norm_drift: Change of ln ‖W‖ per unit of decay age, over the latest unit of it: 0 at rest.
        norm_span: Decay age that this was measured over.
        scale_invariance: "none", "rows", "groups", "layer", "partly" or "unknown".
        invariance_statistic: About 1 or more for a weight that is not scale-invariant, below 10⁻³
            for one that is.
        invariance_note: In words.
        state: Whether training has brought the layer to rest.
        because: Why that is said, in words, with the numbers.
    """

    layer: str
    optimizer: str = ""
    decay_form: DecayForm = "unknown"
    weight_decay: float = _NAN
    decay_age: float = _NAN
    decay_age_note: str = ""
    window_age: float = _NAN
    drift: float = _NAN
    stationarity: float = _NAN
    noise: float = _NAN
    decay_ratio: float = _NAN
    fluctuation: float = _NAN
    norm_drift: float = _NAN
    norm_span: float = _NAN
    scale_invariance: str = "unknown"
    invariance_statistic: float = _NAN
    invariance_note: str = ""
    state: State = "cannot tell"
    because: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data; NaN becomes None, so that it is valid JSON."""
        return plain_data(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Diagnosis:
        """The way back from :meth:`to_dict`; None becomes NaN again."""
        back: dict[str, Any] = {
            name: _NAN if value is None else value for name, value in data.items()
        }
        return cls(**back)
