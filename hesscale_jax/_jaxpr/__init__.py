"""Everything the library assumes about JAX's internals, in one place.

A traced loss becomes a :class:`Program`: a list of equations in which nested ``jit`` and
``checkpoint`` calls are written out, a value computed twice is computed once, and what no output
needs is left out. What else holds a jaxpr, such as ``scan``, has a :class:`Body`. Each assumption
made here is pinned by one test in ``tests/test_jaxpr_contracts.py``.
"""

from hesscale_jax._jaxpr.binding import (
    add,
    at_once,
    bind,
    evaluate,
    is_on_cpu,
    is_on_one_cpu,
    listed,
    multiply,
    run,
    shard_mapped,
    stops_at_nans,
    takes,
    trace,
    uses_state,
    with_constants,
    without_state,
)
from hesscale_jax._jaxpr.bodies import body, has_effects
from hesscale_jax._jaxpr.custom_rules import along, moved_results
from hesscale_jax._jaxpr.flattening import flatten, pure
from hesscale_jax._jaxpr.inspection import (
    complex_primitive,
    has_own_types,
    holds_callback,
    holds_custom_vjp,
    holds_name,
    transform,
    zero_outputs,
)
from hesscale_jax._jaxpr.program import (
    CALLS,
    CUSTOM,
    HIGH,
    Body,
    Constant,
    Equation,
    Program,
    Region,
    Value,
    called,
    is_inexact,
    literal,
    scan_groups,
)
from hesscale_jax._jaxpr.sizes import dimension, number, size, sizes
from hesscale_jax._jaxpr.sources import (
    INSTALLED,
    context,
    hide_frames,
    label,
    library_frame,
    location,
    user_frame,
)

__all__ = [
    "CALLS",
    "CUSTOM",
    "HIGH",
    "INSTALLED",
    "Body",
    "Constant",
    "Equation",
    "Program",
    "Region",
    "Value",
    "add",
    "along",
    "at_once",
    "bind",
    "body",
    "called",
    "complex_primitive",
    "context",
    "dimension",
    "evaluate",
    "flatten",
    "has_effects",
    "has_own_types",
    "hide_frames",
    "holds_callback",
    "holds_custom_vjp",
    "holds_name",
    "is_inexact",
    "is_on_cpu",
    "is_on_one_cpu",
    "label",
    "library_frame",
    "listed",
    "literal",
    "location",
    "moved_results",
    "multiply",
    "number",
    "pure",
    "run",
    "scan_groups",
    "shard_mapped",
    "size",
    "sizes",
    "stops_at_nans",
    "takes",
    "trace",
    "transform",
    "user_frame",
    "uses_state",
    "with_constants",
    "without_state",
    "zero_outputs",
]
