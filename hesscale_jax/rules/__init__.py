"""The rule of each primitive: all coverage on one screen.

A rule is a member of a family, or any function

    rule(eqn, operands, recurse) -> [Moments, ...]

that takes one :class:`~hesscale_jax.Moments` per operand and returns one per output; ``recurse``
pushes moments through a jaxpr that the equation holds, and ``recurse.curved`` says whether second
derivatives are kept. A table of your own is ``hesscale_jax.RULES | {"my_primitive": my_rule}``, by
the primitive, its name, or with the name of a function, as ``"custom_vjp_call[my_kernel]"``.
``defined_by`` and ``dense`` make such rules.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from hesscale_jax._complex import ANALYTIC, MATRIX, own
from hesscale_jax.rules import derivatives as d
from hesscale_jax.rules.calls import call, linear_call, vectorised
from hesscale_jax.rules.control_flow import cond, scan, shard_map, while_loop
from hesscale_jax.rules.cumulative import cumlogsumexp
from hesscale_jax.rules.custom_derivatives import (
    custom_jvp,
    custom_vjp,
    defined_by,
    high,
    own_derivatives,
    own_jacobian,
)
from hesscale_jax.rules.dense_jacobian import dense, matrix_function, sampled
from hesscale_jax.rules.derivatives import Pointwise, binary, linear, nested, unary
from hesscale_jax.rules.determinant import log_determinant
from hesscale_jax.rules.fourier import fourier
from hesscale_jax.rules.incomplete_gamma import incomplete_gamma
from hesscale_jax.rules.linear_solve import linear_solve, triangular_solve, tridiagonal_solve
from hesscale_jax.rules.multilinear import multilinear, product
from hesscale_jax.rules.regions import region
from hesscale_jax.rules.selection import (
    Reduction,
    concatenate,
    constant,
    cumulative_extremum,
    extremum,
    gather,
    join,
    scatter_add,
    scatter_extremum,
    scatter_sub,
    selection,
    summation,
    view,
)
from hesscale_jax.rules.sparse import sampled_product, sparse_product
from hesscale_jax.rules.unsupported import UNSUPPORTED

__all__ = [
    "RULES",
    "UNSUPPORTED",
    "Pointwise",
    "Reduction",
    "binary",
    "call",
    "constant",
    "defined_by",
    "dense",
    "linear",
    "linear_solve",
    "matrix_function",
    "multilinear",
    "nested",
    "own_derivatives",
    "own_jacobian",
    "product",
    "sampled",
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
        **dict.fromkeys(
            ("reduce_precision", "sharding_constraint"),  # which JAX applies to the tangent too
            dataclasses.replace(linear(1.0), own_jvp=True),
        ),
        "select_n": d.select,
        "clamp": d.clamp,
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
        **dict.fromkeys(("bessel_i0e", "bessel_i1e", "cbrt", "cosh", "digamma"), nested),
        **dict.fromkeys(("erf_inv", "erfc", "exp2", "lgamma", "log2", "one_minus_square"), nested),
        **dict.fromkeys(("igamma", "igammac"), incomplete_gamma),
        **dict.fromkeys(("polygamma", "polynomial", "pow", "rem"), nested),
        **dict.fromkeys(("random_gamma", "regularized_incomplete_beta", "sinh", "tan"), nested),
        "custom_jvp_call": custom_jvp,
        "call_hi_primitive": high,
        # Selections: views and reductions may stand in a block
        **dict.fromkeys(("broadcast_in_dim", "reshape", "squeeze"), view),
        **dict.fromkeys(("device_put", "optimization_barrier"), view),
        "reduce_sum": summation,
        **dict.fromkeys(("reduce_max", "reduce_min"), extremum),
        "stack": join,
        "concatenate": concatenate,
        **dict.fromkeys(("pad", "split", "tile", "unstack"), selection),
        **dict.fromkeys(("dynamic_slice", "dynamic_update_slice", "slice"), selection),
        "gather": gather,
        "scatter": selection,
        "scatter-add": scatter_add,
        "scatter-sub": scatter_sub,
        **dict.fromkeys(("scatter-max", "scatter-min"), scatter_extremum),
        **dict.fromkeys(("rev", "transpose", "cumsum"), selection),
        **dict.fromkeys(("cummax", "cummin"), cumulative_extremum),
        **dict.fromkeys(("approx_top_k", "sort", "top_k"), selection),
        **dict.fromkeys(("reduce_window_max", "reduce_window_min", "reduce_window_sum"), selection),
        **dict.fromkeys(("select_and_gather_add", "select_and_scatter_add"), selection),
        **dict.fromkeys(("layout_constraint", "reshard"), selection),
        "xla_metadata_value": selection,
        # Products
        **dict.fromkeys(("dot_general", "conv_general_dilated"), multilinear),
        "ragged_dot_general": multilinear,
        **dict.fromkeys(("cumprod", "reduce_prod", "scatter-mul"), product),
        # Complex values, which are written out in their real and imaginary parts
        **{f"custom_jvp_call[{own(name)}]": nested for name in ANALYTIC},
        "custom_jvp_call[complex.fft]": fourier,
        "custom_jvp_call[_slogdet_lu]": log_determinant,
        **{f"custom_jvp_call[{own(name)}]": matrix_function() for name in MATRIX},
        # Sums on a log scale
        "cumlogsumexp": cumlogsumexp,
        # Matrix functions
        **dict.fromkeys(("cholesky", "eigh", "lu", "qr", "svd", "reduce"), matrix_function()),
        "custom_linear_solve": linear_solve(),
        "triangular_solve": triangular_solve,
        "tridiagonal_solve": tridiagonal_solve,
        "spsolve": sampled,
        # Sparse arrays
        **dict.fromkeys(("bcoo_dot_general", "bcsr_dot_general"), sparse_product),
        **dict.fromkeys(("coo_matmat", "coo_matvec", "csr_matmat", "csr_matvec"), sparse_product),
        "bcoo_dot_general_sampled": sampled_product,
        **dict.fromkeys(("bcoo_extract", "bcoo_fromdense", "bcoo_todense"), selection),
        **dict.fromkeys(("bcoo_sort_indices", "bcoo_sum_duplicates", "bcoo_transpose"), selection),
        **dict.fromkeys(("bcsr_extract", "bcsr_fromdense", "bcsr_todense"), selection),
        **dict.fromkeys(("coo_fromdense", "coo_todense"), selection),
        **dict.fromkeys(("csr_fromdense", "csr_todense", "todense"), selection),
        # Control flow
        "cond": cond,
        "scan": scan,
        "while": while_loop,
        # Devices
        "shard_map": shard_map,
        **dict.fromkeys(("all_gather", "all_gather_invariant", "all_to_all"), selection),
        **dict.fromkeys(("pbroadcast", "ppermute", "psum", "psum_invariant", "pvary"), selection),
        "reduce_scatter": selection,
        # Calls, and functions with a derivative rule of their own
        **dict.fromkeys(("custom_partitioning", "custom_vmap_call", "xla_metadata_call"), call),
        "custom_vjp_call": custom_vjp,
        "linear_call": linear_call,
        # What is one step: `hesscale_jax.exact`, `hesscale_jax.sampled`
        "region": region,
        # Equinox
        **dict.fromkeys(("announce_jaxpr", "maybe_set", "select_if_vmap"), selection),
        "noinline": matrix_function(),
        "nondifferentiable_backward": selection,
        "vprim": vectorised,
        # Piecewise constant: a path ends
        **dict.fromkeys(("eq", "ge", "gt", "is_finite", "le", "lt", "ne"), constant),
        **dict.fromkeys(("ceil", "floor", "round", "sign", "stop_gradient"), constant),
        **dict.fromkeys(("argmax", "argmin", "eq_to", "le_to", "lt_to"), constant),
        **dict.fromkeys(("nextafter", "and", "or", "not", "xor"), constant),
        **dict.fromkeys(("bitcast_convert_type", "clz", "mulhi", "population_count"), constant),
        **dict.fromkeys(("shift_left", "shift_right_arithmetic", "shift_right_logical"), constant),
        **dict.fromkeys(("random_bits", "random_fold_in", "random_seed", "random_split"), constant),
        **dict.fromkeys(("random_unwrap", "random_wrap"), constant),
        # Effects without a result
        **dict.fromkeys(("check", "dce_sink", "debug_callback", "debug_print"), constant),
        "inspect_sharding": constant,
    }
)
