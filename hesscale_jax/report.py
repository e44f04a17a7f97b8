"""What ``explain`` returns: a record that a program can read, and its text.

The text folds repeated layers: of a run of equal steps it shows the first, and how often it comes.
Steps keep their number in the record, counted from 1.
"""

import dataclasses
import itertools
import pathlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from hesscale_jax.factored import Layout

__all__ = ["Dropped", "Report", "Shared", "Step"]

# Columns are cut at these widths.
PRIMITIVES, RESULTS, LINES, VALUE, STEPS, STEP = 34, 24, 34, 46, 30, 18


@dataclasses.dataclass(frozen=True)
class Step:
    """A block, or a single equation outside of one: a function that is treated as a whole.

    Attributes:
      rule: What serves it: ``"block"``, the rule's family, or ``"no rule: raises"``.
      primitives: The names of its equations, in program order.
      results: The dtype and shape of what it hands on, as in ``"f32[8,16]"``.
      lines: Where its equations were written, each ``"file:line"`` once, in program order.
      library: Where the first of its equations that an installed library wrote stands there, as
        ``"file:line"``; empty if none did.
      marks: ``"head"`` or ``"model"`` for Gauss-Newton, or both if the step belongs to both;
        ``"checkpoint"`` inside of ``jax.checkpoint``.
      reason: Why it has no rule, ``None`` if it has one.
      bodies: The programs that it runs: a loop's step, branches.
    """

    rule: str
    primitives: tuple[str, ...]
    results: tuple[str, ...]
    lines: tuple[str, ...]
    library: str = ""
    marks: tuple[str, ...] = ()
    reason: str | None = None
    bodies: "tuple[Report, ...]" = ()


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A value whose branches meet again: the Hessian's entries between them are dropped.

    Attributes:
      value: The path of an argument's leaf, or the dtypes and shapes of the results that branch.
      made_by: The index of the step that makes it, ``None`` for an argument.
      read_by: The indices of the steps that read it: the branches.
      meet_in: The index of the first step where two branches meet.
      line: Where the value is made, as ``"file:line"``; empty for an argument.
    """

    value: str
    made_by: int | None
    read_by: tuple[int, ...]
    meet_in: int
    line: str = ""


@dataclasses.dataclass(frozen=True)
class Shared:
    """What the steps of a loop have in common: entries between them are dropped.

    Attributes:
      value: What is shared.
      loop: The index of the step that is the loop.
    """

    value: str
    loop: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What ``hesscale`` makes of a loss, or of a program inside of it.

    ``str(report)`` is plain text of about 100 columns, some more where a library's line and the
    user's are shown; printed with rich, it has colours.

    What is inside of a step, as a loop or a branch, has reports of its own: its ``bodies``.

    Attributes:
      title: What the program is.
      steps: Its steps, so that each comes after those that it reads from.
      dropped: The values whose branches meet again outside of the loss's affine end.
      shared: What the steps of loops share.
      mixing: The indices of the steps that yield entries which share entries of their operands
        (products, sums, copies) and are used where the loss is not affine in them. The covariance
        between these entries is dropped.
      layouts: The path of each leaf, and which of its axes a layer sums over, or why it is no
        layer's: of the whole program alone.
    """

    title: str
    steps: tuple[Step, ...]
    dropped: tuple[Dropped, ...] = ()
    shared: tuple[Shared, ...] = ()
    mixing: tuple[int, ...] = ()
    layouts: tuple[tuple[str, Layout], ...] = ()

    @property
    def is_exact(self) -> bool:
        """Whether no off-diagonal term is dropped, inside of other steps neither.

        The whole diagonal is exact then, if rules of your own are.
        """
        bodies = (body for step in self.steps for body in step.bodies)
        here = not (self.dropped or self.shared or self.mixing)
        return here and all(body.is_exact for body in bodies)

    @property
    def missing(self) -> tuple[Step, ...]:
        """The steps without a rule, those inside of other steps too."""
        inside = (body.missing for step in self.steps for body in step.bodies)
        here = tuple(step for step in self.steps if step.reason is not None)
        return (*here, *itertools.chain.from_iterable(inside))

    def __str__(self) -> str:
        """The report as plain text."""
        page = _Page(self)
        head = f"{self.title}: {len(self.steps)} step{'s'[: len(self.steps) != 1]}"
        sections = [[head], page.table(), page.missing(), page.dropped()]
        sections += [page.one_by_one(), page.taken_as_linear(), page.coordinates()]
        return "\n\n".join("\n".join(lines) for lines in sections if lines)

    def __rich__(self) -> Any:
        """The same text with colours."""
        from rich.text import Text

        text = Text(str(self))
        text.highlight_regex(r"(?m)^ *step .*$", "bold")
        text.highlight_regex(r"(?m)^[A-Z].*:$", "bold")
        text.highlight_regex(r"no rule: raises", "bold red")
        text.highlight_regex(r"(?<=  )block(?=  )", "green")
        text.highlight_regex(r"\bx \d+\b", "cyan")
        return text


