"""The imports of the package run one way, in the order of the data's flow (CONTRIBUTING.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "feature_probe"
INTEGRATIONS = sorted((PACKAGE.parent / "integrations").glob("*.py"))

#: What each module may import of the package. A module or an import that is not here fails:
#: adding one is a decision about the architecture. A name that ends in "." is a folder.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "schedules": {"errors"},
    "models": {"errors"},
    # When to report, by what that costs.
    "pacing.": {"errors", "schedules", "pacing."},
    "initialization": {"errors"},
    # The mathematics: tensors in, tensors out.
    "theory.": {"errors", "theory."},
    # How optimizers decay weights.
    "optimizers.": {"errors", "optimizers."},
    # What a layer is.
    "layers.": {"errors", "models", "layers."},
    # What PyTorch hands over when the model runs.
    "capture.": {"errors", "models", "layers.", "capture."},
    # What was captured becomes sums, of one process and of all.
    "sums.": {"errors", "models", "theory.", "optimizers.", "layers.", "capture.", "sums."},
    "processes.": {"errors", "models", "theory.", "layers.", "capture.", "sums.", "processes."},
    # The sums become records, the records a report, and the report goes somewhere.
    "reports.": {"errors", "models", "theory.", "optimizers.", "layers.", "sums.", "reports."},
    "sinks.": {"errors", "theory.", "reports.", "sinks."},
    # Kernel machines: the same mathematics and reports, nothing of networks.
    "rfm.": {"errors", "theory.", "reports.", "sinks.", "rfm."},
    # Wires the parts of the self-test together.
    "selftest": {
        "errors",
        "theory.",
        "layers.",
        "capture.",
        "sums.",
        "processes.",
        "reports.",
    },
}

#: The entry points, which wire the rest together: free to import all of it, imported by none.
WIRING = {"estimate", "probe", "measure", "__init__"}

#: Modules that never see a Module.
PURE = (
    "theory.relations",
    "theory.matrices",
    "theory.factored",
    "theory.spectra",
    "theory.agreement",
    "theory.levels",
    "theory.ranks",
    "theory.power",
    "theory.structure",
    "theory.subspaces",
    "theory.egop",
    "theory.uncertainty",
    "theory.invariance",
    "theory.early_alignment",
    "theory.quadratic_network",
    "theory.alignment_reversing",
    "sums.moments",
    "sums.window",
)

#: Never imported anywhere in the package: what users may not have, or have broken.
NEVER = {"torchvision", "timm"}


def _module_name(path: Path) -> str:
    """Dotted name inside the package: 'report', 'sinks.jsonl', '__init__'."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {_module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def _imports(source: str) -> Iterator[str]:
    """Every absolute name imported anywhere in a source: 'a.b' for both import forms.

    `from a import b` gives 'a.b', which is the module a.b or the name b of module a.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what is imported"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _internal(source: str) -> set[str]:
    """Modules of the package that a source imports, as keys of MODULES."""
    found = set()
    for name in _imports(source):
        parts = name.split(".")
        if parts[0] != "feature_probe":
            continue
        inside = parts[1:]
        while inside and ".".join(inside) not in MODULES:
            package = ".".join([*inside, "__init__"])
            if package in MODULES:
                inside = [*inside, "__init__"]
                break
            inside = inside[:-1]
        found.add(".".join(inside) or "__init__")
    return found


def _key(module: str) -> str:
    """The entry of ALLOWED that speaks for a module: 'sinks.' for every sinks.*."""
    return module.split(".")[0] + "." if "." in module else module


def violations(module: str, source: str) -> set[str]:
    """Imports of a module's source that the table does not allow."""
    if module in WIRING:
        return set()
    assert _key(module) in ALLOWED, f"{module}: not in the table of allowed imports; add it"
    return {name for name in _internal(source) if _key(name) not in ALLOWED[_key(module)]}


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_flow(module: str) -> None:
    """A module imports only what the table allows it."""
    assert violations(module, MODULES[module].read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize("module", MODULES)
def test_no_optional_package_is_imported(module: str) -> None:
    """No module imports torchvision or timm."""
    names = _imports(MODULES[module].read_text(encoding="utf-8"))
    assert {name for name in names if name.split(".")[0] in NEVER} == set()


@pytest.mark.parametrize("path", INTEGRATIONS, ids=lambda path: path.stem)
def test_an_integration_imports_the_package_and_its_own_framework(path: Path) -> None:
    """No integration imports another, or another's framework."""
    frameworks = {other.stem for other in INTEGRATIONS} - {path.stem}
    names = set(_imports(path.read_text(encoding="utf-8")))
    assert {name for name in names if name.split(".")[0] in frameworks} == set()
    assert {name for name in names if name.startswith("feature_probe.integrations")} == set()


@pytest.mark.parametrize("module", PURE)
def test_the_mathematics_never_sees_a_module(module: str) -> None:
    """The theory and the sums it works on import nothing of torch.nn."""
    names = _imports(MODULES[module].read_text(encoding="utf-8"))
    assert {name for name in names if name.startswith("torch.nn")} == set()


def test_allowed_imports_have_no_cycle() -> None:
    """The table itself runs one way: there is an order in which each imports only earlier ones."""
    remaining = {module: allowed - {module} for module, allowed in ALLOWED.items()}
    while remaining:
        free = {module for module, allowed in remaining.items() if not allowed & set(remaining)}
        assert free, f"a cycle among {sorted(remaining)}"
        remaining = {module: names for module, names in remaining.items() if module not in free}


def test_no_module_needs_itself() -> None:
    """Inside the folders imports run one way as well: there is an order of the modules."""
    remaining = {
        module: _internal(path.read_text(encoding="utf-8")) - {module}
        for module, path in MODULES.items()
        if not module.endswith("__init__")
    }
    while remaining:
        free = {module for module, needed in remaining.items() if not needed & set(remaining)}
        assert free, f"a cycle among {sorted(remaining)}"
        remaining = {module: needed for module, needed in remaining.items() if module not in free}


def test_the_table_names_only_what_exists() -> None:
    """No entry outlives its module."""
    keys = {_key(module) for module in MODULES}
    assert {module for module in [*ALLOWED, *WIRING] if module not in keys} == set()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("theory.relations", "from feature_probe.capture.recorder import Recorder"),
        ("theory.relations", "import feature_probe.layers.rules"),
        ("theory.factored", "from feature_probe.reports import report"),
        ("theory.agreement", "def late():\n    from feature_probe.reports.report import Report"),
        ("reports.report", "from feature_probe.sinks.jsonl import JSONLSink"),
        ("sinks.jsonl", "from feature_probe.probe import FeatureProbe"),
        ("sinks.jsonl", "from feature_probe import FeatureProbe"),
        ("capture.recorder", "from feature_probe.sums.moments import Moments"),
        ("sums.moments", "from feature_probe.processes.ranks import Ranks"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    """The check itself fails on imports against the flow, nested ones and packages included."""
    assert violations(module, source)
