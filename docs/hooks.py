"""What the site needs beyond MkDocs: formulas as MathML, and docstrings from reStructuredText."""

import html
import re
from typing import Any

import griffe
from latex2mathml.converter import convert

import hesscale_jax as hs

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)

# What docstrings use of reStructuredText, as JAX's and Optax's do, and the same in Markdown.
MARKDOWN = {
    r":(?:func|class|mod|data):`~?([\w.]+)`": lambda m: reference(m[1]),
    r":math:`([^`]+)`": r"$\1$",
    r"::$": ":",
    r"`([^`<]+?)\s+<(https?:[^>]+)>`_": r"[\1](\2)",
    r"^( *)\.\. math::\n\n((?:\1 +\S.*\n|\n)+)": lambda m: (
        f"{m[1]}$$\n{m[2].strip()}\n{m[1]}$$\n\n"
    ),
    r"^( *)\.\. warning::\n": r"\1!!! warning\n\n",
}


def on_page_content(content: str, **_: Any) -> str:
    """MathML, which browsers show by themselves, in place of what a script would read."""

    def mathml(match: re.Match[str]) -> str:
        display = "inline" if match[2] == "(" else "block"
        return convert(html.unescape(match[3]), display=display)

    return FORMULA.sub(mathml, content)


def reference(name: str) -> str:
    """A link to a name of ours; code for one of another library."""
    short = name.removeprefix("hesscale_jax.")
    if short not in hs.__all__:
        return f"`{name}`"
    return f"[`{short}`][{getattr(hs, short).__module__}.{short}]"


class FromSphinx(griffe.Extension):
    """Docstrings in Markdown."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            for pattern, markdown in MARKDOWN.items():
                text = re.sub(pattern, markdown, obj.docstring.value, flags=re.MULTILINE)
                obj.docstring.value = text
