"""The errors of this library that are not JAX's own."""

__all__ = ["UnsupportedPrimitiveError"]


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
            "if its operands are small, pass hesscale_jax.rules.dense as that rule: it is exact, "
            "by the dense Jacobian",
        ][: 4 if curable else 2]
        listed = "; ".join(f"({i}) {option}" for i, option in enumerate(options, 1))
        super().__init__(
            f"no rule for {primitive!r} (used at {location})"
            f"{': ' + reason if reason else ''}. HesScale cannot carry curvature through it. "
            f"Options: {listed}."
        )
        self.primitive = primitive
        self.location = location
        self.reason = reason
