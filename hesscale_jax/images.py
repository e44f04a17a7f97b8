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

import jax.numpy as jnp
import numpy as np

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Body, Constant, Equation, Value
from hesscale_jax.arrays import Blank, Factor, Reader, TooLarge, of_atom, placed
from hesscale_jax.blocks import Block, Plan
from hesscale_jax.covariances import are_apart, covariance, variance
from hesscale_jax.factored import RENAMED
from hesscale_jax.forms import Form, gated, identity
from hesscale_jax.grouping import is_affine
from hesscale_jax.moments import Moments
from hesscale_jax.rules.control_flow import ControlFlow
from hesscale_jax.rules.derivatives import Pointwise
from hesscale_jax.rules.multilinear import Multilinear, met, product_frame
from hesscale_jax.rules.selection import Selection
from hesscale_jax.selected import SELECTIONS
from hesscale_jax.slopes import by_unit_vectors, is_linear, slope_in, slope_of_loop
from hesscale_jax.terms import Term, together

__all__ = ["Images", "Needs", "Part", "images_of"]


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
SHORT, MOST_ADDED, ADDED_PER_EQUATION = 32, 470, 4

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
        if is_linear(eqn, active):
            wanted = [k for k, y in enumerate(eqn.outputs) if y in self._steps.active]
            return by_unit_vectors(eqn, {i: self.of(eqn.inputs[i]) for i in active}, wanted)
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
        # Before the last product, what may be infinite is its own source, if it is not known where:
        # that takes fewer terms.
        finite = last or all(t.finite for form in forms for ts in form.of.values() for t in ts)
        known = eqn.name == "select_n" and isinstance(eqn.inputs[0], Constant)
        if (not entrywise and bends) or (chosen and not (entrywise and (finite or known))):
            return self._source(eqn, rule, cuts, active)
        if bends and not self._deep and any(map(_adds_up, forms)):
            block = self._steps.blocks.get(eqn)
            if any(self._home.get(v) is not block for v in self._bent.intersection(eqn.inputs)):
                self.stops = True
                return None  # of what another block makes
            self._bent.add(y)
        image = Form(shape, {})
        for i, form in zip(active, forms, strict=True):
            slope = slope_in(eqn, rule, i)
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
            slope = slope_in(eqn, rule, i)
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
                slope = slope_of_loop(eqn, i, k).reshaped(shape)
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
            or is_linear(eqn, [i for i, v in enumerate(eqn.inputs) if v in steps.active])
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


def _aligned(form: Form, shape: Sequence[int]) -> Form:
    """With ones before its axes, as operands of one equation are broadcast."""
    if len(form.shape) == len(shape):
        return Form(tuple(shape), form.of)
    return form.placed(shape, ())


def _aligned_factor(f: Factor, shape: Sequence[int]) -> Factor:
    return f if len(f.shape) == len(shape) else f.reshaped((1,) * len(shape))
