"""torch.compile: which parts of a model are compiled, and hooks that a compiler does not see.

What is compiled runs without Python hooks, unless they were there when it was compiled: then they
are traced, and taking them off compiles it again. The hooks here stay outside. They are at the
place from which the compiled code is entered, and frame evaluation is told to leave their code
alone; where a compiler traces through them all the same (a compiled function that calls the model)
they trace to nothing.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_pre_hook,
    register_module_module_registration_hook,
)
from torch.utils.hooks import RemovableHandle

from feature_probe.models import is_compiled, layers_of_wrapping


class Passes(Protocol):
    """Who is told about the calls of a model."""

    def before_pass(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is about to run."""

    def after_pass(self, output: Any) -> None:
        """The model has returned, or raised (output None)."""


_FUNCTIONS = (types.FunctionType, types.MethodType)


class Watch:
    """Tells of the calls of one model, compiled or not, while armed.

    Where nothing is compiled, one global pre-hook waits for the model, and nothing is put on it: a
    copy or a pickle carries no trace. Global hooks are traced wherever something is compiled, so as
    soon as there is any sign of that, the hooks are on the model itself. A model is called through
    whatever wraps it: the outermost call that is seen is the one told of.

    Args:
        model: The module as the user gave it, in its wrappers.
        passes: Who is told.
    """

    def __init__(self, model: nn.Module, passes: Passes) -> None:
        self._passes = passes
        *self._wrappers, self._model = layers_of_wrapping(model)
        #: torch.compile'd wrappers, with whether they trace the hooks of what is inside
        self._compiled: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
        for wrapper in filter(is_compiled, self._wrappers):
            self._compiled[wrapper] = self._traces_hooks(layers_of_wrapping(wrapper)[1])
        self._inside: nn.Module | None = None
        self._waiting: RemovableHandle | None = None
        self._handles: list[RemovableHandle] = []
        self._registration: RemovableHandle | None = None
        self._compiles = self._telling = False

    def open(self) -> None:
        """Learn of torch.compile calls from now on."""
        if self._registration is None:
            hook = _Registered(self)
            self._registration = register_module_module_registration_hook(hook)
            weakref.finalize(self, self._registration.remove)
            for wrapper in _compiled_wrappers():
                self.registered(wrapper, wrapper._orig_mod)

    def close(self) -> None:
        """Take every hook off."""
        self.disarm()
        if self._registration is not None:
            self._registration.remove()
            self._registration = None

    @property
    def armed(self) -> bool:
        """Whether calls are told of."""
        return self._waiting is not None or bool(self._handles)

    def arm(self) -> None:
        """Tell of the calls from the next one on; nothing if armed already."""
        if self.armed:
            return
        if self._compiles or _has_compiled() or self.compiled() is not None:
            self._put_on()
        else:
            self._waiting = register_module_forward_pre_hook(_Waiting(self))
            self._unwaited = weakref.finalize(self, self._waiting.remove)

    def disarm(self) -> None:
        """Tell of no more calls."""
        self._handles = _removed(self._handles)
        self._stop_waiting()
        self._inside = None

    def registered(self, wrapper: nn.Module, inner: nn.Module | None) -> None:
        """A module was wrapped: it may be torch.compile wrapping the model, or another."""
        if inner is None or not is_compiled(wrapper):
            return
        self._compiles = True
        if layers_of_wrapping(inner)[-1] is self._model:
            self._compiled[wrapper] = self._traces_hooks(inner)
        if self.armed and self._inside is None:
            self.disarm()
            self._put_on()

    def waited(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Some module is called, and nothing was compiled when it was armed."""
        if self._telling or not any(module is own for own in (self._model, *self._wrappers)):
            return
        if self.compiled() is not None:  # since it was armed: no compiler must find a global hook
            self.disarm()
            self._put_on()
            if any(module is entrance for entrance in self._entrances()):
                self.before(module, args, kwargs)
        elif module is self._model:
            if not self._handles:  # else left over from a pass that raised
                self._handles = [module.register_forward_hook(_After(self), always_call=True)]
            self.before(module, args, kwargs)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module that leads to the model is called."""
        if not self._telling and self._inside in (None, module):
            self._inside = module
            self._passes.before_pass(args, kwargs)

    def after(self, module: nn.Module, output: Any) -> None:
        """It has returned, or raised."""
        if self._telling or self._inside is not module:
            return
        self._telling = True  # a shadow calls the model again
        try:
            self._passes.after_pass(output)
        finally:
            self._telling, self._inside = False, None
            # while torch handles an exception it iterates over the model's own hooks: leave those
            if self._waiting is not None and output is not None:
                self._handles = _removed(self._handles)

    def _put_on(self) -> None:
        for module in self._entrances():
            self._handles += [
                module.register_forward_pre_hook(_Before(self), with_kwargs=True),
                module.register_forward_hook(_After(self), always_call=True),
            ]

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.remove()
            self._waiting = None
            self._unwaited.detach()  # or one would be kept for every step that is followed

    def compiled(self) -> str | None:
        """What of the model, or around it, is compiled, in words; None if nothing is."""
        around = bool(self._compiled) or any(map(_compiled_in_place, self._wrappers))
        return "the model is compiled" if around else compiled_part(self._model)

    def _entrances(self) -> list[nn.Module]:
        """The modules whose hooks run outside compiled code."""
        tracing = [wrapper for wrapper, traces in self._compiled.items() if traces]
        return [*tracing, *filter(_compiled_in_place, self._wrappers)] or [self._model]

    def _traces_hooks(self, inner: nn.Module) -> bool:
        """Whether torch.compile of ``inner`` traces the hooks of the model in it.

        It does so for a model whose forward is torch's own (nn.Sequential), which dynamo enters
        through a function of its own instead of ``__call__``, and for a model in other wrappers.
        """
        if inner is not self._model:
            return True
        dynamo, forward = sys.modules["torch._dynamo"], inner.forward
        own = isinstance(forward, types.MethodType) and dynamo.trace_rules.check(forward)
        return bool(own or getattr(dynamo.config, "wrap_top_frame", False))


def _removed(handles: list[RemovableHandle]) -> list[RemovableHandle]:
    for handle in handles:
        handle.remove()
    return []


def _has_compiled() -> bool:
    """Whether anything at all was compiled in this process, and may be recompiled."""
    frames: Any = sys.modules.get("torch._dynamo.convert_frame")
    return frames is not None and bool(getattr(frames.output_codes, "seen", True))


def compiled_part(model: nn.Module) -> str | None:
    """What of a model is compiled, in words; None if nothing is.

    Seen are torch.compile'd and ``.compile()``d modules, compiled functions and methods that a
    module or its class holds, and those among the globals that the methods of its class name.
    """
    if "torch._dynamo" not in sys.modules:
        return None
    classes: dict[type, str | None] = {}
    for name, module in model.named_modules():
        where = name or "the model"
        if is_compiled(module) or _compiled_in_place(module):
            return f"{where} is compiled"
        for attribute, value in vars(module).items():
            if type(value) in _FUNCTIONS and _is_compiled_function(value):
                return f"{where} holds a compiled {attribute}"
        kind = type(module)
        if kind not in classes:
            classes[kind] = _compiled_function_of(kind)
        if classes[kind] is not None:
            return f"{where} calls the compiled function {classes[kind]}"
    return None


def _compiled_in_place(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None


def _is_compiled_function(value: Any) -> bool:
    if not isinstance(value, (types.FunctionType, types.MethodType)):
        return False
    wraps = hasattr(value, "_torchdynamo_orig_callable")
    return wraps and not getattr(value, "_torchdynamo_disable", False)


def _compiled_function_of(kind: type) -> str | None:
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] == "torch":
            continue
        for name, method in vars(base).items():
            if _is_compiled_function(method):
                return name
            if isinstance(method, types.FunctionType):
                for used in method.__code__.co_names:
                    if _is_compiled_function(method.__globals__.get(used)):
                        return used
    return None


def _compiled_wrappers() -> list[Any]:
    """What torch.compile has returned so far: a model does not know what was made of it."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is None:
        return []
    return [thing for thing in gc.get_objects() if issubclass(type(thing), dynamo.OptimizedModule)]


class _Hook:
    """A hook that comes off in a copy of its module, and does nothing where that is unpickled."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def __deepcopy__(self, memo: dict[int, Any]) -> _Leaving:
        return _Leaving()

    def __reduce__(self) -> tuple[Any, ...]:
        # takes anything, returns None, and is there without this package
        return getattr, (contextlib.nullcontext(), "__exit__")


class _Leaving:
    """What a copied hook becomes: before the copy's first forward all of them come off."""

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        places: list[tuple[dict[int, Any], dict[int, bool]]] = [
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_always_called),
        ]
        for hooks, flags in places:
            for number in [number for number, hook in hooks.items() if isinstance(hook, _Leaving)]:
                del hooks[number], flags[number]

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")


