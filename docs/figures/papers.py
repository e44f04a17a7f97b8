"""The papers' comparison of estimates: their distance from the exact diagonal, network by network.

    make figures                    every figure
    python docs/figures/papers.py   papers.png

Drawn from docs/results/data/papers.json, which `make benchmark-quality ARGS="--paper --seeds 40
--output docs/results/data/papers.json"` measures: a point a network, in the colour of its
activation; of their median, a line.
"""

import json
import statistics

from _style import FOLDER, GAUSS_NEWTON, GREY, HESSCALE, HUTCHINSON, PINK, options
from matplotlib.figure import Figure

MEASURED = FOLDER.parents[1] / "docs" / "results" / "data" / "papers.json"
METHODS = {
    "HesScale": "HesScale",
    "BL89": "BL89",
    "HesScaleGN": "HesScaleGN",
    "exact GGN": "exact GGN",
    "GGN-MC 1": "GGN-MC",
    "grad squared": "squared\ngradient",
    "Hutchinson 1": "AdaHessian\n(Hutchinson)",
}
ACTIVATIONS = {"tanh": HESSCALE, "relu": HUTCHINSON, "gelu": GAUSS_NEWTON, "elu": PINK}


def main() -> None:
    chosen = options(__doc__)
    results = json.loads(MEASURED.read_text())
    figure = Figure(figsize=(7.5, 3.4))
    ax = figure.subplots()
    for place, method in enumerate(METHODS):
        errors = [found["whole diagonal"][method] for found in results.values()]
        middle = statistics.median(errors)
        ax.plot([place - 0.3, place + 0.3], [middle] * 2, color="black", linewidth=1.5)
        for i, (name, error) in enumerate(zip(results, errors, strict=True)):
            colour = next(c for a, c in ACTIVATIONS.items() if name.split()[-1] == a)
            x = place - 0.2 + 0.4 * i / (len(errors) - 1)
            ax.plot(x, max(error, 1e-2), "o", color=colour, markersize=4)
    for name, colour in ACTIVATIONS.items():
        ax.plot([], [], "o", color=colour, markersize=4, label=name)
    ax.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
    ax.text(-0.4, 1.1, "predicting zero", color=GREY, fontsize=8)
    ax.set(yscale="log", ylabel="distance from the exact diagonal", ylim=(8e-3, 200))
    ax.set_xticks(range(len(METHODS)), METHODS.values(), fontsize=9)
    ticks = {0.01: "0.01 or 0", 0.1: "0.1", 1: "1", 10: "10", 100: "100"}
    ax.set_yticks(list(ticks), ticks.values())
    ax.legend(loc="upper left", ncols=4, fontsize=8)
    figure.savefig(chosen.output / "papers.png")


if __name__ == "__main__":
    main()
