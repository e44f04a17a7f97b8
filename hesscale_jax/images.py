"""Which values are linear images of one source, and where they meet: pure graph analysis.

The sources are the program's inputs and what is curved in them. To first order, a function entry by
entry of leaves' entries is an image of the leaves; after the last product, so is one of their
images, through the curved functions of one block, or of several where that costs little. A product
with a constant is an image of what the other factor is one of; of two factors that move, it is an
image of the leaves alone. What else it mixes, the method takes as independent: the :class:`Part` of
the product that has no form. A loop of affine steps makes an image of what each of them reads.

What is read by one block, or multiplied with each other, *meets* if both are images of one entry of
a source, or one of them takes an entry in more than once. Then spreads entry by entry do not do.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Body, Constant, Equation, Value, is_inexact
from hesscale_jax._mesh import at_mesh_of, lying, on_mesh, replicated
from hesscale_jax.blocks import Block, Plan, is_affine
from hesscale_jax.factored import RENAMED
from hesscale_jax.forms import (
    Blank,
    Factor,
    Form,
    Reader,
    Term,
    TooLarge,
    are_apart,
    combined,
    covariance,
    gated,
    identity,
    known,
    of_atom,
    placed,
    side_by_side,
    together,
    variance,
)
from hesscale_jax.moments import Moments
from hesscale_jax.rules.control_flow import ControlFlow
from hesscale_jax.rules.derivatives import Pointwise
from hesscale_jax.rules.multilinear import Multilinear, met, product_frame
from hesscale_jax.rules.selection import Selection, extremum

__all__ = ["Images", "Part", "images_of"]


class TooMuch(Exception):
    """Deep forms would take too much."""


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """What a product varies by, entry by entry, beside its images of leaves.

    Attributes:
      value: The product.
      form: Its other images.
    """

    value: Value
    form: Form

    @property
    def shape(self) -> tuple[int, ...]:
        """The product's shape."""
        return self.form.shape


# A value of more terms of a source than these, or of more sources, is a source by itself.
MOST_TERMS, MOST_SOURCES = 8, 16

# In a program of more equations than SHORT, the covariances of terms take about MOST_ADDED more, or
# ADDED_PER_EQUATION for each of its own, whichever is more.
SHORT, MOST_ADDED, ADDED_PER_EQUATION = 32, 600, 7

# Deep forms are used if their covariances take about so many equations or fewer.
MOST_DEEP = 800


class Budget(NamedTuple):
    """What covariances may take.

    Attributes:
      multiplied: How many times the program's multiplications.
      larger: How many times as large as the program's largest their arrays may be.
      always: What they may take in any case.
      pairs: Of fewer pairs of an entry and one of a source, and fewer multiplications in factors,
        what they take is not looked at.
    """

    multiplied: int
    larger: int
    always: _jaxpr.Work
    pairs: int


SHALLOW = Budget(16, 4, _jaxpr.Work(2**24, 2**22), 2**20)
DEEP = Budget(16, 2, _jaxpr.Work(2**17, 2**14), 2**14)

# Their slopes are finite where their operands are.
SMOOTH = {"abs", "asinh", "atan", "cos", "erf", "integer_pow", "logistic", "sin", "square", "tanh"}

# Their slopes are finite anyhow, but for those of a sine at infinity, where it has no value.
BOUNDED = {"asinh", "atan", "clamp", "cos", "erf", "logistic", "max", "min", "sin", "tanh"}

# Linear in their operands, by matrices of no more entries than these.
MOST_IN_MATRIX = 2**14

# What may be run where a value's entries are to stay apart.
MOVES = RENAMED | {"add", "and", "concatenate", "eq", "ge", "gt", "iota", "le", "lt", "mul", "ne"}
MOVES |= {"broadcast_in_dim", "gather", "not", "or", "pad", "reduce_sum", "reshape", "select_n"}
MOVES |= {"slice", "squeeze", "sub", "transpose"}


class Needs(NamedTuple):
    """What arrays of forms, and their covariances, are computed from.

    Attributes:
      values: The values whose primals are read.
      sources: The values whose spreads are.
    """

    values: set[Value]
    sources: set[Value]

    def take(self, form: Form) -> None:
        """Add what a form needs."""
        self.values.update(form.reads)
        for source in form.of:
            if isinstance(source, Part):
                self.take(source.form)
            else:
                self.sources.add(source)


def images_of(
    steps: Plan,
    leaves: Iterable[Value],
    last: Iterable[Value],
    apart: Iterable[Value] = frozenset(),
) -> "Images":
    """The forms of a program's values: deep ones, if these cost little, else those near the loss.

    What they add to a program so grows with its length, and no faster. The arguments are those of
    :class:`Images`.
    """
    given = steps, frozenset(leaves), frozenset(last), frozenset(apart)
    found = Images(*given)
    if found.stops:
        with contextlib.suppress(TooMuch):
            deep = Images(*given, deep=True)
            if deep.equations(MOST_DEEP) <= MOST_DEEP:
                return deep
    count = len(steps.rules)
    most = max(MOST_ADDED, ADDED_PER_EQUATION * count)
    if count > SHORT and found.equations(most) > most:
        too_early, late = 0, count
        while late - too_early > 1:
            since = (too_early + late) // 2
            if Images(*given, since).equations(most) > most:
                too_early = since
            else:
                late = since
        found = Images(*given, late)
    return found


