"""Moments through a function, and their transposition.

    make figures                      every figure
    python docs/figures/moments.py    moments.png

Left, a Gaussian x through y = exp(x): to second order the mean moves by f''(x) times the spread,
half of the variance, and the spread is multiplied by f'(x)^2. Right, what the library makes of it:
moments go forward through every equation, linearly; the transposed map takes 1 back to the gradient
and to the diagonal.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from _style import GREY, HESSCALE, HUTCHINSON, options
from matplotlib.axes import Axes
from matplotlib.figure import Figure

AT, DEVIATION = 0.3, 0.45


def through_a_curve(ax: Axes) -> None:
    spread = DEVIATION**2 / 2
    y, slope, curvature = (float(f(AT)) for f in (jnp.exp, jax.grad(jnp.exp), jax.hessian(jnp.exp)))
    shift, out = curvature * spread, slope**2 * spread
    x = np.linspace(AT - 3.2 * DEVIATION, AT + 2.1 * DEVIATION, 200)
    density = np.exp(-((x - AT) ** 2) / (4 * spread))
    bottom, left = -1.0, x[0] - 0.9
    ax.plot(x, np.exp(x), color="black")
    ax.fill_between(x, bottom, bottom + 0.8 * density, color=HUTCHINSON, alpha=0.3, linewidth=0)
    # The density of exp(x): that of x by the slope; both are scaled to be seen.
    pushed = density / np.exp(x)
    ax.fill_betweenx(np.exp(x), left, left + 0.7 * pushed / pushed.max(), color=HESSCALE, alpha=0.3)
    ax.plot([AT, AT, left], [bottom, y, y], color=GREY, linewidth=0.9, linestyle=":")
    ax.plot([left, left + 0.85], [y + shift] * 2, color=HESSCALE, linewidth=1.5)
    ax.text(left + 0.9, y + shift, "mean of y:\nup by ≈ $f''v_x$", color=HESSCALE, va="bottom")
    ax.text(AT + 0.3, bottom + 0.8, f"x: spread $v_x$ = {spread:.2f}", color=HUTCHINSON)
    ax.text(left + 0.05, y + 1.9, f"y: spread ≈ $f'^2 v_x$ = {out:.2f}", color=HESSCALE)
    ax.text(x[-1], np.exp(x[-1]), " f", va="bottom")
    ax.set(xlim=(left, x[-1] + 0.6), ylim=(bottom, np.exp(x[-1]) + 0.4), xticks=[], yticks=[])
    ax.set(xlabel="x", ylabel="y")
    mean, variance = np.exp(AT + spread), np.exp(2 * AT + 2 * spread) * np.expm1(2 * spread)
    print(
        f"spread of x {spread:.4f}; f'' v {shift:.3f}, and the mean moves by {mean - y:.3f}; ",
        end="",
    )
    print(f"f'^2 v {out:.3f}, and half of the variance is {variance / 2:.3f}")


def transposed(ax: Axes) -> None:
    ax.set(xlim=(0, 10), ylim=(0, 6))
    ax.set_axis_off()
    places = {"parameters": 1.1, "equations": 5.0, "loss": 8.9}
    for name, x in places.items():
        box = {"boxstyle": "round,pad=0.5", "facecolor": "white", "edgecolor": "black"}
        ax.text(x, 3, name, ha="center", va="center", bbox=box, zorder=3)
    rows = (4.6, HUTCHINSON, 1, ["$dp,\\ v_p$", "$dx,\\ v_x$", "shift"], "forward: moments")
    back = (1.4, HESSCALE, -1, ["gradient,\ndiagonal", "$g,\\ h$", "1"], "back: their transpose")
    for y, colour, direction, labels, title in (rows, back):
        xs = list(places.values())
        for x, label in zip(xs, labels, strict=True):
            ax.text(x, y, label, ha="center", va="center", color=colour)
        for a, b in zip(xs, xs[1:], strict=False):
            ends = [(a + 1.1, y), (b - 1.1, y)][::direction]
            arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.5}
            ax.annotate("", ends[1], ends[0], arrowprops=arrow)
        ax.text(5, y + 0.8 * direction, title, ha="center", va="center", color=colour)
    for a, b in zip(xs, xs[1:], strict=False):
        ax.plot([a, b], [3, 3], color="black", linewidth=1)


def main(options: argparse.Namespace) -> None:
    figure = Figure(figsize=(8.5, 3.6))
    left, right = figure.subplots(1, 2)
    through_a_curve(left)
    transposed(right)
    figure.savefig(options.output / "moments.png")


if __name__ == "__main__":
    main(options(__doc__))
