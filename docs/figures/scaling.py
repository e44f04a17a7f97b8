"""HesScale's cost over the width and the depth of an MLP.

    make figures                      every figure
    python docs/figures/scaling.py    scaling.png

Drawn from docs/results/data/scaling.json, which `make benchmark-cost ARGS=--scaling` measures:
ReLU, float32, batch 256 and 4 hidden layers, or batch 128 and width 512; the time of a compiled
call as a multiple of the gradient's, median and quartiles.
"""

import argparse
import json

from _style import FOLDER, GAUSS_NEWTON, GREY, HESSCALE, HUTCHINSON, options
from matplotlib.figure import Figure

MEASURED = FOLDER.parents[1] / "docs" / "results" / "data" / "scaling.json"
SWEEPS = {"width": "width of the hidden layers", "depth": "layers"}
METHODS = {
    "Hutchinson 1": (HUTCHINSON, "1 Hutchinson sample"),
    "HesScale": (HESSCALE, "HesScale"),
    "HesScaleGN": (GAUSS_NEWTON, "HesScaleGN"),
}


def main(options: argparse.Namespace) -> None:
    results = json.loads(MEASURED.read_text())["results"]
    figure = Figure(figsize=(8, 3.2))
    axes = figure.subplots(1, len(SWEEPS), sharey=True)
    for ax, (sweep, axis) in zip(axes, SWEEPS.items(), strict=True):
        sizes = [int(size) for size in results[sweep]]
        for name, (colour, label) in METHODS.items():
            found = [by_method[name] for by_method in results[sweep].values()]
            low, ratio, high = (
                [r[key] for r in found]
                for key in ("ratio_lower_quartile", "ratio", "ratio_upper_quartile")
            )
            ax.plot(sizes, ratio, "o-", color=colour, markersize=4, label=label)
            ax.fill_between(sizes, low, high, color=colour, alpha=0.15, linewidth=0)
        ax.axhline(5 / 3, color=GREY, linewidth=0.8, linestyle=":")
        ax.set(xscale="log", xlabel=axis, ylim=(0, None))
        ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
        ax.minorticks_off()
    axes[0].set_ylabel("time, in gradients")
    across = axes[0].get_yaxis_transform()
    axes[0].text(0.03, 5 / 3 - 0.1, "5/3", color=GREY, va="top", transform=across)
    axes[0].legend(loc="upper left")
    figure.savefig(options.output / "scaling.png")


if __name__ == "__main__":
    main(options(__doc__))
