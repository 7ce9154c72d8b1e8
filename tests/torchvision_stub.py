"""Lets a CUDA build of torchvision import beside a CPU build of PyTorch, in this environment.

The compiled half of such a torchvision does not load there, and its Python half then fails on two
operators it expects to be declared; timm fails with it. Run once in a development environment,

    .venv/bin/python tests/torchvision_stub.py

this file copies itself into site-packages, with a .pth file that makes every later Python of the
environment declare the two (without an implementation) when torchvision is first imported. Nothing
is declared where torchvision's compiled half loads. The package itself never needs this.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

_KEPT = []  # the declarations live as long as the objects that made them


def declare_operators(package: Path) -> None:
    """Declare torchvision's nms and qnms if its compiled half, in folder `package`, cannot load."""
    import torch  # noqa: PLC0415  (must not slow down Pythons that never import torchvision)

    if hasattr(torch.ops.torchvision, "nms"):
        return
    try:
        for compiled in sorted(package.glob("_C*.so")):
            torch.ops.load_library(str(compiled))
    except OSError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)


class _Finder:
    """Finds torchvision as ever, but has its operators declared before its first line runs."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name)
        if spec is None or spec.loader is None or spec.origin is None:
            return spec
        package, execute = Path(spec.origin).parent, spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            declare_operators(package)
            execute(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> Path:
    """Copy this file into the running Python's site-packages; return where to."""
    import sysconfig  # noqa: PLC0415

    if sys.prefix == sys.base_prefix:
        raise SystemExit("this is no virtual environment: nothing written")
    site_packages = Path(sysconfig.get_path("purelib"))
    copy = site_packages / "_torchvision_stub.py"
    copy.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    (site_packages / "_torchvision_stub.pth").write_text("import _torchvision_stub\n")
    return copy


if __name__ == "__main__":
    print(f"wrote {install()}")
else:
    sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]
