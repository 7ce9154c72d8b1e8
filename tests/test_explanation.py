"""Explanations: three sentences that say what the verdicts say, and what to do about the rest."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from typing import Any, get_args

import pytest

from feature_probe import Coverage, NotMeasuredError, Record, Report
from feature_probe.reports.causes import FINDINGS
from feature_probe.reports.diagnosis import DecayForm, Diagnosis, State
from feature_probe.reports.explanation import explain, sentences
from feature_probe.reports.record import VERDICTS
from feature_probe.theory.relations import RELATIONS

NAN = math.nan
#: The end of a sentence in running text: a mark with a blank or nothing behind it.
END = re.compile(r"[.!?…](?=\s|$)")
REST = "gradient and decay balance: ‖λW + G‖ is 0.01 of ‖λW‖"
INVARIANT = (
    "each of its 8 rows is scale-invariant (⟨w, ∂L/∂w⟩ = 0 on every batch, as before BatchNorm or "
    "under weight standardisation): the gradient cannot balance weight decay, so FACT cannot hold"
)
DECOUPLED = (
    "decoupled weight decay (AdamW): at rest the update, not the gradient, balances the decay, so "
    "that FACT in its gradient form need not hold; read update_fact"
)
TRIVIAL = (
    "trivial: K is a multiple of the identity (last linear layer), so the score is a property of "
    "the weight alone"
)


def record(relation: str, verdict: str, cosine: float = 0.5, **changes: Any) -> Record:
    """A record of layer fc with round numbers."""
    kind = RELATIONS[relation]
    values: dict[str, Any] = {
        "layer": "fc", "relation": relation, "power": 0.5 if kind.has_power else None,
        "step": 100, "pearson": cosine, "cosine": cosine, "trace_free_cosine": cosine,
        "chance_cosine": 0.03, "shared_weight_cosine": 0.78 if kind.has_power else NAN,
        "residual": NAN, "scale": NAN, "weight_decay": 0.001, "stationarity": NAN,
        "decay_ratio": NAN, "cosine_low": NAN, "cosine_high": NAN, "premise": "",
        "n_examples": 640, "n_rows": 640, "n_kept": None, "status": "ok", "verdict": verdict,
    }  # fmt: skip
    return Record(**(values | changes))


def report(
    records: Sequence[Record], diagnosis: Diagnosis | None = None, step: int = 100, **settings: Any
) -> Report:
    """A report of a window of 20 steps, unless told otherwise."""
    given = {"source": "loop", "window": 20, "jacobian": "random"} | settings
    diagnoses = [] if diagnosis is None else [diagnosis]
    return Report(step, list(records), Coverage(()), given, diagnoses)


def told(made: Report) -> tuple[str, str, str]:
    """The sentences of fc, checked to be three and readable."""
    parts = sentences(made, "fc")
    assert explain(made, "fc") == " ".join(parts) == made.explain("fc")
    for part in parts:
        assert part[-1] == "."
        assert len(END.findall(part)) == 1, part
        assert part[0].isupper(), part
        assert len(part.split()) <= 90, part
        assert not re.search(r"\b(nan|NaN|None|inf)\b", part), part
        assert not set("λ‖ᵀ∝\n") & set(part), part
    return parts


def test_a_converged_layer() -> None:
    """What holds stands with numbers, age and chance; nothing is open, nothing to do."""
    rest = Diagnosis("fc", "SGD", "coupled", 0.001, 5.2, state="at stationarity", because=REST)
    made = report(
        [
            record("fact", "holds", 0.991, form="snapshot"),
            record("bfact", "holds", 0.9882, form="snapshot", chance_cosine=0.081),
            record("nfa", "aligned", 0.95, fitted_power=0.48),
        ],
        rest,
    )
    holds, left_open, advice = told(made)
    assert holds == (
        "In layer fc, fact (cosine 0.991, by chance 0.03) and bfact (cosine 0.988, by chance 0.08) "
        "hold at decay age 5.2 (weight decay alone would have left 0.6 % of the initial weight): "
        "training has come to rest, and the weight is what gradient and weight decay in balance "
        "make it; nfa^0.5 (cosine 0.950, by chance 0.78, best power 0.48) is aligned: the weight "
        "has learned the directions to which the output reacts most."
    )
    assert left_open == "Nothing is left open."
    assert advice == (
        "Nothing needs to be done; measure(jackknife=8) would add an interval to the scores."
    )


def test_with_intervals_nothing_is_advised() -> None:
    """An interval is given with its score, and not advised a second time."""
    found = record("nfa", "aligned", 0.95, cosine_low=0.93, cosine_high=0.97)
    holds, left_open, advice = told(report([found], source="measure", jacobian="exact"))
    assert "nfa^0.5 (cosine 0.950, 90 % interval 0.93 to 0.97, by chance 0.78)" in holds
    assert left_open == "Nothing is left open."
    assert advice == "Nothing needs to be done."


def test_a_windowed_fact_is_not_that_of_all_the_data() -> None:
    """A FACT of a training window holds with a reserve, and measure() is the way out."""
    _, left_open, advice = told(report([record("fact", "holds", 0.99, form="window")]))
    assert "fact would differ on all the data at once is open" in left_open
    assert "20 steps of training" in left_open
    assert "measure() on all the data" in advice
    nearing = told(report([record("fact", "approaching", 0.9, form="window")]))[1]
    assert nearing == "Nothing is left open."


@pytest.mark.parametrize(
    ("age", "window_age", "step", "steps"),
    [
        (0.5, NAN, 100, "about 500 more steps at the present rate."),
        (0.5, 0.02, 100, "about 2,500 more steps at the present rate."),
        (0.5, 0.0001, 100, "about 500,000 more steps at the present rate (sooner with a larger"),
        (1.0, NAN, 4321, "about 8,600 more steps at the present rate."),
        (0.5, NAN, 0, "until the decay age is about 3."),
        (0.0, 0.0, 100, "until the decay age is about 3."),
        (NAN, NAN, 100, "until the decay age is about 3 (learning rate × weight decay, over 1 −"),
    ],
)
def test_an_early_layer(age: float, window_age: float, step: int, steps: str) -> None:
    """The steps still to go follow from the window's rate, else from the run's, where known."""
    early = Diagnosis(
        "fc", "SGD", "coupled", 0.001, age, window_age=window_age, state="far", stationarity=0.9
    )
    made = report([record("fact", "not yet", 0.2), record("bfact", "not yet", 0.2)], early, step)
    holds, left_open, advice = told(made)
    assert holds == "In layer fc, nothing can be said to hold."
    assert "fact and bfact do not hold yet" in left_open
    assert ("of the 3 or so that it takes" in left_open) == (age < 3)
    assert steps in advice


def test_the_decay_age_is_said_in_percent() -> None:
    """e to the minus the age, rounded: 61 % at 0.5."""
    early = Diagnosis("fc", decay_age=0.5, state="far")
    assert "61 % of the initial weight" in told(report([record("fact", "not yet")], early))[1]


def test_an_old_layer_that_is_out_of_balance() -> None:
    """Past age 3 the balance is the reason, and a lower learning rate the advice."""
    late = Diagnosis("fc", decay_age=7.0, stationarity=0.82, state="far")
    _, left_open, advice = told(report([record("fact", "not yet", 0.4)], late))
    assert "gradient and weight decay differ by 0.82 times the decay" in left_open
    assert advice == "What to do: train on, with a lower learning rate towards the end."


def test_a_layer_that_comes_nearer() -> None:
    """Neither "holds" nor a failure: it is said to come nearer, and to be trained on."""
    near = Diagnosis("fc", decay_age=2.0, state="approaching")
    holds, left_open, advice = told(report([record("fact", "approaching", 0.8)], near))
    assert holds.startswith(
        "In layer fc, nothing holds yet; fact (cosine 0.800, by chance 0.03) comes nearer at decay "
        "age 2 (weight decay alone would have left 14 %"
    )
    assert left_open == "Nothing is left open."
    assert "train on until the decay age is about 3: about 50 more steps" in advice


@pytest.mark.parametrize("because", [INVARIANT, ""])
def test_a_scale_invariant_layer(because: str) -> None:
    """FACT does not apply; the accounts that need no balance are named."""
    norm = Diagnosis("fc", decay_form="coupled", weight_decay=0.1, scale_invariance="rows")
    made = report(
        [
            record("fact", "not applicable", 0.05, because=because, premise=because),
            record("bfact", "not applicable", 0.05, because=because, premise=because),
            record("enfa", "aligned", 0.9),
        ],
        norm,
    )
    holds, left_open, advice = told(made)
    assert "enfa^0.5" in holds
    assert "to which the loss reacts most" in holds
    assert "fact" not in holds
    assert "fact and bfact do not apply, because rescaling the weight does not" in left_open
    assert "scale-invariant" in left_open
    assert "judge this layer by enfa^0.5" in advice


def test_an_aligned_account_is_advised_first() -> None:
    """Of accounts that need no balance those that are aligned, else those at chance."""
    other, best = record("nfa", "at chance"), record("enfa", "aligned", 0.9)
    broken = record("fact", "not applicable", because=INVARIANT)
    assert "judge this layer by enfa^0.5, which needs" in told(report([broken, other, best]))[2]
    assert "judge this layer by nfa^0.5, which needs" in told(report([broken, other]))[2]
    nothing = record("nfa", "undefined", NAN)
    assert "report.notes()" in told(report([broken, nothing]))[2]


def test_scale_invariance_without_another_account_to_read() -> None:
    """Where nfa and enfa were not asked for, they are advised."""
    made = report([record("fact", "not applicable", because=INVARIANT)])
    assert "ask for nfa and enfa" in told(made)[2]


@pytest.mark.parametrize("because", [DECOUPLED, ""])
def test_decoupled_decay_with_the_update_form(because: str) -> None:
    """Under AdamW the update form is what holds and what to read."""
    adamw = Diagnosis("fc", "AdamW", "decoupled", 0.1, 4.0, state="at stationarity")
    made = report(
        [
            record("fact", "not applicable", 0.97, because=because),
            record("update_fact", "holds", 0.999, form="update"),
        ],
        adamw,
    )
    holds, left_open, advice = told(made)
    assert holds.startswith("In layer fc, update_fact (cosine 0.999, by chance 0.03) holds")
    assert "the weight is what updates and weight decay in balance make it" in holds
    assert (
        "fact does not apply, because AdamW applies weight decay beside the gradient" in left_open
    )
    assert advice == "What to do: read update_fact in place of those of the gradient."


@pytest.mark.parametrize("source", ["loop", "measure"])
def test_decoupled_decay_without_the_update_form(source: str) -> None:
    """The update form is advised by name, for each relation; it needs the training loop."""
    records = [record(name, "not applicable", because=DECOUPLED) for name in ("fact", "bfact")]
    advice = told(report(records, source=source))[2]
    assert "update_fact and update_bfact (relations=)" in advice
    assert ("in the training loop" in advice) == (source == "measure")


def test_the_update_form_under_coupled_decay() -> None:
    """Under SGD the gradient form is the one to read."""
    text = "coupled weight decay (SGD): at rest the gradient balances the decay; read fact"
    made = report([record("update_fact", "not applicable", because=text)])
    _, left_open, advice = told(made)
    assert "acts through the gradient here (coupled)" in left_open
    assert advice == "What to do: read fact in place of update_fact."


def test_a_last_layer() -> None:
    """What is trivial says nothing of learning, both powers in one word."""
    records = [
        record("fact", "holds", 0.99),
        record("nfa", "trivial", 0.97, premise=TRIVIAL, because=TRIVIAL),
        record("nfa", "trivial", 1.0, power=1.0, premise=TRIVIAL, because=TRIVIAL),
    ]
    holds, left_open, advice = told(report(records))
    assert "nfa" not in holds
    assert "nfa says nothing of learning, because the output reacts equally" in left_open
    assert "leave those scores out" in advice
    text = "trivial: with one output row any gradients give a full forward score"
    one = told(report([record("enfa", "trivial", because=text)]))[1]
    assert "enfa says nothing of learning, because with one output any gradients" in one


@pytest.mark.parametrize(
    ("because", "decay"),
    [("no weight decay: nothing balances the gradient at rest", NAN), ("", 0.0)],
)
def test_no_weight_decay(because: str, decay: float) -> None:
    """λ = 0 is said in words, and training with decay is advised."""
    none = Diagnosis("fc", "SGD", "unknown", decay, state="not applicable")
    made = report([record("fact", "not applicable", because=because)], none)
    _, left_open, advice = told(made)
    assert "fact does not apply, because there is no weight decay" in left_open
    assert "train with weight decay" in advice


def test_a_frozen_layer() -> None:
    """Nothing trains it; measure() can score it."""
    text = "frozen: training does not drive it to stationarity"
    status = "no gradient reached: frozen, like all below it (measure() can see it)"
    made = report(
        [
            record("fact", "not applicable", NAN, because=text, premise=text, status=status),
            record("nfa", "undefined", NAN, because=status, status=status),
        ],
        Diagnosis("fc", state="not applicable", because=text),
    )
    _, left_open, advice = told(made)
    assert "fact does not apply, because the weight is frozen" in left_open
    assert "nfa has no number, because the weight is frozen" in left_open
    assert "measure() scores it as it stands" in advice


def test_minibatch_noise() -> None:
    """The noise is said in numbers, and a longer window than the one taken is advised."""
    noisy = Diagnosis("fc", decay_age=8.0, stationarity=3.4, noise=3.1, state="cannot tell")
    because = "‖λW + G‖ is 3.4 of ‖λW‖, which minibatch noise alone would give (3.1)"
    for text in (because, ""):
        made = report([record("fact", "cannot tell", 0.4, because=text)], noisy)
        _, left_open, advice = told(made)
        assert "fact cannot be judged, because minibatch noise alone puts" in left_open
        assert "3.1 apart" in left_open
        assert "3.4 is seen" in left_open
        assert "longer window (window=) than 20 steps, of several epochs" in advice


def test_too_few_examples() -> None:
    """Fewer examples than the score needs: biased low, measure() on more."""
    because = "cosine 0.70, by chance 0.78 ± 0.02, but 640 examples for 512 rows bias it low"
    made = report(
        [record("nfa", "cannot tell", 0.7, because=because)], source="measure", jacobian="exact"
    )
    _, left_open, advice = told(made)
    assert "nfa cannot be judged, because 640 examples are too few" in left_open
    assert "biased low" in left_open
    assert "measure() on more data, ten examples or more" in advice


def test_a_biased_interval() -> None:
    """A score with a verdict keeps it; that its interval is biased stays open."""
    note = "biased low: the examples are worth 640, fewer than 10 × 512 rows"
    made = report([record("nfa", "aligned", 0.9, interval_note=note)])
    holds, left_open, advice = told(made)
    assert "is aligned" in holds
    assert "the interval of nfa is not to be relied on, because 640 examples" in left_open
    assert "measure() on more data" in advice


@pytest.mark.parametrize(
    ("note", "said"),
    [
        ("no interval: measure(jackknife=8) gives one", ""),
        ("clipped to [-1, 1]", ""),
        ("cannot tell: 4 groups, fewer than 8", "because 4 groups, fewer than 8."),
        ("cannot tell: random Jacobians, whose own error", "because random Jacobians, whose own"),
    ],
)
def test_notes_on_intervals(note: str, said: str) -> None:
    """That none was asked for is no open question; what is wrong with one is."""
    left_open = told(report([record("nfa", "aligned", 0.9, interval_note=note)]))[1]
    assert said in left_open
    assert (left_open == "Nothing is left open.") == (not said)


def test_chance_with_random_jacobians() -> None:
    """What is no more than chance is a finding; exact Jacobians can confirm it."""
    records = [record("nfa", "at chance", 0.79), record("benfa", "below chance", 0.01)]
    holds, left_open, advice = told(report(records))
    assert "nothing can be said to hold" in holds
    assert "nfa^0.5 (cosine 0.790, by chance 0.78) is not clearly above chance" in holds
    assert "benfa^0.5 (cosine 0.010, by chance 0.78) is clearly below chance" in holds
    assert left_open == "Nothing is left open."
    assert 'measure(jacobian="exact")' in advice
    assert "exact" not in told(report(records, jacobian="exact"))[2]
    assert "exact" not in told(report(records[1:]))[2]
    spread = record("nfa", "at chance", 0.9, chance_spread=0.06)
    assert "nfa^0.5 (cosine 0.900, by chance 0.78 ± 0.06) is" in told(report([spread]))[0]


def test_nothing_measured() -> None:
    """A layer that was never called has no numbers, and why is quoted."""
    status = "the layer was never called, as a module or through its weight"
    records = [
        record(name, "undefined", NAN, status=status, because=status) for name in ("fact", "nfa")
    ]
    holds, left_open, advice = told(report(records))
    assert "nothing can be said to hold" in holds
    assert "fact and nfa have no number, because the layer was never called" in left_open
    assert "the forward pass uses this layer" in advice


def test_a_fault() -> None:
    """A message with full stops stays inside its sentence; the log is where to look."""
    status = "fault: RuntimeError: Expected 3. Got 4! Why?\nNaN found. See the docs..."
    made = report([record("fact", "undefined", NAN, status=status, because=status)])
    _, left_open, advice = told(made)
    assert "fact has no number, because fault: RuntimeError: Expected 3; Got 4; Why" in left_open
    assert "strict=True" in advice


def test_a_long_message_is_cut() -> None:
    """What is quoted keeps 25 words, however long the message."""
    status = "fault: " + " ".join(f"w{i}" for i in range(200))
    left_open = told(report([record("fact", "undefined", NAN, status=status)]))[1]
    assert left_open.endswith("w22 w23 ….")


def test_values_that_are_not_finite() -> None:
    """NaN is said in words."""
    status = "not finite: the weight holds NaN or infinity"
    _, left_open, advice = told(report([record("nfa", "undefined", NAN, status=status)]))
    assert "values that are not finite" in left_open
    assert "find out where training left the finite numbers" in advice


def test_a_reserve() -> None:
    """A premise that is only noted does not take the verdict away."""
    text = "partly: each of its 8 rows is nearly scale-invariant (ρ = 0.02), as before BatchNorm"
    holds, left_open, _ = told(report([record("fact", "holds", 0.98, premise=text)]))
    assert "fact (cosine 0.980, by chance 0.03) holds: the weight is what gradient" in holds
    assert "fact can be taken with a reserve only, because rescaling" in left_open


@pytest.mark.parametrize(
    ("because", "said", "todo"),
    [
        ("λ changed inside the window, from 0.1 to 0.2", "was changed", "stays the same"),
        ("weight decay not known: give it", "decay is not known", "weight_decay="),
        ("not held by the optimizer", "no optimizer that the probe knows", "give the probe"),
        ("λ was given as 0.1, but SGD applies 0.2", "weight decay was given as 0.1", "leave"),
        ("the weight is used in several places, so that K", "in several places", "from step 0"),
        ("the gradients behind K are so small that their squares underflow float32",
         "vanish in float32", "float64"),
        ("frozen weights take no step: the update form is measured in the loop", "take no step",
         "training loop"),
        ("the weight is computed from other parameters, on", "is computed from", "nfa"),
        ("d_out 5 exceeds max_dim 4", "exceeds max_dim 4", "raise max_dim"),
        ("no gradient reached", "no gradient reached", "the loss depends on this layer"),
        ("Foo: form of decay unknown. Sorry", "form of decay unknown; Sorry", "report.notes()"),
    ],
)  # fmt: skip
def test_other_reasons(because: str, said: str, todo: str) -> None:
    """Each reason that the probe gives is put in words, with something to do."""
    _, left_open, advice = told(report([record("fact", "cannot tell", because=because)]))
    assert said in left_open
    assert todo in advice


def test_two_things_to_do_and_no_more() -> None:
    """The two most useful, whatever else could be done."""
    early = Diagnosis("fc", decay_age=1.0, state="far")
    records = [
        record("nfa", "trivial"),
        record("fact", "not yet"),
        record("update_fact", "not applicable", because="coupled weight decay (SGD): read fact"),
    ]
    assert told(report(records, early))[2] == (
        "What to do: read fact in place of update_fact; and train on until the decay age is about "
        "3: about 200 more steps at the present rate."
    )


def test_many_relations_are_counted() -> None:
    """A sentence names the scores furthest above chance and counts the rest."""
    records = [record("nfa", "aligned", 0.9 + s / 1000, power=float(s)) for s in range(1, 9)]
    holds = told(report(records))[0]
    assert "nfa^8 (cosine 0.908" in holds
    assert "and 6 more are aligned" in holds


def test_a_layer_that_is_not_there() -> None:
    """The error names the layers; the model itself has no name."""
    made = report([record("fact", "holds"), record("fact", "holds", layer="")])
    with pytest.raises(NotMeasuredError, match=r"no layer 'conv'; layers: fc, "):
        made.explain("conv")
    with pytest.raises(NotMeasuredError, match=r"no layer 'fc'; layers: none"):
        report([]).explain("fc")
    assert made.explain("").startswith("In the model, itself a layer, fact")


def random_report(seed: int) -> Report:
    """Any verdicts, states, reasons and settings, whether they fit together or not."""
    draw = random.Random(seed)

    def value(*choices: float) -> float:
        return draw.choice([*choices, NAN])

    texts = ["", "", DECOUPLED, INVARIANT, TRIVIAL, REST, "fault: OSError: No. Not so!", "x. y? z"]
    names = draw.sample(sorted(RELATIONS), draw.randint(1, len(RELATIONS)))
    records = [
        record(
            name,
            draw.choice(VERDICTS),
            value(-0.5, 0.2, 0.999),
            power=power if RELATIONS[name].has_power else None,
            because=draw.choice(texts),
            premise=draw.choice(texts),
            interval_note=draw.choice(texts),
            status=draw.choice(["ok", "ok", "not finite: the weight holds NaN"]),
            form=draw.choice(["", "snapshot", "window", "update"]),
            cosine_low=value(0.1),
            cosine_high=value(0.3),
            shared_weight_cosine=value(0.7),
            chance_cosine=value(0.1),
            fitted_power=value(0.4),
        )
        for name in names
        for power in ((0.5, 1.0) if RELATIONS[name].has_power else (0.5,))
    ]
    diagnosis = Diagnosis(
        "fc",
        draw.choice(["", "SGD"]),
        draw.choice(get_args(DecayForm)),
        value(0.0, 0.1),
        decay_age=value(0.0, 1e-7, 0.4, 3.0, 80.0),
        window_age=value(0.0, 1e-9, 0.1),
        stationarity=value(0.0, 0.5, 40.0),
        noise=value(0.0, 0.4, 30.0),
        scale_invariance=draw.choice(["none", "rows", "unknown"]),
        state=draw.choice(get_args(State)),
    )
    settings = {"source": draw.choice(["loop", "measure"]), "window": draw.choice([0, 1, 20, None])}
    return report(records, draw.choice([diagnosis, None]), draw.choice([0, 100]), **settings)


@pytest.mark.parametrize("seed", range(300))
def test_any_combination_gives_three_sentences_that_keep_to_the_verdicts(seed: int) -> None:
    """Always three sentences; what is said to hold holds, and what is open is not a finding."""
    made = random_report(seed)
    holds, left_open, _ = told(made)
    assert told(made) == told(random_report(seed))
    verdicts = {r.label: r.verdict for r in made.records}
    said = {
        " hold": "holds", "aligned": "aligned", "nearer": "approaching",
        "not clearly above chance": "at chance", "clearly below chance": "below chance",
    }  # fmt: skip
    for piece in re.sub(r"^In layer fc, ", "", holds).split("; "):
        if piece.startswith(("nothing", "and ")):
            continue
        words = next(word for word in said if word in piece)
        named = [label for label in re.findall(r"[a-z_]+\^?[\d.]*", piece) if label in verdicts]
        assert named, piece
        assert {verdicts[label] for label in named} == {said[words]}, piece
    nothing = not {"holds", "aligned"} & set(verdicts.values())
    assert ("nothing" in holds) == nothing
    if left_open == "Nothing is left open.":
        assert set(verdicts.values()) <= set(FINDINGS)
    elif not set(verdicts.values()) & set(FINDINGS):
        assert "reserve" not in left_open
        assert "relied on" not in left_open