class _Before(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self._watch.before(module, args, kwargs)


class _Waiting:
    """Called for every module that runs, anywhere; keeps no model alive."""

    def __init__(self, watch: Watch) -> None:
        self._watch = weakref.ref(watch)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        watch = self._watch()
        if watch is not None and not torch.compiler.is_compiling():
            # torch tells global hooks of positional arguments alone
            kwargs = sys._getframe(1).f_locals.get("kwargs", {})
            watch.waited(module, args, kwargs)


class _After(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._watch.after(module, output)


class _Registered:
    """Called for every module that is put into another, anywhere; keeps no model alive."""

    def __init__(self, watch: Watch) -> None:
        self._watch = weakref.ref(watch)

    def __call__(self, module: nn.Module, name: str, inner: nn.Module | None) -> None:
        watch = self._watch() if name == "_orig_mod" else None
        if watch is not None:
            watch.registered(module, inner)


def _hide_from_frame_evaluation(function: Callable[..., Any]) -> None:
    """Let a compiler run this function, and all that it calls, as plain Python.

    These are the calls behind torch.compiler.disable, without importing torch._dynamo (1.6 s) and
    without making the function one that may not be traced, which fullgraph=True would refuse.
    """
    frames = torch._C._dynamo.eval_frame
    if hasattr(frames, "set_code_exec_strategy"):
        skip = frames._FrameAction.SKIP
        strategy = frames._FrameExecStrategy(skip, skip)
        frames.set_code_exec_strategy(function.__code__, strategy)
    elif hasattr(frames, "skip_code"):  # torch before 2.7: the frame alone, not what it calls
        frames.skip_code(function.__code__)


for _function in (_Waiting.__call__, _Before.__call__, _After.__call__, _Leaving.__call__):
    _hide_from_frame_evaluation(_function)
