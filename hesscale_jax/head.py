"""Where the model ends and the loss begins: pure graph analysis, for Gauss-Newton.

Gauss-Newton keeps second derivatives in the loss's head and drops them in the model. The head is
found equation by equation:

- A value is *parameter-like* if it is a differentiated input, or is computed from parameter-like
  values and scalars that do not depend on the inputs. Where the loss itself would come out
  parameter-like, only the inputs count.
- An *entry* is an equation where parameters meet the data's path: one operand is parameter-like and
  the result is not. If the loss names its model's output (``checkpoint_name(y, "model_output")``),
  those equations are the only entries.
- The *tail* is the equations through which the loss is an affine function of their result. A
  parameter added there, as a penalty is, does not meet the model.
- An equation is in the head when neither it nor anything after it is an entry, the tail left out;
  also when everything after it is tail.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable

from hesscale_jax._jaxpr import Equation, Program, Value

__all__ = ["MODEL_OUTPUT", "loss_head"]

MODEL_OUTPUT = "model_output"


def loss_head(
    program: Program,
    inputs: Iterable[Value],
    path: Iterable[Equation],
    is_affine: Callable[[Equation], bool],
) -> frozenset[Equation]:
    """The equations of the loss's head.

    Args:
      program: The program; its first output is the loss.
      inputs: The differentiated inputs.
      path: The equations on a differentiable path to the loss, in program order.
      is_affine: Whether an equation's result is affine in its active operands together.
    """
    path = list(path)
    inputs = frozenset(inputs)
    named = {eqn for eqn in path if eqn.name == "name" and eqn.params["name"] == MODEL_OUTPUT}
    entries = named or _entries(program, inputs, path)

    readers = defaultdict(list)
    for eqn in path:
        for value in eqn.inputs:
            readers[value].append(eqn)

    tail: set[Equation] = set()
    clear: set[Equation] = set()  # no entry from here on
    head: set[Equation] = set()
    for eqn in reversed(path):
        after = [reader for value in eqn.outputs for reader in readers[value]]
        linear_after = tail.issuperset(after)
        if linear_after and is_affine(eqn) and eqn not in named:
            tail.add(eqn)
        if eqn not in entries and clear.union(tail).issuperset(after):
            clear.add(eqn)
        if eqn in clear or (linear_after and eqn not in named):
            head.add(eqn)
    return frozenset(head)


def _entries(program: Program, inputs: frozenset[Value], path: list[Equation]) -> set[Equation]:
    like = _parameter_like(program, inputs, {v for eqn in path for v in eqn.outputs})
    if program.outputs[0] in like:
        like = inputs
    return {eqn for eqn in path if not like.isdisjoint(eqn.inputs) and like.isdisjoint(eqn.outputs)}


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