class Images:
    """The forms of a program's values.

    Attributes:
      blocks: For each block in which images of one source meet, the forms of what it reads, in its
        frame, where spreads do not do.
      products: For each product of two images of one source, the forms of its factors.
      cut: The blocks and products whose images are left out, as they would take too much.
      needs: The equations at which forms are used, with what they need.
      stops: Whether deep forms would go further.
    """

    def __init__(
        self,
        steps: Plan,
        leaves: Iterable[Value],
        last: Iterable[Value],
        apart: Iterable[Value] = frozenset(),
        since: int = 0,
        deep: bool = False,
    ) -> None:
        """Find the forms of all values on a path.

        Args:
          steps: The plan of the program.
          leaves: The inputs that are leaves, or whose entries are independent as those are.
          last: The outputs after which nothing mixes entries, as after a network's last layer.
          apart: The inputs that no form is to be in.
          since: The number of the equation since which a value may have more than one term.
          deep: Whether forms go through the curved functions of more than one block, and the last
            product is one of two values that do not depend on the same inputs.

        Raises:
          TooMuch: If what meets takes more than what deep forms may.
        """
        self._steps = steps
        self._deep = deep
        self.last = frozenset(_unmixed(steps, last, deep))
        self.stops = not deep and self.last != _unmixed(steps, last, True)
        self._apart = frozenset(apart)
        self._forms: dict[Value, Form] = {}
        self._leaves = frozenset(leaves)
        self._multiplied: set[Value] = set()  # what is computed of products, or sums
        self._bent: set[Value] = set()  # whose forms are of curved functions of products
        # The values each entry of which depends on one entry of each leaf, the same for all.
        self._separate = set(self._leaves)
        self.products: dict[Equation, tuple[Form, Form]] = {}
        self.cut: set[Block | Equation] = set()
        self._multiplications = 0  # those that covariances take
        self._home: dict[Value, Block] = {}  # the block that makes a value
        self._taken_from: dict[Value, Value] = {}  # selections and sums of a value
        for number, eqn in enumerate(steps.rules):
            limits = (MOST_TERMS, MOST_SOURCES) if number >= since else (1, 1)
            self._add(eqn, limits)
        self.blocks = dict(self._met_in_blocks())
        self.needs = list(self._needed())

    def equations(self, most: int) -> int:
        """About how many equations the covariances take; beyond ``most``, not all are counted."""
        met = [*map(dict.values, self.blocks.values()), *self.products.values()]
        pairs = (itertools.combinations_with_replacement(forms, 2) for forms in met)
        count = 0
        for a, b in itertools.chain(*pairs):
            count += sum(_equations(a, b, source) for source in a.of.keys() & b.of.keys())
            if count > most:
                break
        return count

    def of(self, value: Value) -> Form:
        """The form of a value."""
        if value not in self._forms:
            self._forms[value] = identity(value)
        return self._forms[value]

    def leaves_within(self, eqn: Equation, body: Body) -> set[Value]:
        """The inputs of a body that are leaves here, what a loop carries left out."""
        carried = set(body.carry.values())
        inputs = enumerate(zip(body.program.inputs, body.inputs, strict=True))
        return {v for j, (v, i) in inputs if j not in carried and eqn.inputs[i] in self._leaves}

    def last_within(self, eqn: Equation, body: Body, steps: Plan) -> set[Value]:
        """The outputs of a body after which nothing mixes entries, within it or here."""
        outputs, inputs = body.program.outputs, body.program.inputs
        last = {y for y, v in zip(outputs, eqn.outputs, strict=True) if v in self.last}
        while True:
            # What a step hands on is read by all that comes after in the next one.
            unmixed = _unmixed(steps, last, self._deep)
            handed_on = {
                outputs[i]
                for i, j in body.carry.items()
                if inputs[j] in steps.active and inputs[j] not in unmixed
            }
            if last.isdisjoint(handed_on):
                return last
            last -= handed_on

    def _needed(self) -> Iterable[tuple[Equation, Needs]]:
        used: list[tuple[Equation, Iterable[Form]]] = list(self.products.items())
        # In each region that a block reaches, they are used anew.
        first = {(block, eqn.region): eqn for eqn, block in reversed(self._steps.blocks.items())}
        used += [
            (eqn, self.blocks[block].values())
            for (block, _), eqn in first.items()
            if block in self.blocks
        ]
        for eqn, forms in used:
            needs = Needs(set(), set())
            for form in forms:
                needs.take(form)
            if eqn in self.products:
                needs.values.update(v for v in eqn.inputs if isinstance(v, Value))
            yield eqn, needs

    # What meets

    def _met_in_blocks(self) -> Iterable[tuple[Block, dict[Value, Form]]]:
        members: dict[Block, list[Equation]] = {}
        for eqn, block in self._steps.blocks.items():
            members.setdefault(block, []).append(eqn)
        for block, equations in members.items():
            if block.cut or block.along:
                continue
            made = {v for eqn in equations for v in eqn.outputs}
            reads = dict.fromkeys(v for eqn in equations for v in self._active(eqn))
            # What a loop of the block scans over lies nowhere in it.
            entering = [v for v in reads if v not in made and v in block.spans]
            if self.last.isdisjoint(made):
                # Between layers, only what is taken from one leaf: one weight is one number.
                origins = [self._taken_from.get(v, v) for v in entering]
                entering = [
                    v
                    for v, x in zip(entering, origins, strict=True)
                    if x in self._leaves and origins.count(x) > 1
                ]
            met = self._met(block, list(filter(_is_known, entering)))
            if met:
                yield block, met

    def _met(self, block: Block, values: list[Value]) -> dict[Value, Form]:
        if not all(isinstance(n, int) for n in block.frame):
            return {}
        try:
            forms = {v: self.of(v).reshaped(block.view(block.spans[v])) for v in values}
            any_weight = Factor(block.frame, frozenset(), lambda read: None)
            added_up = {
                v: form.times(any_weight).summed(block.reduced)
                for v, form in forms.items()
                if set(form.of) - set(values)
            }
        except TooLarge:
            return {}
        dims = block.reduced
        met = {v for v, form in forms.items() if self._meets_itself(v, form, block)}
        for a, b in itertools.combinations(values, 2):
            if not {a, b} <= met and _meet(forms[a], forms[b], dims):
                met |= {a, b}
        found = {v: forms[v] for v in values if v in met}
        taken = [*found.values()], [form for v, form in added_up.items() if v in met and dims]
        affordable = self._afford(block, found.values(), functools.partial(_covaried, taken))
        return found if affordable else {}

    def _meets_itself(self, value: Value, form: Form, block: Block) -> bool:
        """Whether the spreads of a value's entries do not say how they vary within the block."""
        for source, terms in form.of.items():
            if source is value:
                continue
            if not all(t.once for t in terms):
                return True
            pairs = itertools.combinations(terms, 2)
            if any(_overlap(s, t, block.reduced, len(block.frame)) for s, t in pairs):
                return True
            if source in self._separate and any(
                block.frame[dim] != 1 and not t.separates(dim)
                for dim in block.reduced
                for t in terms
            ):
                return True
        return False

    def _afford(
        self,
        place: Block | Equation,
        forms: Collection[Form],
        covariances: Callable[[Callable[[Any], Any], Reader], Any],
    ) -> bool:
        """Whether covariances cost little beside the program. If so they are taken, else cut.

        Args:
          place: Where images meet.
          forms: Their forms.
          covariances: Computes them from a function that gives sources' spreads, and a reader.
        """
        budget = DEEP if self._deep else SHALLOW
        pairs = (math.prod((*form.shape, *x.shape)) for form in forms for x in form.of)
        if sum(pairs) + sum(form.multiplied for form in forms) <= budget.pairs:
            return True

        def compute() -> Any:
            reader = Blank()

            def vary(source: Any) -> Any:
                if isinstance(source, Part):
                    return variance(source.form, vary, reader)
                return reader.once(source, jnp.zeros, source.shape, reader.dtype)

            return covariances(vary, reader)

        traced = _jaxpr.trace(compute)
        taken, program = _jaxpr.work(traced.jaxpr.eqns), self._work
        count = self._multiplications + taken.multiplications
        most = max(budget.always.multiplications, budget.multiplied * program.multiplications)
        largest = max(budget.always.largest, budget.larger * program.largest)
        if count > most or taken.largest > largest:
            if self._deep:
                raise TooMuch
            self.cut.add(place)
            return False
        self._multiplications = count
        return True

    @functools.cached_property
    def _work(self) -> _jaxpr.Work:
        return _jaxpr.work(self._steps.rules)

    def _active(self, eqn: Equation) -> list[Value]:
        return [v for v in eqn.inputs if v in self._steps.active]

    # The forms, in program order

    def _add(self, eqn: Equation, limits: tuple[int, int]) -> None:
        rule = self._steps.rules[eqn]
        if not all(map(_is_known, (*eqn.inputs, *eqn.outputs))):
            return
        if self._is_cut(eqn):
            return  # Forms would grow with its length.
        if isinstance(rule, Selection) and len(self._active(eqn)) == 1:
            (x,) = self._active(eqn)
            self._taken_from.update(dict.fromkeys(eqn.outputs, self._taken_from.get(x, x)))
        if isinstance(rule, Pointwise):
            (y,) = eqn.outputs
            if all(v in self._separate and v.shape == y.shape for v in self._active(eqn)):
                self._separate.add(y)
        try:
            forms = self._images(eqn, rule)
        except TooLarge:
            forms = None
        for reached in (self._multiplied, self._bent):
            if not reached.isdisjoint(self._active(eqn)):
                reached.update(eqn.outputs)
        if eqn.name == "dot_general" or any(map(_adds_up, forms or ())):
            self._multiplied.update(eqn.outputs)
        for value, form in zip(eqn.outputs, forms or (), strict=False):
            form = _of_few_terms(form, *limits)
            if not form.of or not self._apart.isdisjoint(form.of):
                continue
            if self._is_whole(eqn, form):
                self._forms[value] = form
        if eqn in self._steps.blocks:
            self._home.update(dict.fromkeys(eqn.outputs, self._steps.blocks[eqn]))

    def _is_whole(self, eqn: Equation, form: Form) -> bool:
        """Whether a form says how its entries vary, as far as their block does.

        The block alone knows how values that it makes covary.
        """
        block = self._steps.blocks.get(eqn)
        inside = block is not None and any(self._home.get(x) is block for x in form.of)
        terms = [t for terms in form.of.values() for t in terms]
        return not inside or (len(terms) == 1 and not terms[0].summed)

    def _is_cut(self, eqn: Equation) -> bool:
        block = self._steps.blocks.get(eqn)
        return block is not None and block.cut

    def _images(self, eqn: Equation, rule: Any) -> list[Form] | None:
        active = [i for i, v in enumerate(eqn.inputs) if v in self._steps.active]
        if isinstance(rule, Pointwise):
            return self._pointwise(eqn, rule, active)
        if eqn in self._steps.loops and (made := self._loop(eqn, active)):
            return made
        if eqn.name == "dot_general":
            return self._product(eqn, active)
        if _is_linear(eqn, active):
            wanted = [k for k, y in enumerate(eqn.outputs) if y in self._steps.active]
            return _by_unit_vectors(eqn, {i: self.of(eqn.inputs[i]) for i in active}, wanted)
        if not isinstance(rule, Selection):
            return None
        forms = [self.of(v) if v in self._steps.active else None for v in eqn.inputs]
        if eqn.name in RENAMED and len(forms) == len(eqn.outputs):
            shapes = (tuple(v.shape) for v in eqn.outputs)
            return [form or Form(shape, {}) for form, shape in zip(forms, shapes, strict=True)]
        image = SELECTIONS.get(eqn.name)
        return None if image is None else image(eqn, *forms)

    def _pointwise(self, eqn: Equation, rule: Pointwise, active: list[int]) -> list[Form] | None:
        (y,), shape = eqn.outputs, tuple(eqn.outputs[0].shape)
        forms = [_aligned(self.of(eqn.inputs[i]), shape) for i in active]
        bends = not rule.affine(active)
        last = y in self.last and not self._multiplied.isdisjoint(self._active(eqn))
        entrywise = all(
            (x in self._leaves or (last and isinstance(x, Part)))
            and len(terms) <= MOST_TERMS
            and (last or not any(t.summed for t in terms))
            for form in forms
            for x, terms in form.of.items()
        )
        # A choice discards infinities; of those that abs takes, it keeps all but at 0.
        cuts = eqn.name == "select_n" or rule.cuts
        chosen = cuts and eqn.name != "abs"
        # Before the last product, what may be infinite is its own source: that takes fewer terms.
        finite = last or all(t.finite for form in forms for ts in form.of.values() for t in ts)
        if (not entrywise and bends) or (chosen and not (entrywise and finite)):
            return self._source(eqn, rule, cuts, active)
        if bends and not self._deep and any(map(_adds_up, forms)):
            block = self._steps.blocks.get(eqn)
            if any(self._home.get(v) is not block for v in self._bent.intersection(eqn.inputs)):
                self.stops = True
                return None  # of what another block makes
            self._bent.add(y)
        image = Form(shape, {})
        for i, form in zip(active, forms, strict=True):
            slope = _slope(eqn, rule, i)
            if isinstance(slope, float):
                image = image.plus(form, slope)
            else:
                by = _aligned_factor(slope, shape)
                image = image.plus(form.times(by, gate=by if cuts else None))
        return [image]

    def _source(
        self, eqn: Equation, rule: Pointwise, cuts: bool, active: list[int]
    ) -> list[Form] | None:
        """A value as its own source, with the gates of what it is a function of."""
        (y,), shape = eqn.outputs, tuple(eqn.outputs[0].shape)
        if len(active) != 1:
            return None
        (i,), gates = active, tuple[Factor, ...]()
        form = _aligned(self.of(eqn.inputs[i]), shape)
        terms = [t for terms in form.of.values() for t in terms]
        if len(terms) == 1 and not terms[0].summed:
            gates = terms[0].gates
        if cuts:
            slope = _slope(eqn, rule, i)
            assert isinstance(slope, Factor)
            gates = (*gates, _aligned_factor(slope, shape))
        return [gated(y, gates)] if gates else None

    def _loop(self, eqn: Equation, active: list[int]) -> list[Form] | None:
        """What affine steps make, entry by entry of their block, of what each of them reads."""
        through, block = self._steps.loops[eqn], self._steps.blocks[eqn]
        body = through.plan
        affine = all(is_affine(e, rule, body.active) for e, rule in body.rules.items())
        if not affine or any(eqn.inputs[i] in through.scanned for i in active):
            return None
        forms = [Form(tuple(y.shape), {}) for y in eqn.outputs]
        for k in through.carries:
            y = eqn.outputs[k]
            shape = block.view(block.spans[y])
            form = Form(shape, {})
            for i in active:
                x = eqn.inputs[i]
                if x not in through.depends[k]:
                    continue
                slope = _slope_of_loop(eqn, i, k).reshaped(shape)
                form = form.plus(self.of(x).reshaped(block.view(block.spans[x])).times(slope))
            forms[k] = form.reshaped(y.shape)
        return forms

    def _product(self, eqn: Equation, active: list[int]) -> list[Form] | None:
        frame, places, contracted = product_frame(eqn)
        full = {i: self.of(eqn.inputs[i]).placed(frame, places[i]) for i in active}
        same = len({self._taken_from.get(v, v) for v in eqn.inputs}) == 1
        last = eqn.outputs[0] in self.last
        meets = len(active) == 2 and (same or last) and _meet(full[0], full[1], contracted)
        multiplied = functools.partial(_multiplied, eqn, full)
        meets = meets and self._afford(eqn, full.values(), multiplied)
        if meets:
            self.products[eqn] = full[0], full[1]
        shape = tuple(eqn.outputs[0].shape)
        y, parts = Form(shape, {}), Form(shape, {})
        for i in active:
            operand, other = eqn.inputs[i], eqn.inputs[1 - i]
            by = placed(dataclasses.replace(of_atom(other), safe=True), len(frame), places[1 - i])
            form = full[i]
            self.stops |= operand in self._bent
            if operand in self._bent or (len(active) == 2 and not meets and _adds_up(form)):
                form = identity(operand).placed(frame, places[i])
            image = form.times(by).summed(contracted).reshaped(shape)
            mixed = image.of.keys() - self._separate
            y = y.plus(Form(shape, {x: t for x, t in image.of.items() if x not in mixed}))
            parts = parts.plus(Form(shape, {x: image.of[x] for x in mixed}))
        if not y.of:
            return None
        return [y.plus(identity(Part(eqn.outputs[0], parts))) if parts.of else y]


