"""What the figures share: their look, their command line, and the way to the benchmarks."""

import argparse
import sys
from pathlib import Path

import matplotlib

FOLDER = Path(__file__).parent
sys.path.append(str(FOLDER.parents[1] / "benchmarks"))

# Okabe and Ito's colours, which the colour-blind tell apart too.
HESSCALE, GAUSS_NEWTON, HUTCHINSON = "#D55E00", "#009E73", "#0072B2"
YELLOW, PINK, LIGHT_BLUE, GREY = "#E69F00", "#CC79A7", "#56B4E9", "0.45"

matplotlib.rcParams |= {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.dpi": 120,
    "font.size": 10,
    "legend.frameon": False,
}


def options(docstring: str) -> argparse.Namespace:
    """Of every script: where to put its pictures, and whether only to try it."""
    parser = argparse.ArgumentParser(
        description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=FOLDER, help="a folder")
    parser.add_argument("--smoke", action="store_true", help="only try it, at the smallest size")
    return parser.parse_args()
