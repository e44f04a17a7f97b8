"""Runs the notebook, and saves it with what it prints and draws.

    python docs/notebook.py

To be run after every change to it.
"""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).with_suffix(".ipynb")


def load() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def executed() -> nbformat.NotebookNode:
    """Returns the notebook with the outputs of now, but not when and by which Python."""
    notebook = load()
    client = NotebookClient(
        notebook, kernel_name="python3", timeout=300, record_timing=False, coalesce_streams=True
    )
    client.execute()
    notebook.metadata.language_info = {"name": "python"}
    return notebook


if __name__ == "__main__":
    nbformat.write(executed(), NOTEBOOK)
