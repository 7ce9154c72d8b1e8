"""The built wheel: what is in it, and what importing it loads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = (
    "accelerate",
    "benchmarks",
    "figures",
    "lightning",
    "mlflow",
    "rfm",
    "timm",
    "transformers",
    "wandb",
)
HEAVY = ("torchvision", "tensorboard", "matplotlib", "pandas", "sklearn", *EXTRAS)


def _run(*command: str | Path, **environment: str) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=environment.get("PYTHONPATH"),
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr or done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, as building leaves files behind."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("feature_probe", "integrations", "tests", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built with the setuptools at hand: no network."""
    out = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel")
    _run(*pip, "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", out, source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which nothing but the wheel is installed."""
    target = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install")
    _run(*pip, "--no-deps", "--no-index", "--target", target, wheel)
    return target


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    """Every source file, the integrations and the typing marker; no tests, no examples."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    places = {"feature_probe": "feature_probe", "integrations": "feature_probe/integrations"}
    expected = {
        f"{place}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, place in places.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected
    assert {"feature_probe/py.typed", "feature_probe/integrations/timm.py"} <= names


def test_wheel_says_what_it_needs(wheel: Path) -> None:
    """The metadata has the licence and no upper bound on any run-time dependency."""
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(path).decode()
    header = metadata.split("\n\n")[0].splitlines()
    needs = [line for line in header if line.startswith("Requires-Dist:") and "extra" not in line]
    assert {line.split()[1].split(">")[0] for line in needs} == {
        "torch",
        "numpy",
        "tensorboard",
        "pillow",
        "tqdm",
    }
    assert not [line for line in needs if "<" in line or "==" in line]
    extras = {line.split()[1] for line in header if line.startswith("Provides-Extra:")}
    assert extras == {*EXTRAS, "dev"}
    assert "License-Expression: MIT" in header


def test_installed_wheel_imports_nothing_heavy(installed: Path) -> None:
    """`import feature_probe` from the wheel loads neither TensorBoard nor any optional package."""
    code = (
        "import json, sys, feature_probe as f;"
        f"print(json.dumps([f.__file__, [m for m in {HEAVY!r} if m in sys.modules]]))"
    )
    path, loaded = json.loads(_run(sys.executable, "-c", code, PYTHONPATH=str(installed)))
    assert Path(path).is_relative_to(installed)
    assert loaded == []


def test_installed_wheel_has_the_integrations(installed: Path) -> None:
    """feature_probe.integrations and a module of it come from the wheel."""
    code = "import feature_probe.integrations.timm as t; print(t.__file__)"
    path = _run(sys.executable, "-c", code, PYTHONPATH=str(installed)).strip()
    assert Path(path) == installed / "feature_probe" / "integrations" / "timm.py"


def test_editable_install_has_the_integrations(
    source: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What `pip install -e .` installs finds the integrations in their own folder."""
    out, site = tmp_path_factory.mktemp("editable"), tmp_path_factory.mktemp("site")
    build = "import sys, setuptools.build_meta as b; b.build_editable(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, out], cwd=source, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # -S: without any other editable install of this environment.
    code = (
        f"import sys, site; site.addsitedir({str(site)!r});"
        f"sys.path.append({sysconfig.get_path('purelib')!r});"
        "import feature_probe.integrations.timm as t;"
        "import feature_probe; print(feature_probe.__file__); print(t.__file__)"
    )
    paths = _run(sys.executable, "-S", "-c", code, PYTHONPATH=str(out)).split()
    expected = [source / "feature_probe" / "__init__.py", source / "integrations" / "timm.py"]
    assert [Path(path) for path in paths] == expected


def test_version_is_the_same_everywhere(installed: Path) -> None:
    """The package and its metadata name one version."""
    code = (
        "import importlib.metadata as m, feature_probe as f;"
        "print(f.__version__, m.version('feature-probe'))"
    )
    package, metadata = _run(sys.executable, "-c", code, PYTHONPATH=str(installed)).split()
    assert package == metadata


def test_torchvision_stub_lets_timm_import() -> None:
    """With the stub of the development environment, a fresh Python can import timm."""
    pytest.importorskip("timm")
    code = "import torchvision_stub, timm; print(timm.create_model('resnet18', num_classes=2).fc)"
    assert "out_features=2" in _run(sys.executable, "-c", code, PYTHONPATH=str(ROOT / "tests"))
