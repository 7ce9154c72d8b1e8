"""The imports of the package run one way, in the order of the data's flow (CONTRIBUTING.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "feature_probe"
INTEGRATIONS = sorted((PACKAGE.parent / "integrations").glob("*.py"))

#: What each module may import of the package. A module or an import that is not here fails:
#: adding one is a decision about the architecture. A name that ends in "." is a whole subpackage.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "phrases": set(),
    "coverage": set(),
    "schedules": {"errors"},
    # What a layer is, and what PyTorch hands over when it runs.
    "models": {"errors"},
    "products": set(),
    "transposed": {"products"},
    "layers": {"errors", "products", "transposed"},
    "embeddings": {"layers"},
    "refusals": {"layers"},
    "targets": {"errors", "layers", "models", "refusals"},
    "decay": {"errors", "targets"},
    "interception": {"layers", "products", "transposed"},
    "resolution": {"interception", "layers", "products", "targets", "transposed"},
    "passes": set(),
    "outputs": {"passes"},
    "sharding": {"errors"},
    "compiled": {"models"},
    "shadow": {"passes"},
    "following": {"compiled", "outputs", "passes", "resolution", "shadow"},
    "capture": {
        *("following", "interception", "layers", "passes", "resolution", "sharding", "targets"),
    },
    "jacobian": {"errors"},
    # Statistics and mathematics: tensors in, tensors out.
    "moments": {"errors"},
    "factored": set(),
    "relations": {"errors", "factored"},
    "agreement": {"factored"},
    "window": {"moments", "relations"},
    "state": {"errors", "moments", "relations", "window"},
    # Which passes count, and at which optimizer step.
    "staging": {"passes", "relations", "window"},
    "ledger": {"passes", "staging", "window"},
    "stepping": {"errors", "targets"},
    # What was captured becomes sums, the sums of all processes become one.
    "observer": {
        *("capture", "errors", "jacobian", "ledger", "moments", "passes"),
        *("relations", "sharding", "targets", "window"),
    },
    "collector": {"observer", "state", "stepping", "targets", "window"},
    "packing": set(),
    "headers": {"errors", "moments", "packing", "relations", "sharding", "window"},
    "distributed": {
        *("errors", "headers", "moments", "packing", "relations", "sharding", "window"),
    },
    "ranks": {
        *("distributed", "errors", "headers", "models", "observer", "relations", "sharding"),
        *("targets", "window"),
    },
    # The sums become records, the records a report.
    "report": {"coverage", "errors", "phrases", "relations"},
    "scoring": {"agreement", "relations", "report"},
    "assembly": {
        *("coverage", "decay", "models", "moments", "observer", "refusals"),
        *("relations", "report", "scoring", "targets", "window"),
    },
    # Where a report goes.
    "sinks.": {"errors", "relations", "report", "sinks."},
    "outlets": {"errors", "report", "sinks."},
}

#: The entry points, which wire the rest together: free to import all of it, imported by none.
WIRING = {"estimate", "probe", "measure", "__init__"}

#: Modules that never see a Module.
PURE = ("relations", "factored", "agreement")

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
    """`relations`, `factored` and `agreement` import nothing of torch.nn."""
    names = _imports(MODULES[module].read_text(encoding="utf-8"))
    assert {name for name in names if name.startswith("torch.nn")} == set()


def test_allowed_imports_have_no_cycle() -> None:
    """The table itself runs one way: there is an order in which each imports only earlier ones."""
    remaining = {module: allowed - {module} for module, allowed in ALLOWED.items()}
    while remaining:
        free = {module for module, allowed in remaining.items() if not allowed & set(remaining)}
        assert free, f"a cycle among {sorted(remaining)}"
        remaining = {module: names for module, names in remaining.items() if module not in free}


def test_the_table_names_only_what_exists() -> None:
    """No entry outlives its module."""
    keys = {_key(module) for module in MODULES}
    assert {module for module in [*ALLOWED, *WIRING] if module not in keys} == set()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("relations", "from feature_probe.capture import Capture"),
        ("relations", "import feature_probe.layers"),
        ("factored", "from feature_probe import relations"),
        ("agreement", "def late():\n    from feature_probe.report import Report"),
        ("report", "from feature_probe.sinks.jsonl import JsonLines"),
        ("sinks.jsonl", "from feature_probe.probe import FeatureProbe"),
        ("sinks.jsonl", "from feature_probe import FeatureProbe"),
        ("capture", "from feature_probe.moments import Moments"),
        ("moments", "from feature_probe.relations import RELATIONS"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    """The check itself fails on imports against the flow, nested ones and packages included."""
    assert violations(module, source)
