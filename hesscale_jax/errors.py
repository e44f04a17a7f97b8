"""The errors of this library that are not JAX's own."""

__all__ = ["ComplexValuesError", "UnsupportedPrimitiveError", "WhileLoopError"]


class UnsupportedPrimitiveError(NotImplementedError):
    """A primitive between the differentiated arguments and the loss has no rule.

    Attributes:
      primitive: Its name.
      location: The line of the loss that uses it.
      reason: Why it has no rule; empty if the library does not know the primitive.
    """

    def __init__(
        self, primitive: str, location: str, reason: str = "", curable: bool = True
    ) -> None:
        """``curable`` says whether a rule passed to ``hesscale`` would help."""
        options = [
            "if no curvature should flow there, wrap its result in jax.lax.stop_gradient",
            "write the computation with supported primitives (`hesscale_jax.RULES` lists them)",
            "pass a rule of your own: "
            f"hesscale(fun, rules=hesscale_jax.RULES | {{{primitive!r}: rule}}), where "
            "rule(eqn, operands, recurse) returns one Moments per output",
            "if its operands are small, pass hesscale_jax.rules.dense as that rule: it is exact "
            "for this one equation, by the dense Jacobian; or take the function around it as one "
            "region, decorated with hesscale_jax.exact or hesscale_jax.sampled",
            "if it acts entry by entry, pass hesscale_jax.rules.nested",
        ][: 2 if not curable else 4 if reason else 5]
        listed = "; ".join(f"({i}) {option}" for i, option in enumerate(options, 1))
        super().__init__(
            f"{reason + ': ' if reason else ''}no rule for {primitive!r} (used at {location}). "
            "HesScale cannot carry curvature through it. "
            f"Options: {listed}."
        )
        self.primitive = primitive
        self.location = location
        self.reason = reason

    def within(self, function: str) -> "UnsupportedPrimitiveError":
        """The same for a function with a derivative rule of its own, in the body of which it is."""
        error = UnsupportedPrimitiveError(self.primitive, self.location, self.reason)
        error.args = (
            f"{self.reason + ': ' if self.reason else ''}no rule for {self.primitive!r} "
            f"(used at {self.location}), which stands in the body of {function!r}. "
            "Its gradient is that of its own rule, but its curvature is taken "
            "from that body. Options: (1) pass the same function written in JAX: hesscale(fun, "
            f"rules=hesscale_jax.RULES | {{{function!r}: hesscale_jax.rules.defined_by(function)}})"
            "; (2) pass a rule of your own instead, where rule(eqn, operands, recurse) returns one "
            "Moments per output; (3) if no curvature should flow there, wrap the result in "
            "jax.lax.stop_gradient.",
        )
        return error


class WhileLoopError(UnsupportedPrimitiveError, ValueError):
    """A ``while_loop`` of unknown length on the path: ``jax.grad`` raises ``ValueError`` for it."""

    def __init__(self, location: str) -> None:
        super().__init__("while", location, "how many steps a while_loop takes is not known")
        self.args = (
            "Reverse-mode differentiation does not work for lax.while_loop or lax.fori_loop with "
            f"dynamic start/stop values (used at {location}), here as in jax.grad. Try using "
            "lax.scan, or using fori_loop with static start/stop.",
        )


class ComplexValuesError(UnsupportedPrimitiveError):
    """Complex values on the path in a primitive that is not written out in real ones."""

    def __init__(self, primitive: str, location: str, reason: str) -> None:
        super().__init__(primitive, location, reason, curable=False)
        self.args = (
            f"complex values on the way to the loss: {primitive!r} (used at {location}) has "
            f"{reason}, in which HesScale carries their curvature. Options: (1) if no curvature "
            "should flow there, wrap its result in jax.lax.stop_gradient; (2) write that step for "
            "real arrays.",
        )
