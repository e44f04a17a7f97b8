"""What the site needs beyond MkDocs: MathML for formulas, notebooks, docstrings in Markdown."""

import base64
import html
import json
import posixpath
import re
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import hesscale_jax as hs

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)

# What docstrings use of reStructuredText, as JAX's and Optax's do, and the same in Markdown.
MARKDOWN = {
    r":(?:func|class|mod|data):`~?([\w.]+)`": lambda m: reference(m[1]),
    r":math:`([^`]+)`": r"$\1$",
    r"`([^`<]+?)\s+<(https?:[^>]+)>`_": r"[\1](\2)",
    r"^( *)\.\. math::\n\n((?:\1 +\S.*\n|\n)+)": lambda m: (
        f"{m[1]}$$\n{m[2].strip()}\n{m[1]}$$\n\n"
    ),
    r"^( *)\.\. warning::\n": r"\1!!! warning\n\n",
    r"(?<=\w)::$": ":",
}
LEFT = re.compile(r"^ *\.\. |::$|:\w+:`|>`_", re.MULTILINE)  # Of reStructuredText.


def on_page_content(content: str, **_: Any) -> str:
    """MathML, which browsers show by themselves, in place of what a script would read."""

    def mathml(match: re.Match[str]) -> str:
        display = "inline" if match[2] == "(" else "block"
        return convert(html.unescape(match[3]), display=display)

    return FORMULA.sub(mathml, content)


class NotebookPage(File):
    """A page whose source is a notebook, so that links to the notebook lead to the page."""

    def is_documentation_page(self) -> bool:
        return True


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Notebooks as pages like all others, with the outputs that they were saved with."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        folder = notebook.src_uri.removesuffix(".ipynb")
        cells = json.loads(notebook.content_string)["cells"]
        text, pictures = from_notebook(cells, posixpath.basename(folder))
        files.remove(notebook)
        files.append(NotebookPage.generated(config, notebook.src_uri, content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, f"{folder}/{name}", content=content))
    return files


def from_notebook(cells: list[dict[str, Any]], folder: str) -> tuple[str, dict[str, bytes]]:
    """The Markdown of a notebook's cells, and the pictures that it shows from a folder."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                printed = "".join(output["text"]).rstrip()
                parts.append(f"```text\n{printed}\n```")
            else:
                name = f"{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(output["data"]["image/png"])
                parts.append(f"![{cell['metadata']['alt']}]({folder}/{name})")
    return "\n\n".join(parts), pictures


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
            text = obj.docstring.value
            for pattern, markdown in MARKDOWN.items():
                text = re.sub(pattern, markdown, text, flags=re.MULTILINE)
            if left := LEFT.search(text):
                raise ValueError(f"{obj.path}: no Markdown for {left[0]!r} in {text!r}")
            obj.docstring.value = text