def _adds_up(form: Form) -> bool:
    """Whether a term adds up entries of its source."""
    return any(t.summed for terms in form.of.values() for t in terms)


def _unmixed(steps: Plan, last: Iterable[Value], deep: bool) -> set[Value]:
    """The values after which no product, and no rule of another kind, mixes entries.

    Going deep, nor does a product of two that depend on the same inputs.
    """
    read, mixed = set(last), set[Value]()
    reached: dict[Value, frozenset[Value]] = {}  # the inputs that a value depends on
    for eqn in steps.rules if deep else ():
        of = (reached.setdefault(v, frozenset([v])) for v in eqn.inputs if v in steps.active)
        reached.update(dict.fromkeys(eqn.outputs, frozenset[Value]().union(*of)))
    for eqn, rule in reversed(steps.rules.items()):
        active = [v for v in eqn.inputs if v in steps.active]
        keeps = (
            eqn in steps.blocks
            or isinstance(rule, Selection | Pointwise)
            or (
                isinstance(rule, Multilinear)
                and (len(active) == 1 or (deep and len({reached[v] for v in active}) == 1))
            )
            or (isinstance(rule, ControlFlow) and _only_selects(eqn))
            or _is_linear(eqn, [i for i, v in enumerate(eqn.inputs) if v in steps.active])
        )
        moving = steps.active.intersection(eqn.outputs)
        if not keeps or not mixed.isdisjoint(moving) or not moving <= read:
            mixed.update(active)
        read.update(active)
    return read - mixed


