"""The rule of each primitive: all coverage on one screen.

A rule is a member of a family, or any function

    rule(eqn, operands, recurse) -> [Moments, ...]

that takes one :class:`~hesscale_jax.Moments` per operand and returns one per output; ``recurse``
pushes moments through a jaxpr that the equation holds. A table of your own is
``hesscale_jax.RULES | {"my_primitive": my_rule}``, by the primitive or its name.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from hesscale_jax.rules import control_flow
from hesscale_jax.rules import derivatives as d
from hesscale_jax.rules.custom_derivatives import custom_jvp, custom_rule
from hesscale_jax.rules.derivatives import Pointwise, binary, linear, nested, unary
from hesscale_jax.rules.multilinear import multilinear
from hesscale_jax.rules.selection import (
    Reduction,
    concatenate,
    constant,
    extremum,
    gather,
    join,
    selection,
    summation,
    view,
)

__all__ = [
    "RULES",
    "Pointwise",
    "Reduction",
    "binary",
    "constant",
    "linear",
    "multilinear",
    "nested",
    "selection",
    "unary",
    "view",
]

RULES: Mapping[Any, Any] = MappingProxyType(
    {
        # Pointwise, affine
        **dict.fromkeys(("add", "add_any"), linear(1.0, 1.0)),
        "sub": linear(1.0, -1.0),
        "neg": linear(-1.0),
        **dict.fromkeys(("convert_element_type", "copy", "name"), linear(1.0)),
        **dict.fromkeys(("reduce_precision", "sharding_constraint"), linear(1.0)),
        "select_n": d.select,
        "mul": d.mul,
        "div": d.div,
        # Pointwise, in closed form
        "cos": d.cos,
        "erf": d.erf,
        "exp": d.exp,
        "expm1": d.expm1,
        "integer_pow": d.integer_pow,
        "log": d.log,
        "log1p": d.log1p,
        "logistic": d.logistic,
        **dict.fromkeys(("max", "min"), d.extremum),
        "rsqrt": d.rsqrt,
        "sin": d.sin,
        "sqrt": d.sqrt,
        "square": d.square,
        "tanh": d.tanh,
        # Pointwise, by nested jvp
        **dict.fromkeys(
            ("abs", "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh"), nested
        ),
        **dict.fromkeys(("bessel_i0e", "bessel_i1e", "cbrt", "clamp", "cosh", "digamma"), nested),
        **dict.fromkeys(("erf_inv", "erfc", "exp2", "lgamma", "log2", "one_minus_square"), nested),
        **dict.fromkeys(("polygamma", "pow", "rem", "sinh", "tan"), nested),
        "custom_jvp_call": custom_jvp,
        # Selections: views and reductions may stand in a block
        **dict.fromkeys(("broadcast_in_dim", "reshape", "squeeze"), view),
        "reduce_sum": summation,
        **dict.fromkeys(("reduce_max", "reduce_min"), extremum),
        "stack": join,
        "concatenate": concatenate,
        **dict.fromkeys(("pad", "split", "tile", "unstack"), selection),
        **dict.fromkeys(("dynamic_slice", "dynamic_update_slice", "slice"), selection),
        "gather": gather,
        **dict.fromkeys(("scatter", "scatter-add"), selection),
        **dict.fromkeys(("rev", "transpose", "cumsum", "optimization_barrier"), selection),
        **dict.fromkeys(("cummax", "cummin", "sort", "top_k"), selection),
        **dict.fromkeys(("reduce_window_max", "reduce_window_min", "reduce_window_sum"), selection),
        # Multilinear
        **dict.fromkeys(("dot_general", "conv_general_dilated"), multilinear),
        # Control flow, and functions with a derivative rule of their own
        "cond": control_flow.cond,
        "custom_vjp_call": custom_rule,
        "scan": control_flow.scan,
        "shard_map": control_flow.shard_map,
        "while": control_flow.while_loop,
        # Collectives
        **dict.fromkeys(("all_gather", "all_gather_invariant", "all_to_all"), selection),
        **dict.fromkeys(("ppermute", "psum", "psum_invariant", "pvary"), selection),
        "reduce_scatter": selection,
        # Piecewise constant: a path ends
        **dict.fromkeys(("eq", "ge", "gt", "is_finite", "le", "lt", "ne"), constant),
        **dict.fromkeys(("ceil", "floor", "round", "sign", "stop_gradient"), constant),
        **dict.fromkeys(("argmax", "argmin", "eq_to", "le_to", "lt_to"), constant),
        **dict.fromkeys(("nextafter", "and", "or", "not", "xor"), constant),
    }
)
