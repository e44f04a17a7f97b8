"""Where an equation was written, and what to call it."""

import contextlib
import itertools
import os
import sysconfig
from collections.abc import Iterable, Iterator
from typing import Any

from jax._src import source_info_util
from jax.extend import core

from hesscale_jax._jaxpr.program import Equation

__all__ = [
    "INSTALLED",
    "ONE_RESULT",
    "context",
    "function_name",
    "label",
    "library_frame",
    "location",
    "user_frame",
]


# The name of a function that has one of another's results begins so, as no name in Python can.
ONE_RESULT = "result."

# Where libraries are.
INSTALLED = tuple(sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib"))

# This library's own frames are not where the user wrote an equation.
source_info_util.register_exclusion(os.path.dirname(os.path.dirname(__file__)) + os.sep)


@contextlib.contextmanager
def context(eqn: Equation) -> Iterator[None]:
    """What is bound inside carries the user's line, name scope and settings of ``eqn``."""
    source = eqn.sources[0]
    stack = source_info_util.current_name_stack() + source.source_info.name_stack
    # Within a function of JAX that is traced once for all calls, no frame is the user's.
    tracebacks = (source.source_info.traceback for source in eqn.sources)
    known = (t for t in tracebacks if source_info_util.user_frame(t) is not None)
    traceback = next(known, source.source_info.traceback)
    with source_info_util.user_context(traceback, name_stack=stack), source.ctx.manager:
        yield


def location(eqn: Equation) -> str:
    """Where the user wrote the equation: ``file.py:41 (function)``."""
    frame = user_frame(eqn)
    if frame is None:
        return "an unknown line"
    return f"{frame.file_name}:{frame.start_line} ({frame.function_name})"


def user_frame(eqn: Equation) -> Any:
    """The innermost frame outside of installed libraries, if there is one, else the innermost.

    So a layer of a library is found where the user calls it. A function that is the whole loss is
    called by no line of the user's: it is found at the first line inside. ``None`` if no frame is
    known.
    """
    inside = (inner for jaxpr in core.jaxprs_in_params(eqn.params) for inner in jaxpr.eqns)
    frames = _frames(eqn.sources) or _frames(inside)
    outside = (frame for frame in frames if not frame.file_name.startswith(INSTALLED))
    return next(outside, frames[0] if frames else None)


def _frames(sources: Iterable[Any]) -> list[Any]:
    return [
        frame
        for source in sources
        for frame in source_info_util.user_frames(source.source_info.traceback)
    ]


def library_frame(eqn: Equation) -> Any:
    """The innermost frame, if it is in an installed library, else ``None``; JAX's are not known."""
    for source in eqn.sources:
        for frame in source_info_util.user_frames(source.source_info.traceback):
            return frame if frame.file_name.startswith(INSTALLED) else None
    return None


def label(eqn: Equation) -> str:
    """The primitive, with the name of the function that it runs: ``custom_vjp_call[f]``."""
    name: str | None
    match eqn.name:
        case "custom_jvp_call" | "custom_vjp_call":
            name = _wrapped(eqn) or function_name(eqn)
        case "pallas_call" | "region":
            name = eqn.params["name"]
        case "ffi_call":
            name = eqn.params["target_name"]
        case _:
            name = None
    return f"{eqn.name}[{name}]" if name else eqn.name


def function_name(eqn: Equation) -> str:
    """The name of the function with a derivative rule of its own that an equation calls."""
    return eqn.params["call_jaxpr"].jaxpr.debug_info.func_name or ""


def _wrapped(eqn: Equation) -> str | None:
    """The name of the user's function that a wrapper of an installed library calls, if it does.

    ``equinox.filter_custom_vjp`` gives every function to JAX under the wrapper's own name.
    """
    for inner in eqn.params["call_jaxpr"].jaxpr.eqns[:1]:
        frames = list(source_info_util.user_frames(inner.source_info.traceback))
        for called, caller in itertools.pairwise(frames):
            if _last(caller) == function_name(eqn) and caller.file_name.startswith(INSTALLED):
                return None if called.file_name.startswith(INSTALLED) else _last(called)
    return None


def _last(frame: Any) -> str:
    return str(frame.function_name).rsplit(".", 1)[-1]
