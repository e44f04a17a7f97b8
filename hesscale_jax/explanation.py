"""``explain``: what ``hesscale`` makes of a loss, and which off-diagonal terms it drops.

A *step* is a block or a single equation outside of one. A value that several steps read branches;
where two of its branches meet again, they are taken as independent:

    y = phi(a(x), b(x))         phi_ab a'(x) b'(x) vx is dropped

unless the loss is an affine function of ``a`` and ``b`` together.
"""

import dataclasses
import heapq
import inspect
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Body, Equation, Program, Value, size
from hesscale_jax.blocks import Block, Plan
from hesscale_jax.forms import Form
from hesscale_jax.head import LossHead, names_output
from hesscale_jax.images import Images, Part, images_of
from hesscale_jax.layout import layouts
from hesscale_jax.paths import Loop, loop
from hesscale_jax.planning import plan
from hesscale_jax.propagate import affine_in
from hesscale_jax.report import Dropped, Report, Shared, Step
from hesscale_jax.rules import RULES
from hesscale_jax.rules.control_flow import ControlFlow, while_loop
from hesscale_jax.rules.custom_derivatives import custom_rule
from hesscale_jax.rules.derivatives import Pointwise
from hesscale_jax.rules.multilinear import Multilinear
from hesscale_jax.rules.selection import Selection
from hesscale_jax.rules.table import Unsupported, find
from hesscale_jax.transform import CURVATURES, EXACT, check_curvature, of_shapes, traced

__all__ = ["explain"]

NO_RULE, YOURS = "no rule: raises", "your rule"
OURS = "hesscale_jax.rules."

# Of an argument, these are not shown as steps: they yield the same entries.
RENAMINGS = frozenset(
    ("broadcast_in_dim", "convert_element_type", "copy", "reshape", "squeeze", "transpose")
)

# Selections of which one entry's result shares entries with another's.
MIXING = frozenset(
    (
        *("bcoo_extract", "bcoo_sum_duplicates", "bcoo_todense", "bcsr_extract", "bcsr_todense"),
        *("broadcast_in_dim", "coo_todense", "csr_todense", "cummax", "cummin", "cumsum", "gather"),
        *("psum", "psum_invariant", "reduce_scatter", "reduce_window_sum", "scatter-add", "tile"),
        "todense",
    )
)

# And these, where windows overlap.
WINDOWS = frozenset(("reduce_window_max", "reduce_window_min", "select_and_gather_add"))
WINDOWS |= {"select_and_scatter_add"}


