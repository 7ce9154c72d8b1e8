"""The words for relations and scores that every chart, picture and table shares."""

from __future__ import annotations

from collections.abc import Mapping

from feature_probe.reports.record import Record
from feature_probe.theory.relations import RELATIONS, Basis, Relation

#: What each relation predicts, in ASCII for pictures; the power is appended.
PREDICTIONS: Mapping[str, str] = {
    "fact": "FACT",
    "fact_sym": "sqrt(FACT FACT^T)",
    "bfact": "bFACT",
    "bfact_sym": "sqrt(bFACT bFACT^T)",
    "update_fact": "update FACT",
    "update_bfact": "update bFACT",
    "nfa": "AGOP",
    "enfa": "eNFA",
    "bnfa": "bAGOP",
    "benfa": "beNFA",
    "init_centered_nfa": "(Wc^T K Wc)",
    "init_centered_enfa": "(Wc^T E Wc)",
    "double_centered_nfa": "(Wc^T Kc Wc)",
    "ptk_centered_nfa": "(W0^T Kc W0)",
    "alignment_speed": "(G^T K G)",
    "update_alignment_speed": "(dW^T K dW)",
}
#: What stands in the place of W, in ASCII.
BASES: Mapping[Basis, str] = {
    "weight": "W",
    "change": "Wc",
    "initial": "W0",
    "gradient": "G",
    "motion": "dW",
}
#: What each score is called in prose.
SCORE_NAMES: Mapping[str, str] = {
    "pearson": "Pearson's r",
    "cosine": "cosine",
    "trace_free_cosine": "trace-free cosine",
}


def gram_name(relation: Relation) -> str:
    """The weight's side of the comparison, in ASCII."""
    name = BASES[relation.basis]
    return f"{name}^T {name}" if relation.side == "forward" else f"{name} {name}^T"


def basis_meaning(relation: Relation) -> str:
    """What stands in the place of W, where that is not W, to follow the name of the matrix."""
    return {
        "weight": "",
        "change": ", Wc = W - W0",
        "initial": ", W0 = W before training",
        "gradient": ", G = dL/dW",
        "motion": ", dW = motion of the window",
    }[relation.basis]


def question(record: Record) -> str:
    """What the record's number answers, e.g. "nfa^0.5: do W^T W and AGOP^0.5 agree?"."""
    relation = RELATIONS[record.relation]
    power = "" if record.power is None else f"^{record.power:g}"
    prediction = PREDICTIONS[record.relation] + power
    return f"{record.label}: do {gram_name(relation)} and {prediction} agree?"


def chance_meaning(relation: Relation) -> str:
    """What ``Record.level_by_chance`` stands for, in words."""
    if relation.has_power and relation.side == "forward":
        weight = "W-W0" if relation.basis == "change" else BASES[relation.basis]
        return f"the same {weight} with random eigenvectors of K or E"
    return "a random rotation of one of the two"


def layer_name(layer: str) -> str:
    """The layer's name for readers; the model itself has none."""
    return layer or "(model)"