def _of_few_terms(form: Form, most_terms: int, most_sources: int) -> Form:
    """With terms of known arrays as one where there are too many; empty if that does not do."""

    def are_few(terms: Sequence[Term]) -> bool:
        return len(terms) <= most_terms

    of = {
        x: terms if are_few(terms) else tuple(together(terms, len(form.shape), x.shape))
        for x, terms in form.of.items()
    }
    few = len(of) <= most_sources and all(map(are_few, of.values()))
    return Form(form.shape, of if few else {})


def _only_selects(eqn: Equation) -> bool:
    """Whether what an equation runs only moves entries."""
    inner = [e for body in eqn.bodies for e in body.program.equations]
    return all(_only_selects(e) if e.bodies else e.name in MOVES for e in inner)


def _is_known(value: Any) -> bool:
    return all(isinstance(n, int) for n in value.shape)


def _equations(a: Form, b: Form, source: Any) -> int:
    """About how many a covariance of two images of a source takes."""
    left, right = (together(form.of[source], len(a.shape), source.shape) for form in (a, b))
    distinct = itertools.combinations_with_replacement(left, 2)
    pairs = distinct if a is b else itertools.product(left, right)
    return sum(_equations_of(s, t) for s, t in pairs if not are_apart(s, t, len(a.shape)))


