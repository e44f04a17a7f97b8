"""What has no rule, and why."""

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["OWN_TYPES", "UNSUPPORTED"]

_REF = "mutable arrays are not followed; use the values that are written"
_OPAQUE = "JAX has no derivative of it, as it cannot see what it computes"
_KERNEL = "a kernel works on mutable arrays, which are not followed"
_EXTENDED = "extended dtypes have no variance"
OWN_TYPES = "it acts on types of its own, that have no variance"
_REDUCED = "sums that are still to be taken over devices are not followed"
_PROCESSES = "it moves arrays between processes; do so outside of the loss"

UNSUPPORTED: Mapping[str, str] = MappingProxyType(
    {
        "eig": "JAX has no second derivative of it",
        "reduce_window": "JAX has no reverse-mode derivative of it with an arbitrary reducer",
        **dict.fromkeys(("accum_grad_in_ref", "addupdate", "empty_ref", "free_ref"), _REF),
        **dict.fromkeys(("freeze", "get", "get_global", "new_ref", "run_state", "swap"), _REF),
        **dict.fromkeys(("masked_load", "masked_swap", "mpmd_map", "pallas_call"), _KERNEL),
        "with_memory_space_constraint": _KERNEL,
        **dict.fromkeys(("ffi_call", "io_callback", "pure_callback"), _OPAQUE),
        "bcoo_spdot_general": "JAX has no reverse-mode derivative of it: make one array dense",
        "nontraceable": "Equinox forbids that it be differentiated",
        "composite": "JAX has no derivative of it",
        "igamma_grad_a": "JAX has no derivative of igamma's derivative in its first argument",
        "relayout": "layouts that are part of an array's type are not followed",
        **dict.fromkeys(("stage", "tie"), "it is no part of a traced function"),
        "remat_opt": "its backward pass is decided later; leave out optimize_remat",
        **dict.fromkeys(("from_edtype", "to_edtype"), _EXTENDED),
        **dict.fromkeys(("box_get", "box_set", "new_box"), OWN_TYPES),
        **dict.fromkeys(("log_extend", "log_read", "new_log"), OWN_TYPES),
        **dict.fromkeys(("get_variable", "new_variable", "set_variable"), OWN_TYPES),
        **dict.fromkeys(("all_gather_reduced", "preduced", "reduced_vary_cast"), _REDUCED),
        **dict.fromkeys(("reduced_vary_cast_p", "unreduced_psum", "vary_unreduced_cast"), _REDUCED),
        **dict.fromkeys(("unreduced_reduce_scatter", "vary_unreduced_cast_p"), _REDUCED),
        "pbroadcast_dynamic": "the device that sends is decided while running",
        "ragged_all_to_all": "no rule for it could be tested on a CPU, where it does not run",
        "global_array_to_host_local_array": _PROCESSES,
        "host_local_array_to_global_array": _PROCESSES,
    }
)
"""Primitives that raise ``UnsupportedPrimitiveError``, and the reason it gives."""
