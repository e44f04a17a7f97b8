"""The errors of this library that are not JAX's own."""

__all__ = ["UnsupportedPrimitiveError", "WhileLoopError"]


class UnsupportedPrimitiveError(NotImplementedError):
    """A primitive between the differentiated arguments and the loss has no rule."""

    def __init__(self, primitive: str, location: str) -> None:
        super().__init__(
            f"no rule for {primitive!r} (used at {location}), so hesscale cannot carry curvature "
            "through it. Options: (1) if no curvature should flow there, wrap its result in "
            "jax.lax.stop_gradient; (2) write the computation with supported primitives "
            "(`hesscale_jax.RULES` lists them); (3) pass a rule of your own: "
            f"hesscale(fun, rules=hesscale_jax.RULES | {{{primitive!r}: rule}}), where "
            "rule(eqn, operands, recurse) returns one Moments per output."
        )
        self.primitive = primitive
        self.location = location


class WhileLoopError(UnsupportedPrimitiveError, ValueError):
    """A ``while_loop`` of unknown length on the path: ``jax.grad`` raises ``ValueError`` for it."""

    def __init__(self, location: str) -> None:
        super().__init__("while", location)
        self.args = (
            "Reverse-mode differentiation does not work for lax.while_loop or lax.fori_loop with "
            f"dynamic start/stop values (used at {location}), here as in jax.grad. Try using "
            "lax.scan, or using fori_loop with static start/stop.",
        )