def _equations_of(s: Term, t: Term) -> int:
    """To multiply, add and contract factors, to compare indices, and to take a spread at some."""
    factors = {f for f in (*s.factors, *t.factors) if any(isinstance(v, Value) for v in f.reads)}
    count = 2 + len(factors) + (12 if factors and (s.summed or t.summed) else 0)
    for i, j in zip(s.at, t.at, strict=True):
        if isinstance(i, int) and isinstance(j, int):
            continue
        if isinstance(i, int) or isinstance(j, int):
            count += 4
        else:
            count += (0 if i.same(j) else 2) + (2 if i.static is None else 0)
    return count


def _covaried(
    groups: Iterable[Sequence[Form]], vary: Callable[[Any], Any], reader: Reader
) -> list[Any]:
    """The covariances of the forms of each group."""
    return [
        covariance(a.of[x], b.of[x], vary(x), a.shape, reader)
        for forms in groups
        for a, b in itertools.combinations_with_replacement(forms, 2)
        for x in a.of.keys() & b.of.keys()
    ]


def _multiplied(
    eqn: Equation, forms: Mapping[int, Form], vary: Callable[[Any], Any], reader: Reader
) -> list[Any]:
    """The moments of a product of two images of one source, but for its primal."""
    (y,) = eqn.outputs
    result = Moments(jnp.zeros(y.shape, y.dtype))
    _, *moments = met(eqn, result, (forms[0], forms[1]), vary, lambda dtype: reader, True)
    return moments


def _meet(a: Form, b: Form, dims: Sequence[int]) -> bool:
    """Whether two values share entries of a source: at one position, or any along some axes."""
    return any(
        _overlap(s, t, dims, len(a.shape))
        for source in a.of.keys() & b.of.keys()
        for s in a.of[source]
        for t in b.of[source]
    )


def _overlap(s: Term, t: Term, dims: Sequence[int], rank: int) -> bool:
    if not dims and are_apart(s, t, rank):
        return False
    for i, j in zip(s.at, t.at, strict=True):
        if isinstance(i, int) or isinstance(j, int) or i.static is None or j.static is None:
            continue
        varies = any(i.shape[d] != 1 or j.shape[d] != 1 for d in dims)
        shared = np.intersect1d(i.static, j.static).size if varies else (i.static == j.static).any()
        if not shared:
            return False
    return True


# Pointwise


def _slope(eqn: Equation, rule: Pointwise, i: int) -> Factor | float:
    """The slope of an equation in an operand."""
    if rule.slopes is not None:
        return rule.slopes[i]
    if eqn.name == "mul":
        return of_atom(eqn.inputs[1 - i])
    if eqn.name == "div" and i == 0:
        other = of_atom(eqn.inputs[1])
        return other.mapped(lambda x: 1 / x, other.shape)
    if eqn.name == "select_n":
        which = of_atom(eqn.inputs[0])
        chosen = which.mapped(lambda x: x.astype("int32") == i - 1, which.shape)
        return dataclasses.replace(chosen, safe=True)
    (y,) = eqn.outputs
    reads = frozenset(v for v in (*eqn.inputs, y) if isinstance(v, Value))

    def slope(read: Reader) -> Any:
        operands, result = list(map(read, eqn.inputs)), read(y)
        if not _jaxpr.takes(eqn, operands):
            operands = [_as(v, x) for v, x in zip(eqn.inputs, operands, strict=True)]
            result = _as(y, result)
        found, _ = rule.derivatives(eqn, result, operands, [i])
        return jnp.broadcast_to(read.number(found.get(i, 0.0)), y.shape)

    is_finite = eqn.name in SMOOTH and eqn.params.get("y", 1) >= 0
    compute = _at_home(eqn, slope)
    return Factor(tuple(y.shape), reads, compute, finite=is_finite, safe=eqn.name in BOUNDED)


def _at_home(eqn: Equation, compute: Callable[[Reader], Any]) -> Callable[[Reader], Any]:
    """The same on the mesh of an equation, which it runs."""

    def compute_there(read: Reader) -> Any:
        with at_mesh_of(eqn.outputs[0].aval):
            return compute(read)

    return compute_there


def _slope_of_loop(eqn: Equation, i: int, k: int) -> Factor:
    """The slope of a loop's result in an operand: linear, entry by entry."""

    def slope(read: Reader) -> Any:
        operands = [_as(v, x) for v, x in zip(eqn.inputs, map(read, eqn.inputs), strict=True)]

        def result(x: Any) -> Any:
            return _run(eqn, *operands[:i], x, *operands[i + 1 :])[k]

        _, along = jax.jvp(result, [operands[i]], [jnp.ones_like(operands[i])])
        return read.number(along)

    reads = frozenset(v for v in eqn.inputs if isinstance(v, Value))
    return Factor(tuple(eqn.outputs[k].shape), reads, _at_home(eqn, slope))


def _is_linear(eqn: Equation, active: Sequence[int]) -> bool:
    """Whether a solve, a window or a loop is affine in its operands at these positions."""
    match eqn.name:
        case "conv_general_dilated" | "reduce_window_sum":
            return len(active) == 1
        case "triangular_solve":
            return active == [1]
        case "custom_linear_solve":
            return min(active) >= sum(eqn.params["const_lengths"])
        case "scan":
            return _is_linear_loop(eqn, active)
    return _jaxpr.label(eqn) == "custom_jvp_call[complex.fft]"


def _is_linear_loop(eqn: Equation, active: Sequence[int]) -> bool:
    (body,) = eqn.bodies
    if eqn.sources[0].effects:
        return False  # They would take place again.
    inputs, outputs = body.program.inputs, body.program.outputs
    moving = {v for v, i in zip(inputs, body.inputs, strict=True) if i in active}
    while True:
        reached = set(moving)
        for e in body.program.equations:
            at = [i for i, v in enumerate(e.inputs) if v in reached]
            if at and not _is_linear_step(e, at):
                return False
            reached.update(filter(is_inexact, e.outputs) if at else ())
        more = {inputs[j] for i, j in body.carry.items() if outputs[i] in reached}
        if more <= moving:
            return True
        moving |= more