def explain(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    curvature: str = "hessian",
    rules: Mapping[Any, Any] = RULES,
) -> Callable[..., Report]:
    """What ``hesscale`` does with a loss: its blocks and rules, and where terms are dropped.

    Takes the arguments of :func:`hesscale` but ``product_dtype``, which changes no step. Nothing is
    computed, only traced, so that ``jax.ShapeDtypeStruct`` may stand for any array. Equations
    without a rule are listed, all at once, where ``hesscale`` would raise.

    Returns:
      A function with the arguments of ``fun`` that returns a :class:`Report` to print or to read.

    Raises:
      TypeError: As :func:`hesscale`, for arguments and losses that cannot be differentiated.
      ValueError: ``curvature`` is unknown, or ``argnums`` does not fit the arguments.

    Examples:
      >>> import jax.numpy as jnp
      >>> import hesscale_jax as hs
      >>> def loss(w, u, x):
      ...     y = jnp.tanh(x @ w)
      ...     return jnp.sum((y + y @ u @ w) ** 2)
      >>> w, u, x = (jnp.ones((n, 3), "float32") for n in (3, 3, 5))
      >>> report = hs.explain(loss, argnums=(0, 1))(w, u, x)
      >>> [step.rule for step in report.steps]
      ['multilinear', 'block', 'multilinear', 'multilinear', 'block']
      >>> for entry in report.dropped:
      ...     print(entry.value, "is read by", entry.read_by, "and meets in", entry.meet_in)
      w is read by (0, 3) and meets in 3
      f32[5,3] is read by (2, 4) and meets in 4
    """
    check_curvature(curvature, (*CURVATURES, *EXACT))

    def explained(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Report:
        program, _, chosen = traced(fun, argnums, has_aux, args, kwargs, rules)
        names = dict(zip(program.inputs, _paths(fun, chosen), strict=True))
        return _explained(fun, program, names, rules, curvature)

    return of_shapes(explained)


def _paths(fun: Callable[..., Any], chosen: Mapping[int, Any]) -> list[str]:
    """What to call the leaves of the arguments at some positions."""
    names: list[str] = []
    try:
        parameters = list(inspect.signature(fun).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for i, arg in chosen.items():
        name = named[i] if i < len(named) else f"args[{i}]"
        paths = jax.tree_util.tree_flatten_with_path(arg)[0]
        names += [name + jax.tree_util.keystr(path) for path, _ in paths]
    return names


def _explained(
    fun: Callable[..., Any],
    program: Program,
    names: dict[Value, str],
    rules: Mapping[Any, Any],
    curvature: str,
) -> Report:
    def rule(eqn: Equation) -> Any:
        return find(rules, eqn)

    steps = plan(program, program.inputs, program.outputs[:1], rule)
    named = names_output(program)
    head = LossHead(program, steps.rules, affine_in(steps), program.inputs, named=named)
    title = f"{getattr(fun, '__name__', type(fun).__name__)}, curvature={curvature!r}"
    marked = curvature != "hessian"
    images = images_of(steps, program.inputs, program.outputs[:1])
    report = _Explanation(program, steps, images, head, names, rule, marked).report(title)
    found = layouts(program, program.outputs[:1], rule, program.inputs)
    return dataclasses.replace(
        report, layouts=tuple(zip(map(names.__getitem__, program.inputs), found, strict=True))
    )


class _Unit:
    """The equations of a step, and the values that it hands on."""

    def __init__(self, equations: list[Equation], block: Block | None) -> None:
        self.equations = equations
        self.block = block
        self.made = {v for eqn in equations for v in eqn.outputs}
        self.results: list[Value] = []
        self.index = 0


class _Explanation:
    """One program: its steps in order, and what is dropped between them."""

    def __init__(
        self,
        program: Program,
        steps: Plan,
        images: Images,
        head: LossHead,
        names: dict[Value, str],
        rule: Callable[[Equation], Any],
        marked: bool,
    ) -> None:
        self._program = program
        self._plan = steps
        self._images = images
        self._head = head
        self._rule = rule
        self._marked = marked
        self._names = names
        self._same: dict[Value, Value] = {}  # a renamed argument -> the argument
        self._loops = {
            eqn: [loop(eqn, body, steps.active, steps.active, rule) for body in eqn.bodies]
            for eqn, found in steps.rules.items()
            if _recurses(found)
        }
        self._units = self._ordered(list(self._grouped()))

    def report(self, title: str) -> Report:
        return Report(
            title,
            tuple(map(self._step, self._units)),
            tuple(self._dropped()),
            tuple(self._shared()),
            tuple(unit.index for unit in self._units if self._mixes(unit)),
        )

    # Steps

    def _grouped(self) -> Iterator[_Unit]:
        groups: dict[Any, list[Equation]] = defaultdict(list)
        for eqn in self._plan.rules:
            groups[self._plan.blocks.get(eqn, eqn)].append(eqn)
        for key, equations in groups.items():
            if not self._renames(equations):
                yield _Unit(equations, key if isinstance(key, Block) else None)

    def _renames(self, equations: list[Equation]) -> bool:
        """Whether a step yields the entries of one argument, and nothing else."""
        same = dict(self._same)
        for eqn in equations:
            values = [v for v in eqn.inputs if v in self._plan.active]
            argument = same.get(values[0], values[0])
            if eqn.name not in RENAMINGS or argument not in self._names:
                return False
            if size(eqn.outputs[0].shape) != size(argument.shape):
                return False
            same[eqn.outputs[0]] = argument
        self._same = same
        return True

    def _read_as(self, eqn: Equation) -> list[tuple[Value, Value]]:
        """The active operands of an equation, and what each is a renaming of."""
        values = [v for v in eqn.inputs if v in self._plan.active]
        if eqn in self._loops:
            inside = set().union(*(paths.read for paths in self._loops[eqn]))
            values = [v for v in values if v in inside]
        return [(v, self._same.get(v, v)) for v in values]

    def _reads(self, eqn: Equation) -> list[Any]:
        """The active operands of an equation, one entry for each time that it reads one."""
        return [name for _, name in self._read_as(eqn)]

    def _entering(self, unit: _Unit) -> dict[Value, int]:
        """The values that a step reads; how often, if it takes each time as independent."""
        read = [
            (v, name, eqn if v in self._scanned(eqn) else None)
            for eqn in unit.equations
            for v, name in self._read_as(eqn)
            if name not in unit.made
        ]
        # A block knows what it reads more than once, if it is not under another name, and if no
        # loop scans over it.
        read = list(dict.fromkeys(read)) if unit.block is not None else read
        return dict(Counter(name for _, name, _ in read))

    def _scanned(self, eqn: Equation) -> frozenset[Any]:
        """What moves and is scanned over by a loop that a block leads through."""
        return self._plan.loops[eqn].scanned if eqn in self._plan.loops else frozenset()

    def _ordered(self, units: list[_Unit]) -> list[_Unit]:
        """The units so that each comes after those it reads from, else in program order."""
        maker = {v: unit for unit in units for v in unit.made}
        waits = {
            unit: {maker[v] for v in self._entering(unit) if v in maker} - {unit} for unit in units
        }
        place = {unit: i for i, unit in enumerate(units)}
        after: dict[_Unit, list[_Unit]] = defaultdict(list)
        for unit in units:
            for before in waits[unit]:
                after[before].append(unit)
        left = {unit: len(waits[unit]) for unit in units}
        ready = [place[unit] for unit in units if not left[unit]]
        ordered: list[_Unit] = []
        while ready:
            unit = units[heapq.heappop(ready)]
            unit.index = len(ordered)
            ordered.append(unit)
            for later in after[unit]:
                left[later] -= 1
                if not left[later]:
                    heapq.heappush(ready, place[later])
        self._link(ordered)
        return ordered

    def _link(self, units: list[_Unit]) -> None:
        """Find who reads each value, and what each step hands on."""
        self._readers: dict[Value, list[_Unit]] = defaultdict(list)
        for unit in units:
            for value in self._entering(unit):
                self._readers[value].append(unit)
        for unit in units:
            made = dict.fromkeys(v for eqn in unit.equations for v in eqn.outputs)
            outside = self._program.outputs
            unit.results = [
                v for v in made if v in self._plan.active and (self._readers[v] or v in outside)
            ]

    def _step(self, unit: _Unit) -> Step:
        first = unit.equations[0]
        rule = self._plan.rules[first]
        reason = None if unit.block is not None else _missing(rule)
        return Step(
            rule=NO_RULE if reason else "block" if unit.block is not None else _family(first, rule),
            primitives=tuple(map(_primitive, unit.equations)),
            results=tuple(map(_described, unit.results)),
            lines=tuple(dict.fromkeys(filter(None, map(_line, unit.equations)))),
            library=next(filter(None, map(_library_line, unit.equations)), ""),
            marks=tuple(self._marks(unit)),
            reason=reason,
            bodies=tuple(itertools.chain(*map(self._bodies, unit.equations))),
        )

    def _marks(self, unit: _Unit) -> Iterator[str]:
        if self._marked:
            inside = {eqn in self._head.equations for eqn in unit.equations}
            yield from (name for name, at in (("model", False), ("head", True)) if at in inside)
        if any(eqn.region is not None for eqn in unit.equations):
            yield "checkpoint"
        images_cut = not self._images.cut.isdisjoint((unit.block, *unit.equations))
        if images_cut or (unit.block is not None and unit.block.cut):
            yield "cut short"

    def _bodies(self, eqn: Equation) -> Iterator[Report]:
        if eqn not in self._loops:
            return
        titles = _titles(eqn)
        for title, body, paths in zip(titles, eqn.bodies, self._loops[eqn], strict=True):
            steps, head = self._within(eqn, body, paths)
            names = self._handed(eqn, body)
            leaves = self._images.leaves_within(eqn, body)
            images = images_of(steps, leaves, self._images.last_within(eqn, body, steps))
            inside = _Explanation(
                body.program, steps, images, head, names, self._rule, self._marked
            )
            yield inside.report(title)

    def _within(self, eqn: Equation, body: Body, paths: Loop) -> tuple[Plan, LossHead]:
        """The steps of a program that an equation runs, and the loss's head within it."""
        wanted = [body.program.outputs[i] for i in sorted(paths.wanted)]
        steps = plan(body.program, paths.moving, wanted, self._rule)
        return steps, self._head.inside(eqn, body, steps.rules, affine_in(steps))

    def _handed(self, eqn: Equation, body: Body) -> dict[Value, str]:
        """What to call the inputs of a body."""
        carried = set(body.carry.values())
        names = {}
        for j, (value, i) in enumerate(zip(body.program.inputs, body.inputs, strict=True)):
            outer = self._same.get(eqn.inputs[i], eqn.inputs[i])
            name = self._names.get(outer, _described(value))
            names[value] = f"carry {_described(value)}" if j in carried else name
        return names

    # What is dropped

    def _mixes(self, unit: _Unit) -> bool:
        """Whether entries of a result share entries of the operands, and are used curved."""
        first, results = unit.equations[0], unit.results
        if unit.block is not None:
            entering, block = self._entering(unit), unit.block
            scanned = {
                self._same.get(v, v): v for eqn in unit.equations for v in self._scanned(eqn)
            }
            # Its loops' steps hand out what they share, side by side; the block may read it itself.
            handed_out = [v for eqn in unit.equations for v in self._handed_out(eqn)]
            # A loop takes the entries of what it scans over as independent, as those of an argument
            # are, and so does a block with sums by segments.
            inside: Iterable[Any] = entering if block.cut or block.along else scanned
            apart = [v for v in inside if v not in self._names]
            results = [*results, *handed_out, *apart]
            fills = (
                size(scanned[v].sizes[1:]) == block.entries if v in scanned else block.fill(v)
                for v in entering
            )
            mixes = bool(block.reduced or handed_out or apart) or not all(fills)
        else:
            family = _family(first, self._plan.rules[first])
            mixes = first.name in MIXING or family not in ("selection", "cond", "shard_map")
            mixes = mixes or (first.name in WINDOWS and _overlap(first))
            mixes = mixes or (first.name == "cond" and not self._branches_act_entrywise(first))
            # Where forms end, nothing is known of what entries shared before.
            ends = any(v in self._images.of(v).of for v in unit.results)
            mixes = mixes or (ends and not all(v in self._names for v in self._entering(unit)))
        return mixes and any(size(v.shape) > 1 and not self._head.is_affine_in(v) for v in results)

    def _branches_act_entrywise(self, eqn: Equation) -> bool:
        return all(
            isinstance(rule, Pointwise)
            for body, paths in zip(eqn.bodies, self._loops[eqn], strict=True)
            for rule in self._within(eqn, body, paths)[0].rules.values()
        )

    def _handed_out(self, eqn: Equation) -> list[Value]:
        """What the steps of a loop hand out."""
        if not self._goes_by_steps(eqn):
            return []
        _, carry, _ = _jaxpr.scan_groups(eqn)
        return [v for v in eqn.outputs[len(carry) :] if v in self._plan.active]

    def _shared(self) -> Iterator[Shared]:
        """Constants of a loop, and carries if there are several.

        A loop in a block drops nothing at these, but between what its steps hand out. Nor is
        anything dropped between steps if the loss is affine in what each hands on, or if the loop
        as a whole is affine and nothing mixes entries after it.
        """
        pairs = ((unit, eqn) for unit in self._units for eqn in unit.equations)
        for unit, eqn in pairs:
            if not self._goes_by_steps(eqn):
                continue
            constants, carry, _ = _jaxpr.scan_groups(eqn)
            ((body,), (paths,)) = eqn.bodies, self._loops[eqn]
            in_block = eqn in self._plan.loops
            _, head = self._within(eqn, body, paths)
            handed_out = not all(map(self._head.is_affine_in, eqn.outputs[len(carry) :]))
            handed_on = not all(head.is_affine_in(body.program.inputs[i]) for i in carry)
            for i in constants if handed_out or (handed_on and not in_block) else ():
                if eqn.inputs[i] in paths.read:
                    value = self._same.get(eqn.inputs[i], eqn.inputs[i])
                    name = self._names.get(value, _described(value))
                    yield Shared(f"{name}, read at every step", unit.index)
            moving = [v for i in carry if (v := body.program.inputs[i]) in paths.moving]
            if len(moving) > 1 and not in_block:
                values = ", ".join(map(_described, moving))
                yield Shared(f"carries {values}, which one step hands to the next", unit.index)

    def _goes_by_steps(self, eqn: Equation) -> bool:
        """Whether it is a loop that is taken step by step, not as images as a whole."""
        return eqn.name == "scan" and eqn in self._loops and not self._makes_images(eqn)

    def _makes_images(self, eqn: Equation) -> bool:
        """Whether what an equation makes is known as images, and is met as such."""
        made = [v for v in eqn.outputs if v in self._plan.active]
        return (
            eqn not in self._plan.loops
            and self._images.last.issuperset(made)
            and all(v not in self._images.of(v).of for v in made)
        )

    def _dropped(self) -> Iterator[Dropped]:
        for value, name in self._names.items():
            edges = [(value, unit) for unit in self._readers[value]]
            meeting = self._meeting(edges, {value: frozenset([value])}, [{value}])
            if meeting is not None:
                yield Dropped(name, None, _indices(edges), meeting.index)
        for unit in self._units:
            edges = [(v, later) for v in unit.results for later in self._readers[v]]
            handed_on = {v for v, _ in edges}
            sources = [{v} for v in handed_on] + [set(self._images.of(v).of) for v in handed_on]
            meeting = self._meeting(edges, self._origins(unit), sources)
            if meeting is not None:
                values = ", ".join(dict.fromkeys(_described(v) for v, _ in edges))
                maker = next(eqn for eqn in unit.equations if edges[0][0] in eqn.outputs)
                line = _line(maker)
                yield Dropped(values, unit.index, _indices(edges), meeting.index, line)

    def _origins(self, unit: _Unit) -> dict[Value, frozenset[Value]]:
        """The values that a step reads, for each that it makes: those it depends on."""
        origins: dict[Value, frozenset[Value]] = {}
        for eqn in unit.equations:
            reads = (origins.get(v, frozenset([v])) for v in self._reads(eqn))
            origins.update(dict.fromkeys(eqn.outputs, frozenset[Value]().union(*reads)))
        return origins

    def _forms(self, unit: _Unit) -> dict[Value, Form]:
        """The forms of what a step reads, where images of one value meet in it."""
        if unit.block is not None:
            return self._images.blocks.get(unit.block, {})
        (eqn, *_) = unit.equations
        return dict(zip(eqn.inputs, self._images.products.get(eqn, ()), strict=False))

    def _knows(self, unit: _Unit, entering: Iterable[Value], sources: Sequence[set[Any]]) -> bool:
        """Whether a step knows how what enters it varies with all of one of the sources.

        That is where their images meet in it, or where what it hands on are images again, and of
        nothing else that a product makes. A block with sums by segments, and a loop in one, know
        nothing of images of what they read.
        """

        def are_images(forms: Iterable[Form | None]) -> bool:
            found = [f is not None and any(self._is_of(f, s) for s in sources) for f in forms]
            return bool(found) and all(found)

        entering, met = set(entering), self._forms(unit)
        read = [v for eqn in unit.equations for v, name in self._read_as(eqn) if name in entering]
        results = list(map(self._images.of, unit.results))
        apart = any(isinstance(source, Part) for form in results for source in form.of)
        looked = not unit.block or not (unit.block.cut or unit.block.along)
        looked = looked and not any(map(self._scanned, unit.equations))
        return are_images(map(met.get, read)) or (looked and not apart and are_images(results))

    def _is_of(self, form: Form, source: set[Any]) -> bool:
        """Whether a form has all of a source, and nothing else that depends on it."""
        others = {*form.of} - source
        return source <= {*form.of} and all(
            self._before(other.value if isinstance(other, Part) else other).isdisjoint(source)
            for other in others
        )

    def _before(self, value: Value) -> set[Any]:
        """What a value is computed from."""
        before = {value}
        for eqn in reversed(self._plan.rules):
            if not before.isdisjoint(eqn.outputs):
                before.update(self._reads(eqn))
        return before - {value}

    def _meeting(
        self,
        edges: list[tuple[Value, _Unit]],
        origins: dict[Value, frozenset[Value]],
        sources: Sequence[set[Any]],
    ) -> _Unit | None:
        """The first step where two branches with a common origin meet, before the affine end.

        Branches are walked step by step, until two meet or but one is left. Those that meet where
        it is known how both vary with all of one of the sources go on as one.
        """
        entering: dict[_Unit, dict[Value, frozenset[int]]] = defaultdict(dict)
        origin: list[frozenset[Value]] = []
        for value, unit in edges:
            times = self._entering(unit)[value]
            entering[unit][value] = frozenset(range(len(origin), len(origin) + times))
            origin += [origins[value]] * times
        ahead = [(unit.index, unit) for unit in entering]
        heapq.heapify(ahead)
        walking = Counter(b for values in entering.values() for bs in values.values() for b in bs)
        while ahead and len(walking) > 1:
            _, unit = heapq.heappop(ahead)
            arrived = entering.pop(unit)
            if self._knows(unit, arrived, sources):
                one = frozenset([min(b for bs in arrived.values() for b in bs)])
                walking -= Counter(b for bs in arrived.values() for b in bs)
                arrived = dict.fromkeys(arrived, one)
                walking.update(b for bs in arrived.values() for b in bs)
            branches = self._through(unit, arrived)
            for met in branches.values():
                if any(origin[a] & origin[b] for a, b in itertools.combinations(met, 2)):
                    return unit
            for value in unit.results:
                for later in self._readers[value] if branches.get(value) else ():
                    if later not in entering:
                        heapq.heappush(ahead, (later.index, later))
                    entering[later][value] = branches[value]
                    walking.update(branches[value])
            walking -= Counter(b for bs in arrived.values() for b in bs)
        return None

    def _through(
        self, unit: _Unit, arrived: dict[Value, frozenset[int]]
    ) -> dict[Value, frozenset[int]]:
        """Which branches the values of a step are on. The loss's affine end is on none."""
        branches = dict(arrived)
        for eqn in unit.equations:
            if eqn not in self._head.tail:
                met = (branches.get(v, frozenset()) for v in self._reads(eqn))
                branches.update(dict.fromkeys(eqn.outputs, frozenset[int]().union(*met)))
        return {v: met for v, met in branches.items() if v not in arrived}


def _indices(edges: Iterable[tuple[Value, _Unit]]) -> tuple[int, ...]:
    return tuple(sorted({unit.index for _, unit in edges}))


# Words


def _missing(rule: Any) -> str | None:
    """Why an equation has no rule, ``None`` if it has one."""
    if rule is while_loop:
        return "how many steps a while_loop takes is not known; use scan, or fori_loop"
    if isinstance(rule, Unsupported):
        return rule.reason or "the table has no entry for it"
    return None


def _recurses(rule: Any) -> bool:
    """Whether a rule pushes moments through the bodies of its equation."""
    return (isinstance(rule, ControlFlow) and rule is not while_loop) or rule is custom_rule


def _family(eqn: Equation, rule: Any) -> str:
    """What to call the rule that serves an equation outside of blocks."""
    if isinstance(rule, Multilinear):
        return "multilinear"
    if rule is custom_rule:
        return "custom rule"
    if isinstance(rule, Selection):
        return "selection"
    if isinstance(rule, ControlFlow):
        return eqn.name
    name = getattr(rule, "__name__", type(rule).__name__)
    return name if rule.__module__.startswith(OURS) else f"{YOURS} {name}"


def _primitive(eqn: Equation) -> str:
    """The name of an equation's primitive; a region's has that of its function."""
    return _jaxpr.label(eqn) if eqn.name == "region" else eqn.name


def _titles(eqn: Equation) -> list[str]:
    """What to call the programs that an equation runs."""
    if eqn.name == "scan":
        return [f"each of {eqn.params['length']} steps"]
    if eqn.name == "cond":
        return [f"branch {i}" for i in range(len(eqn.bodies))]
    return ["on each device"] if eqn.name == "shard_map" else ["its definition"]


def _described(value: Any) -> str:
    aval = value.aval if isinstance(value, Value) else jax.typeof(value.value)
    return aval.str_short(short_dtypes=True)


def _line(eqn: Equation) -> str:
    """Where the user wrote an equation or called the library that did; empty if not known."""
    return _place(_jaxpr.user_frame(eqn))


def _library_line(eqn: Equation) -> str:
    return _place(_jaxpr.library_frame(eqn))


def _place(frame: Any) -> str:
    return f"{frame.file_name}:{frame.start_line}" if frame else ""


def _overlap(eqn: Equation) -> bool:
    """Whether two windows may share an entry."""
    sizes, steps = eqn.params["window_dimensions"], eqn.params["window_strides"]
    dilated = any(
        by != 1 for name in ("base_dilation", "window_dilation") for by in eqn.params.get(name, ())
    )
    return dilated or any(n > by for n, by in zip(sizes, steps, strict=True))
