"""Where the model ends and the loss begins: pure graph analysis, for Gauss-Newton.

Gauss-Newton keeps second derivatives in the loss's head and drops them in the model. The head is
found equation by equation:

- A value is *parameter-like* if it is a differentiated input, or is computed from parameter-like
  values and scalars that do not depend on the inputs. Where the loss itself would come out
  parameter-like, only the inputs count.
- An *entry* is an equation where parameters meet the data's path: one operand is parameter-like and
  the result is not. Where only the inputs count, it is one where an input meets another value that
  moves, or that makes a residual, whose square the loss is affine in: another function of one input
  is no model. If the loss names its model's output (``checkpoint_name(y, "model_output")``),
  those equations are the only entries.
- The *tail* is the equations through which the loss is an affine function of their result. A
  parameter added there, as a penalty is, does not meet the model.
- An equation is in the head when neither it nor anything after it is an entry, the tail left out;
  also when everything after it is tail.

An equation that runs a program, as a loop does, is taken as a whole; the head continues inside of
it if no entry comes after.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Body, Equation, Program, Value

__all__ = ["MODEL_OUTPUT", "LossHead", "check_regions", "names_output"]

MODEL_OUTPUT = "model_output"


class LossHead:
    """The part of a program that belongs to the loss.

    Attributes:
      equations: The equations of the head.
      tail: The equations through which the loss is an affine function of their result.
    """

    def __init__(
        self,
        program: Program,
        path: Iterable[Equation],
        is_affine: Callable[[Equation], bool],
        parameters: Iterable[Value],
        *,
        named: bool,
        only_inputs: bool | None = None,
        moving: Iterable[Value] = (),
        entered: frozenset[Value] = frozenset(),
        bent: frozenset[Value] = frozenset(),
    ) -> None:
        """The head of a program of which the first output leads to the loss.

        Args:
          program: The program.
          path: The equations on a differentiable path to the loss, in program order.
          is_affine: Whether an equation's result is affine in its active operands together.
          parameters: The parameter-like inputs.
          named: Whether the loss names its model's output.
          only_inputs: Whether no other value counts as parameter-like; by default, if the first
            output would.
          moving: The other inputs that may depend on parameters.
          entered: The outputs that an entry comes after.
          bent: The outputs in which the loss is not affine.
        """
        path = list(path)
        computed = {v for eqn in path for v in eqn.outputs}
        self._named = named
        self._like = _parameter_like(program, frozenset(parameters), computed)
        self._only_inputs = program.outputs[0] in self._like if only_inputs is None else only_inputs
        if self._only_inputs:
            self._like = frozenset(parameters)
        self._entered, self._bent = entered, bent
        self._moving = computed.union(parameters, moving)
        self._readers: dict[Value, list[Equation]] = defaultdict(list)
        for eqn in path:
            for value in eqn.inputs:
                self._readers[value].append(eqn)

        self._residuals: set[Value] = set()
        self.tail: set[Equation] = set()
        self._clear: set[Equation] = set()  # no entry from here on
        head: set[Equation] = set()
        for eqn in reversed(path):
            is_name = named and _names_output(eqn)
            linear_after = all(map(self.is_affine_in, eqn.outputs)) and not is_name
            if linear_after and is_affine(eqn):
                self.tail.add(eqn)
            elif linear_after and _is_square(eqn):
                self._residuals.update(eqn.inputs)
            is_entry = is_name if named else self.is_entry(eqn)
            if not is_entry and all(map(self._is_clear_after, eqn.outputs)):
                self._clear.add(eqn)
            if eqn in self._clear or linear_after:
                head.add(eqn)
        self.equations = frozenset(head)

    def inside(
        self,
        eqn: Equation,
        body: Body,
        path: Iterable[Equation],
        is_affine: Callable[[Equation], bool],
    ) -> "LossHead":
        """The head within a program that an equation runs."""
        path = list(path)
        inputs, outputs = body.program.inputs, body.program.outputs
        like = {v for v, i in zip(inputs, body.inputs, strict=True) if eqn.inputs[i] in self._like}
        entered = {
            v for v, y in zip(outputs, eqn.outputs, strict=True) if not self._is_clear_after(y)
        }
        bent = {v for v, y in zip(outputs, eqn.outputs, strict=True) if not self.is_affine_in(y)}
        while True:
            head = LossHead(
                body.program,
                path,
                is_affine,
                like,
                named=self._named,
                only_inputs=self._only_inputs,
                moving=inputs,
                entered=frozenset(entered),
                bent=frozenset(bent),
            )
            # What comes after a step of a loop is the next step.
            before = len(entered) + len(bent) - len(like)
            for i, j in body.carry.items():
                if not head._is_clear_after(inputs[j]):
                    entered.add(outputs[i])
                if not head.is_affine_in(inputs[j]):
                    bent.add(outputs[i])
                if outputs[i] not in head._like:
                    like.discard(inputs[j])
            if len(entered) + len(bent) - len(like) == before:
                return head

    def is_entry(self, eqn: Equation) -> bool:
        """Whether parameters meet what is not computed of them alone."""
        meets = not self._like.isdisjoint(eqn.inputs) and self._like.isdisjoint(eqn.outputs)
        if not self._only_inputs:
            return meets
        is_residual = not self._residuals.isdisjoint(eqn.outputs)
        return is_residual or (meets and len(self._moving.intersection(eqn.inputs)) > 1)

    def is_parameter_like(self, value: Value) -> bool:
        """Whether a value is computed of parameters alone."""
        return value in self._like

    def is_affine_in(self, value: Value) -> bool:
        """Whether the loss is an affine function of the value."""
        return value not in self._bent and self.tail.issuperset(self._readers[value])

    def _is_clear_after(self, value: Value) -> bool:
        """Whether no entry but those of the tail comes after the value."""
        return value not in self._entered and all(
            eqn in self._clear or eqn in self.tail for eqn in self._readers[value]
        )


def names_output(program: Program) -> bool:
    """Whether a program, or one within it, names its model's output."""
    return any(map(_names_output, program.equations))


def check_regions(program: Program) -> None:
    """Raise if the model ends within a region, which belongs to the model or to the head."""
    for eqn in program.equations:
        if eqn.name == "region" and _jaxpr.holds_name(MODEL_OUTPUT, eqn.params):
            raise ValueError(
                f"the region {eqn.params['name']!r} (used at {_jaxpr.location(eqn)}) names its "
                f"{MODEL_OUTPUT!r} inside, so that Gauss-Newton would start in the middle of it. "
                "Name the output outside of the region, or end the region there."
            )
        for body in eqn.bodies:
            check_regions(body.program)


def _names_output(eqn: Equation) -> bool:
    if eqn.name == "name":
        return eqn.params["name"] == MODEL_OUTPUT
    return any(names_output(body.program) for body in eqn.bodies)


def _is_square(eqn: Equation) -> bool:
    if eqn.name in ("dot_general", "mul"):
        return eqn.inputs[0] is eqn.inputs[1]
    return eqn.name == "square" or (eqn.name == "integer_pow" and eqn.params["y"] == 2)


def _parameter_like(
    program: Program, inputs: frozenset[Value], moving: set[Value]
) -> frozenset[Value]:
    like = set(inputs)
    for eqn in program.equations:
        if not like.isdisjoint(eqn.inputs) and all(
            v in like or (not v.shape and v not in moving) for v in eqn.inputs
        ):
            like.update(eqn.outputs)
    return frozenset(like)