def _is_linear_step(eqn: Equation, at: Sequence[int]) -> bool:
    if eqn.name in _jaxpr.IMAGES:
        several = eqn.name not in _jaxpr.PRODUCTS or eqn.name == "select_n"
        return (several or len(at) == 1) and not (eqn.name == "div" and at != [0])
    if eqn.name in ("dynamic_update_slice", "scatter"):
        return True
    return eqn.name in RENAMED or _is_linear(eqn, at)


def _by_unit_vectors(
    eqn: Equation, forms: Mapping[int, Form], wanted: Sequence[int]
) -> list[Form] | None:
    """What is affine in operands, by matrices, if they are small."""
    sizes = {k: math.prod(eqn.outputs[k].shape) for k in wanted}
    into = {i: math.prod(eqn.inputs[i].shape) for i in forms}
    if sum(sizes.values()) * sum(into.values()) > MOST_IN_MATRIX:
        return None
    images = [Form(tuple(y.shape), {}) for y in eqn.outputs]
    for i, x in forms.items():
        for k in wanted:
            m, n = sizes[k], into[i]
            by = _matrix(eqn, i, k)
            apart = x.reshaped((n,)).placed((m, n), [1])
            image = apart.through(by).summed([1]).reshaped(images[k].shape)
            images[k] = images[k].plus(image)
    return images


def _matrix(eqn: Equation, i: int, k: int) -> Factor:
    """The derivative of a result in an operand, which does not depend on it."""
    operand, y = eqn.inputs[i], eqn.outputs[k]
    m, n = math.prod(y.shape), math.prod(operand.shape)

    def matrix(read: Reader) -> Any:
        operands = [
            _as(v, v.value if isinstance(v, Constant) else on_mesh(read.primal(v)))
            for v in eqn.inputs
        ]

        def result(x: Any) -> Any:
            return _run(eqn, *operands[:i], x, *operands[i + 1 :])[k]

        def image(unit: Any) -> Any:
            unit = lying(unit.reshape(operand.shape), operand.aval)
            return jax.jvp(result, [operands[i]], [unit])[1]

        columns = jax.vmap(image, out_axes=-1)(jnp.eye(n, dtype=operand.dtype))
        return replicated(columns).reshape(m, n)

    reads = frozenset(v for v in eqn.inputs if isinstance(v, Value))
    return Factor((m, n), reads, _at_home(eqn, matrix), safe=True)


def _run(eqn: Equation, *operands: Any) -> list[Any]:
    """The results, of a loop without what its steps compute for nothing."""
    changes = {}
    if eqn.name == "scan":
        changes["jaxpr"] = _jaxpr.without_dead_code(eqn.params["jaxpr"])
    return _jaxpr.listed(_jaxpr.bind(eqn, *operands, **changes), eqn)


def _as(atom: Value | Constant, x: Any) -> Any:
    return lax.convert_element_type(x, atom.dtype)


def _aligned(form: Form, shape: Sequence[int]) -> Form:
    """With ones before its axes, as operands of one equation are broadcast."""
    if len(form.shape) == len(shape):
        return Form(tuple(shape), form.of)
    return form.placed(shape, ())


def _aligned_factor(f: Factor, shape: Sequence[int]) -> Factor:
    return f if len(f.shape) == len(shape) else f.reshaped((1,) * len(shape))


# Selections


def _shape(eqn: Equation) -> tuple[int, ...]:
    return tuple(eqn.outputs[0].shape)


def _broadcast(eqn: Equation, x: Form, *_: Any) -> list[Form]:
    return [x.placed(_shape(eqn), eqn.params["broadcast_dimensions"])]


def _reshape(eqn: Equation, x: Form, *_: Any) -> list[Form]:
    return [x.reshaped(_shape(eqn))]


def _transpose(eqn: Equation, x: Form) -> list[Form]:
    return [x.transposed(eqn.params["permutation"])]


def _along(x: Form, dim: int, index: Any) -> Form:
    """At positions along one axis."""
    index = index if isinstance(index, Factor) else known(np.asarray(index))
    order = [*range(1, dim + 1), 0, *range(dim + 1, len(x.shape))]
    return x.taken([dim], [index]).transposed(order)


def _slice(eqn: Equation, x: Form) -> list[Form]:
    p = eqn.params
    strides = p["strides"] or (1,) * len(x.shape)
    for dim, bounds in enumerate(zip(p["start_indices"], p["limit_indices"], strides, strict=True)):
        if bounds != (0, x.shape[dim], 1):
            x = _along(x, dim, np.arange(*bounds))
    return [x]


def _rev(eqn: Equation, x: Form) -> list[Form]:
    for dim in eqn.params["dimensions"]:
        x = _along(x, dim, np.arange(x.shape[dim])[::-1])
    return [x]