# Folding


class Group(NamedTuple):
    """A run of nodes that comes several times; a node is an index or a group.

    The last time it may end early, after the step ``last``.
    """

    repeats: int
    nodes: "list[int | Group]"
    last: int | None = None


class Place(NamedTuple):
    """Where a step is shown: at the index of an equal one, in which repeat of which group."""

    step: int
    repeat: int = 0
    group: int | None = None


def folded(keys: Sequence[int], start: int = 0) -> tuple[list[int | Group], list[Place]]:
    """Fold consecutive repeats of a sequence: what to show, and where each entry is shown."""
    nodes: list[int | Group] = []
    places: list[Place] = []
    i = 0
    while i < len(keys):
        period, repeats = _longest_run(keys, i)
        if repeats == 1:
            nodes.append(start + i)
            places.append(Place(start + i))
        else:
            inner, shown = folded(keys[i : i + period], start + i)
            rest = keys[i + period * repeats : i + period * (repeats + 1)]
            same = zip(rest, keys[i : i + period], strict=False)
            alike = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], same)))
            alike *= 2 * alike > period  # most of a last layer
            last = shown[alike - 1].step if alike else None
            nodes.append(Group(repeats + bool(alike), inner, last))
            every = shown * repeats + shown[:alike]
            places += [Place(p.step, n // period, start + i) for n, p in enumerate(every)]
            i += alike
        i += period * repeats
    return nodes, places


def _longest_run(keys: Sequence[int], i: int) -> tuple[int, int]:
    """The period and the number of repeats of what covers most from ``i`` on."""
    best = (1, 1)
    for period in range(1, (len(keys) - i) // 2 + 1):
        if keys[i] != keys[i + period]:
            continue
        once, repeats = keys[i : i + period], 1
        while keys[i + repeats * period : i + (repeats + 1) * period] == once:
            repeats += 1
        if repeats > 1 and period * repeats > best[0] * best[1]:
            best = (period, repeats)
    return best


# The page


class _Page:
    """The text of a report, or of one of a body, whose steps' numbers have a prefix."""

    def __init__(self, report: Report, prefix: str = "") -> None:
        self._report = report
        self._prefix = prefix
        known: dict[Step, int] = {}
        keys = [known.setdefault(_essence(step), len(known)) for step in report.steps]
        self._nodes, self._places = folded(keys)
        shown = {place.step: report.steps[place.step] for place in self._places}
        self._bodies = {
            i: [
                _Page(body, f"{self._number(i)}{letter}.")
                for body, letter in zip(step.bodies, _letters(len(step.bodies)), strict=True)
            ]
            for i, step in shown.items()
            if step.bodies
        }

    def _number(self, index: int) -> str:
        return f"{self._prefix}{index + 1}"

    # Steps

    def table(self) -> list[str]:
        header = ("step", "rule", "primitives", "result", "source", "")
        return aligned([header, *self._rows(self._nodes, "")])

    def _rows(self, nodes: Iterable[int | Group], margin: str) -> Iterator[tuple[str, ...]]:
        for node in nodes:
            if isinstance(node, int):
                yield from self._step(node, margin)
            elif len(node.nodes) == 1 and isinstance(node.nodes[0], int):
                yield from self._step(node.nodes[0], margin, f"  x {node.repeats}")
            else:
                early = "" if node.last is None else f", the last up to {self._number(node.last)}"
                yield (f"{margin}x {node.repeats}{early}",)
                yield from self._rows(node.nodes, margin + "| ")

    def _step(self, index: int, margin: str, repeats: str = "") -> Iterator[tuple[str, ...]]:
        step = self._report.steps[index]
        yield (
            f"{margin}{self._number(index)}",
            step.rule,
            cut(primitives(step.primitives), PRIMITIVES - len(repeats)) + repeats,
            cut(", ".join(dict.fromkeys(step.results)), RESULTS),
            source(step),
            ", ".join(step.marks),
        )
        for page in self._bodies.get(index, ()):
            yield (f"{margin}  {page._report.title}:",)
            yield from page._rows(page._nodes, margin + "  ")

    # What has no rule

    def missing(self) -> list[str]:
        rows = list(self._missing())
        return ["Without a rule, so that hesscale raises an error:", *aligned(rows)] if rows else []

    def _missing(self) -> Iterator[tuple[str, ...]]:
        for i in dict.fromkeys(place.step for place in self._places):
            step = self._report.steps[i]
            if step.reason is not None:
                yield f"  {self._number(i)}", step.primitives[0], cut(step.reason, 84)
            for page in self._bodies.get(i, ()):
                yield from page._missing()

    # What is dropped

    def dropped(self) -> list[str]:
        lines = ["Off-diagonal terms are dropped only between steps:"]
        branches = repeated(self._branches())
        if branches:
            lines += ["- Between branches of one value that meet again:"]
            header = ("  value", "made by", "read by", "meet in", "")
            lines += aligned([header, *branches])
        shared = repeated(self._shared())
        if shared:
            lines += ["- Between the steps of a loop, which share:"]
            lines += aligned(shared)
        mixing = Counter(self._mixing())
        if mixing:
            which = cut(", ".join(f"{n} {name}" for name, n in mixing.most_common()), 70)
            lines += [
                "- Between the entries of one result, where a step mixes or copies the entries of",
                f"  its operands and something not affine follows: {which}.",
            ]
        return lines if len(lines) > 1 else ["No off-diagonal terms between steps are dropped."]

    def _branches(self) -> Iterator[tuple[str, ...]]:
        for entry in self._report.dropped:
            base = self._places[entry.read_by[0] if entry.made_by is None else entry.made_by]
            outside = "input" if self._prefix else "argument"
            made = outside if entry.made_by is None else self._number(base.step)
            value, readers = cut(self._value(entry), VALUE), self._references(entry.read_by, base)
            meeting = self._references([entry.meet_in], base)
            yield f"  {value}", made, cut(readers, STEPS), cut(meeting, STEP)
        for page in self._inside():
            yield from page._branches()

    @staticmethod
    def _value(entry: Dropped) -> str:
        return f"{entry.value} at {shortened([entry.line])}" if entry.line else entry.value

    def _shared(self) -> Iterator[tuple[str, ...]]:
        for entry in self._report.shared:
            loop = self._number(self._places[entry.loop].step)
            yield f"  {cut(entry.value, 2 * VALUE)}", f"loop {loop}"
        for page in self._inside():
            yield from page._shared()

    def _mixing(self) -> Iterator[str]:
        for i in self._report.mixing:
            step = self._report.steps[i]
            yield step.rule if step.rule == "block" else step.primitives[0]
        for place in self._places:
            for page in self._bodies.get(place.step, ()):
                yield from page._mixing()

    def _inside(self) -> Iterator["_Page"]:
        return itertools.chain.from_iterable(self._bodies.values())

    def _references(self, indices: Iterable[int], base: Place) -> str:
        """The numbers under which steps are shown, seen from a step."""
        places = [self._places[i] for i in indices]
        count = Counter(place.step for place in places)
        first: dict[int, Place] = {place.step: place for place in reversed(places)}
        return ", ".join(
            self._number(i) + (f" (x {n})" if n > 1 else relative(first[i], base))
            for i, n in sorted(count.items())
        )

    # What a region would take together

    def one_by_one(self) -> list[str]:
        rows = list(self._one_by_one())
        if not rows:
            return []
        return [
            "Functions of whole matrices, each by itself. A decorator around what they compute",
            "together, hesscale_jax.exact or hesscale_jax.sampled, keeps the terms between them:",
            *aligned(rows),
        ]

    def _one_by_one(self) -> Iterator[tuple[str, ...]]:
        for number, step in self._with_rules("dense", "log_determinant", "sampled"):
            if not step.primitives[0].startswith("region["):
                yield f"  {number}", step.primitives[0], source(step)

    # What has no curvature of its own

    def taken_as_linear(self) -> list[str]:
        rows = [
            (f"  {number}", step.primitives[0], source(step))
            for number, step in self._with_rules("own_jacobian")
        ]
        if not rows:
            return []
        return [
            "Functions whose body has no derivative, taken as linear with the Jacobian of their",
            "own backward pass:",
            *aligned(rows),
        ]

    def _with_rules(self, *rules: str) -> Iterator[tuple[str, Step]]:
        for i in dict.fromkeys(place.step for place in self._places):
            step = self._report.steps[i]
            if step.rule in rules:
                yield self._number(i), step
            for page in self._bodies.get(i, ()):
                yield from page._with_rules(*rules)

    # What has no basis

    def coordinates(self) -> list[str]:
        layouts = self._report.layouts
        rows = repeated(
            (f"  {cut(name, VALUE)}", layout.reason)
            for name, layout in layouts
            if len(layout.shape) > 1 and not layout.factored
        )
        if not rows or not any(layout.factored for _, layout in layouts):
            return []
        return ["No layer's weights, so without a basis of its inputs:", *aligned(rows)]


def relative(place: Place, base: Place) -> str:
    """Which repeat of a step is meant, seen from another step."""
    if place.group is None:
        return ""
    if place.group != base.group:
        return f" of repeat {place.repeat + 1}" if place.repeat else ""
    if place.repeat == base.repeat:
        return ""
    if place.repeat == base.repeat + 1:
        return " of the next"
    return f" of repeat {place.repeat + 1}"


def _essence(step: Step) -> Step:
    """What steps that are shown once have in common."""
    results = tuple(dict.fromkeys(step.results))
    lines = () if step.library else step.lines[:1]  # a layer may be called from several lines
    return dataclasses.replace(step, results=results, lines=lines)


def repeated(rows: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Rows that differ in indices like ``[3]`` alone as one, with how often they come."""
    groups: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for row in rows:
        groups.setdefault((re.sub(r"\[\d+\](?=\[|$|\.)", "[*]", row[0]), *row[1:]), []).append(row)
    return [
        (*(key if len(set(found)) > 1 else found[0]), f"x {len(found)}" * (len(found) > 1))
        for key, found in groups.items()
    ]


def primitives(names: Sequence[str]) -> str:
    """Each name once, and how many equations there are if that does not say it."""
    text = " ".join(dict.fromkeys(names))
    count = f" ({len(names)})"
    if len(text) + len(count) > PRIMITIVES:
        text = text[: PRIMITIVES - len(count) - 4].rsplit(" ", 1)[0] + " ..."
        return text + count
    return text if len(set(names)) == len(names) else text + count


def shortened(lines: Sequence[str], parts: int = 2) -> str:
    """The lines by file, relative to the working directory or with the last parts of it."""
    files: dict[str, list[str]] = {}
    for file, number in (line.rsplit(":", 1) for line in lines):
        files.setdefault(file, []).append(number)
    text = ", ".join(f"{_shortened(file, parts)}:{','.join(n)}" for file, n in files.items())
    return cut(text, LINES)


def source(step: Step) -> str:
    """The library's line, and the user's by way of which it came: ``lib.py:3 (via loss.py:7)``."""
    if not step.library or step.library in step.lines:
        return shortened(step.lines)
    library = re.sub(r".*[/\\](site|dist)-packages[/\\]", "", step.library)
    return f"{library} (via {shortened(step.lines, parts=1)})"


def _shortened(file: str, parts: int) -> str:
    path, here = pathlib.Path(file), pathlib.Path.cwd()
    relative = path.relative_to(here) if path.is_relative_to(here) else path
    return str(relative if len(relative.parts) <= parts else pathlib.Path(*relative.parts[-parts:]))


def cut(text: str, width: int) -> str:
    """At most ``width`` characters."""
    return text if len(text) <= width else text[: width - 3] + "..."


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """One line per row, in columns two apart. A row of one cell is a line of its own."""
    full = [row for row in rows if len(row) > 1]
    widths = [max(map(len, column)) for column in itertools.zip_longest(*full, fillvalue="")]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
        for row in rows
    ]


def _letters(count: int) -> Sequence[str]:
    return [""] if count == 1 else [f"/{i}" for i in range(count)]
