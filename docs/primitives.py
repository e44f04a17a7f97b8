"""Writes docs/reference/primitives.md from the tables: every primitive, and why some raise."""

import inspect
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hesscale_jax import RULES
from hesscale_jax._complex import FORMS
from hesscale_jax._jaxpr import CALLS
from hesscale_jax.rules import UNSUPPORTED
from hesscale_jax.rules.derivatives import Pointwise, nested
from hesscale_jax.rules.selection import Join, PiecewiseConstant, Reduction, Selection, View
from hesscale_jax.rules.table import ByEquation

PAGE = Path(__file__).parent / "reference" / "primitives.md"

TITLE = """\
# Primitives

A loss may use any of these between the differentiated arguments and its value. Off that path every
primitive may be used. The formulas take moments forward: the primal `x`, the shift `dx` and the
spread `vx`; `J` is the Jacobian, and `*` multiplies entry by entry.
"""

POINTWISE = "`dy = sum_a phi_a da + sum_ab phi_ab cov(a, b)`, exact together with what is around it"


def family(name: str, rule: Any) -> tuple[str, str]:
    """The name of a rule's family, and its formula."""
    if rule is nested:
        return "Pointwise, by nested differentiation", POINTWISE
    if isinstance(rule, Pointwise):
        return "Pointwise, in closed form", POINTWISE
    if isinstance(rule, PiecewiseConstant):
        return "Piecewise constant", "a path ends: no derivative"
    if isinstance(rule, Reduction):
        return "Reductions", "`s = sum_k c_k u_k`, exact together with what is around it"
    if isinstance(rule, ByEquation):
        return "Depends on the equation", formula(rule.choose)
    if isinstance(rule, View | Join):
        return "Changes of shape", "`dy = J dx, vy = J vx`, inside blocks too"
    if isinstance(rule, Selection):
        return "Selections", formula(type(rule))
    return "Products, running sums and calls", formula(rule)


def formula(rule: Any) -> str:
    """The first line of a docstring, code marked as in Markdown."""
    (first, *_) = (inspect.getdoc(rule) or "").splitlines()
    return first.replace("``", "`").replace(".. ", "").removesuffix(".")


def page() -> str:
    """The page."""
    families: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, rule in RULES.items():
        title, line = family(name, rule)
        families[title][line].append(name)
    parts = [TITLE, f"Written out, as if they were not there: {listed(CALLS)}.\n"]
    parts.append(
        f"With complex values, written out in real and imaginary parts: {listed(FORMS)}; also "
        "loops, branches and functions with a derivative rule of their own.\n"
    )
    for title in sorted(families):
        parts.append(f"## {title}\n")
        parts.append(rows("formula", families[title]))
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, reason in UNSUPPORTED.items():
        reasons[reason].append(name)
    parts.append(
        "## What raises\n\n`UnsupportedPrimitiveError` gives the reason and the options.\n"
    )
    parts.append(rows("reason", reasons))
    return "\n".join(parts)


def rows(header: str, names: dict[str, list[str]]) -> str:
    """A table of primitives that share a line."""
    lines = [f"| primitives | {header} |", "|---|---|"]
    for line, members in names.items():
        lines.append(f"| {listed(members)} | {line.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def listed(names: Iterable[str]) -> str:
    """Names as code, in order."""
    return ", ".join(f"`{name}`" for name in sorted(names))


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