def _pad(eqn: Equation, x: Form | None, value: Form | None) -> list[Form] | None:
    if x is None or value is not None:
        return None
    for dim, (low, _, inner) in enumerate(eqn.params["padding_config"]):
        n, size = x.shape[dim], _shape(eqn)[dim]
        at = np.arange(size) - low
        index = np.where((at >= 0) & (at % (inner + 1) == 0), at // (inner + 1), -1)
        index = np.where(index < n, index, -1)
        if size != n or not np.array_equal(index, np.arange(n)):
            x = _along(x, dim, index)
    return [x]


def _concatenate(eqn: Equation, *parts: Form | None) -> list[Form]:
    dim, shape = eqn.params["dimension"], _shape(eqn)
    sizes = [v.shape[dim] for v in eqn.inputs]
    of = [{} if part is None else part.of for part in parts]
    joined, start = dict[Any, tuple[Term, ...]](), 0
    for source in of[0]:
        terms = [each.get(source, ()) for each in of]
        if all(len(each) == 1 for each in terms):
            term = side_by_side([term for (term,) in terms], dim, sizes)
            joined |= {source: (term,)} if term else {}
    y = Form(shape, joined)
    for part, n in zip(parts, sizes, strict=True):
        at = np.arange(shape[dim]) - start
        start += n
        if part is not None and n:
            rest = Form(part.shape, {x: t for x, t in part.of.items() if x not in joined})
            y = y.plus(_along(rest, dim, np.where((at >= 0) & (at < n), at, -1)))
    return [y]


def _stack(eqn: Equation, *parts: Form | None) -> list[Form]:
    dim, shape = eqn.params["axis"], _shape(eqn)
    at = [i for i in range(len(shape)) if i != dim]
    y = Form(shape, {})
    for k, part in enumerate(parts):
        if part is not None:
            here = np.arange(shape[dim]) == k
            by = known(here.reshape([n if i == dim else 1 for i, n in enumerate(shape)]))
            y = y.plus(part.placed(shape, at).times(by, gate=by))
    return [y]


def _split(eqn: Equation, x: Form) -> list[Form]:
    dim = eqn.params["axis"]
    sizes = eqn.params["sizes"]
    starts = [0, *itertools.accumulate(sizes)]
    return [_along(x, dim, np.arange(s, s + n)) for s, n in zip(starts, sizes, strict=False)]


def _unstack(eqn: Equation, x: Form) -> list[Form]:
    dim = eqn.params["axis"]
    return [
        _along(x, dim, np.array([k])).reshaped(tuple(v.shape)) for k, v in enumerate(eqn.outputs)
    ]


def _dynamic_slice(eqn: Equation, x: Form | None, *starts: Any) -> list[Form] | None:
    if x is None:
        return None
    for dim, (n, atom) in enumerate(zip(_shape(eqn), eqn.inputs[1:], strict=True)):
        size = x.shape[dim]
        if n != size:
            index = combined(
                lambda s, n=n, size=size: s.astype(int).clip(0, size - n) + np.arange(n),
                (n,),
                of_atom(atom),
            )
            x = _along(x, dim, dataclasses.replace(index, within=True))
    return [x]


def _reduce_sum(eqn: Equation, x: Form) -> list[Form]:
    return [x.summed(eqn.params["axes"]).reshaped(_shape(eqn))]


def _reduce_extremum(eqn: Equation, x: Form) -> list[Form]:
    (operand,), (y,) = eqn.inputs, eqn.outputs

    def taken(x: Any, y: Any) -> Any:
        return extremum.weights(eqn, [x], y)

    by = combined(taken, x.shape, of_atom(operand), of_atom(y))
    return [x.through(by).summed(eqn.params["axes"]).reshaped(_shape(eqn))]


def _psum(eqn: Equation, x: Form, *others: Form | None) -> list[Form] | None:
    axes = eqn.params["axes"]
    if others or not all(isinstance(axis, int) for axis in axes):
        return None
    return [x.summed(axes).reshaped(_shape(eqn))]


def _cumsum(eqn: Equation, x: Form) -> list[Form]:
    dim, rank = eqn.params["axis"], len(x.shape)
    n = x.shape[dim]
    taken_in = np.tri(n, dtype=bool)  # a row for each result
    taken_in = taken_in.T if eqn.params["reverse"] else taken_in
    shape = (*x.shape[:dim], n, *x.shape[dim:])
    apart = x.placed(shape, [i if i < dim else i + 1 for i in range(rank)])
    weights = known(taken_in.reshape([n if i in (dim, dim + 1) else 1 for i in range(rank + 1)]))
    return [apart.times(weights).summed([dim + 1]).reshaped(_shape(eqn))]


def _gather(eqn: Equation, x: Form | None, *_: Any) -> list[Form] | None:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    batching = tuple(numbers.operand_batching_dims)
    dims = [*numbers.start_index_map, *batching]
    if x is None or any(sizes[i] != 1 for i in dims):
        return None
    rest = [i for i in range(len(x.shape)) if i not in dims]
    if not dims or any(sizes[i] != x.shape[i] for i in rest):
        return None
    indices = of_atom(eqn.inputs[1])
    lead = indices.shape[:-1]
    at = [
        _position(indices, k, x.shape[dim], eqn.params["mode"])
        for k, dim in enumerate(numbers.start_index_map)
    ]
    at += [_counted(lead, i) for i in numbers.start_indices_batching_dims]
    dropped = (*numbers.collapsed_slice_dims, *batching)
    kept = [n for i, n in enumerate(sizes) if i not in dropped]
    y = x.taken(dims, at).reshaped((*lead, *kept))
    of_rest = iter(range(len(lead), len(y.shape)))
    of_lead = iter(range(len(lead)))
    order = [
        next(of_rest) if i in numbers.offset_dims else next(of_lead) for i in range(len(y.shape))
    ]
    return [y.transposed(order)]


def _position(indices: Factor, k: int, size: int, mode: Any) -> Factor:
    """The positions along an axis that one of the columns says, -1 where there is none."""

    def pick(i: Any) -> Any:
        i = i[..., k].astype(int)
        if mode == lax.GatherScatterMode.CLIP:
            return i.clip(0, size - 1)
        if mode == lax.GatherScatterMode.PROMISE_IN_BOUNDS:
            return i
        return _where((i >= 0) & (i < size), i, -1)

    position = indices.mapped(pick, indices.shape[:-1])
    bounded = mode in (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)
    return dataclasses.replace(position, within=bounded)


def _counted(shape: Sequence[int], dim: int) -> Factor:
    """The positions along one axis of a shape."""
    counts = np.arange(shape[dim]).reshape([n if i == dim else 1 for i, n in enumerate(shape)])
    return known(np.broadcast_to(counts, shape))


def _where(condition: Any, x: Any, y: Any) -> Any:
    return (np if isinstance(condition, np.ndarray) else jnp).where(condition, x, y)


def _scatter_add(eqn: Equation, x: Form | None, _: None, u: Form | None) -> list[Form] | None:
    y = x or Form(_shape(eqn), {})
    if u is None:
        return [y]
    image = _scattered(eqn, u)
    return None if image is None else [y.plus(image, -1.0 if eqn.name == "scatter-sub" else 1.0)]


def _scattered(eqn: Equation, u: Form) -> Form | None:
    """Zeros to which updates are added."""
    shape, numbers = _shape(eqn), eqn.params["dimension_numbers"]
    inserted, batching = numbers.inserted_window_dims, numbers.operand_batching_dims
    columns, mode = numbers.scatter_dims_to_operand_dims, eqn.params["mode"]
    dims, indices = [*columns, *batching], of_atom(eqn.inputs[1])
    lead = indices.shape[:-1]
    window = [i for i in range(len(shape)) if i not in (*inserted, *batching)]
    sizes = [u.shape[i] for i in numbers.update_window_dims]
    if math.prod(lead) == 1 and not batching:
        image = u.reshaped(
            [sizes[window.index(i)] if i in window else 1 for i in range(len(shape))]
        )
        for k, dim in enumerate(columns):
            image = _along(image, dim, _within(indices, k, image.shape[dim], shape[dim], mode))
    elif sorted(dims) == sorted((*inserted, *batching)) and sizes == [shape[i] for i in window]:
        across = [shape[i] for i in dims]
        at = [_position(indices, k, shape[dim], mode) for k, dim in enumerate(columns)]
        at += [_counted(lead, i) for i in numbers.scatter_indices_batching_dims]
        ids = combined(functools.partial(_flat, sizes=across), (math.prod(lead),), *at)
        first = [i for i in range(len(u.shape)) if i not in numbers.update_window_dims]
        rows = u.transposed([*first, *numbers.update_window_dims]).reshaped((*ids.shape, *sizes))
        image = rows.summed_by(ids, math.prod(across)).reshaped((*across, *sizes))
        image = image.transposed(list(map([*dims, *window].index, range(len(shape)))))
    else:
        return None
    return image


def _within(indices: Factor, k: int, n: int, size: int, mode: Any) -> Factor:
    """Which of ``n`` entries is at each position along an axis; one of the columns says where."""

    def place(i: Any) -> Any:
        start = i[..., k].astype(int).reshape(())
        if mode == lax.GatherScatterMode.CLIP:
            start = start.clip(0, size - n)
        at = np.arange(size) - start
        return _where((at >= 0) & (at < n) & (start >= 0) & (start <= size - n), at, -1)

    return indices.mapped(place, (size,))


def _flat(*at: Any, sizes: Sequence[int]) -> Any:
    """Positions along several axes as one, out of bounds where there is none."""
    there = functools.reduce(jnp.logical_and, (jnp.asarray(i) >= 0 for i in at))
    strides = [math.prod(sizes[k + 1 :]) for k in range(len(sizes))]
    ids = sum(stride * jnp.asarray(i) for stride, i in zip(strides, at, strict=True))
    return jnp.where(there, ids, math.prod(sizes)).ravel()


def _set(eqn: Equation, x: Form | None, *others: Form | None) -> list[Form] | None:
    """``x.at[indices].set(u)``: ``x`` with zeros where it is written to, and ``u`` there."""
    y = Form(_shape(eqn), {})
    if x is not None:
        kept = _kept(eqn)
        y = x.times(kept, gate=kept)
    u = next(filter(None, others), None)
    if u is not None:
        image = _updated(eqn, u) if eqn.name == "dynamic_update_slice" else _set_once(eqn, u)
        if image is None:
            return None
        y = y.plus(image)
    return [y]


def _kept(eqn: Equation) -> Factor:
    """One where nothing is written to, else zero."""
    x, *rest = eqn.inputs[0], *(v if is_inexact(v) else None for v in eqn.inputs[1:])
    indices = [of_atom(v) for v, number in zip(eqn.inputs[1:], rest, strict=True) if number is None]

    def kept(*indices: Any) -> Any:
        given = iter(indices)
        others = [next(given) if v is None else jnp.zeros(v.shape, v.dtype) for v in rest]
        return _jaxpr.bind(eqn, jnp.ones(x.shape, x.dtype), *others)

    return combined(kept, _shape(eqn), *indices)


def _updated(eqn: Equation, u: Form) -> Form:
    """Zeros but for the window that is written to."""
    for k, (n, size) in enumerate(zip(u.shape, _shape(eqn), strict=True)):
        start = of_atom(eqn.inputs[2 + k]).reshaped((1,))
        u = _along(u, k, _within(start, 0, n, size, lax.GatherScatterMode.CLIP))
    return u


def _set_once(eqn: Equation, u: Form) -> Form | None:
    """Zeros in which updates are written to places that differ."""
    at = of_atom(eqn.inputs[1])
    once = eqn.params["unique_indices"] or math.prod(at.shape[:-1]) == 1
    if not once and at.static is not None and eqn.params["mode"] != lax.GatherScatterMode.CLIP:
        rows = at.static.reshape(-1, at.shape[-1])
        once = len(np.unique(rows, axis=0)) == len(rows)
    return _scattered(eqn, u) if once else None


def _sort(eqn: Equation, *operands: Form | None) -> list[Form]:
    shape, p = _shape(eqn), eqn.params

    def order(*arrays: Any) -> Any:
        at = lax.broadcasted_iota("int32", shape, p["dimension"])
        return lax.sort((*arrays, at), p["dimension"], p["is_stable"], p["num_keys"])[-1]

    index = combined(order, shape, *map(of_atom, eqn.inputs))
    empty = Form(shape, {})
    return [_in_order(x or empty, p["dimension"], index) for x in operands]


def _top_k(eqn: Equation, x: Form) -> list[Form]:
    return [_in_order(x, eqn.params.get("axis", -1) % len(x.shape), of_atom(eqn.outputs[1]))]


def _in_order(x: Form, dim: int, index: Factor) -> Form:
    """At positions along one axis, which differ along the others."""
    axes, index = range(len(x.shape)), dataclasses.replace(index, within=True)
    return x.taken(axes, [index if i == dim else _counted(index.shape, i) for i in axes])


def _tile(eqn: Equation, x: Form) -> list[Form]:
    for dim, (n, size) in enumerate(zip(x.shape, _shape(eqn), strict=True)):
        if size != n:
            x = _along(x, dim, np.arange(size) % n)
    return [x]


SELECTIONS: dict[str, Callable[..., list[Form] | None]] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "cumsum": _cumsum,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _set,
    "expand_dims": _reshape,
    "gather": _gather,
    "pad": _pad,
    "psum": _psum,
    "reduce_max": _reduce_extremum,
    "reduce_min": _reduce_extremum,
    "reduce_sum": _reduce_sum,
    "reshape": _reshape,
    "rev": _rev,
    "scatter": _set,
    "scatter-add": _scatter_add,
    "scatter-sub": _scatter_add,
    "slice": _slice,
    "sort": _sort,
    "split": _split,
    "squeeze": _reshape,
    "stack": _stack,
    "tile": _tile,
    "top_k": _top_k,
    "transpose": _transpose,
    "unstack": _unstack,
}
