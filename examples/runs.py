"""What the training examples share: the choice of an optimizer, and runs that can be resumed."""

import csv
import time
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeVar

import optax
import orbax.checkpoint as ocp
from matplotlib.figure import Figure

import hesscale_jax as hs

Curvature = Literal["hessian", "gauss_newton"]
State = TypeVar("State")

# By name, the curvature that an optimizer is fed.
OPTIMIZERS: dict[str, Curvature | None] = {
    "adam": None,
    "adahesscale": "hessian",
    "adahesscale-gn": "gauss_newton",
    "scaled-adam": "hessian",
    "scaled-adahesscale": "hessian",
    "scaled-adahesscale-gn": "gauss_newton",
    "sophia": "gauss_newton",
}


def optimizer(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    *,
    eps: float = 1e-3,
    delta: float = 1e-5,
) -> tuple[optax.GradientTransformation, Curvature | None]:
    """An optimizer of `OPTIMIZERS`, and the curvature for its `update`.

    Args:
        name: One of `OPTIMIZERS`.
        learning_rate: A number, or a schedule.
        eps: AdaHesScale's, in units of curvature. With the paper's 1e-8, a weight that has hardly
            mattered so far may be thrown far away by the first batch in which it does.
        delta: Where steps are scaled, the most that the curvature along one may add to the loss:
            enough to shorten the longest of `char_lm.py`. In reinforcement learning, the paper has
            1e-8.
    """
    curvature = OPTIMIZERS[name]
    match name.removesuffix("-gn"):
        case "adam":
            tx = optax.adam(learning_rate)
        case "adahesscale":
            tx = hs.adahesscale(learning_rate, eps=eps)
        case "scaled-adam":
            tx = hs.scaled_adam(learning_rate, delta=delta)
        case "scaled-adahesscale":
            tx = hs.scaled_adahesscale(learning_rate, eps=eps, delta=delta)
        case "sophia":
            # Its default is to look at every tenth diagonal, as they cost it more: b2 is to match.
            tx = optax.contrib.sophia(
                learning_rate,
                b2=0.999,
                update_interval=1,
                hessian_diagonal_fn=hs.hess_diag_as_estimator(),
            )
    return tx, curvature


class Run:
    """A run's directory: `curves.csv`, `curves.png`, and `checkpoints` to resume it from.

    with Run(directory, resume=True) as run:
        state = run.restore(state)
        for step in range(run.step, steps):
            state, loss = train_step(state, step)
            run.record(step + 1, loss=loss)
            run.save(step + 1, state)
    """

    def __init__(self, directory: Path, resume: bool) -> None:
        self._curves = directory / "curves.csv"
        self._picture = directory / "curves.png"
        self._checkpoints = ocp.CheckpointManager(
            directory.absolute() / "checkpoints",
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(2),
                cleanup_tmp_directories=True,  # Those of a run that was killed while it wrote one.
            ),
        )
        # How many steps the latest checkpoint is after; 0 if there is none.
        self.step = self._checkpoints.latest_step() or 0
        if self.step and not resume:
            raise SystemExit(
                f"{directory} holds a run that is at step {self.step}: --resume it, or choose "
                "another --output"
            )
        self._forget_rows_after(self.step)
        rows = self.rows()
        self._start = time.perf_counter() - (float(rows[-1]["seconds"]) if rows else 0.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: type | BaseException | TracebackType | None) -> None:
        self._checkpoints.close()  # Waits until they are written.

    def restore(self, state: State) -> State:
        """The latest checkpoint's state; without one, the state as it is."""
        if not self.step:
            return state
        return self._checkpoints.restore(self.step, args=ocp.args.StandardRestore(state))

    def save(self, step: int, state: State) -> None:
        """Saves a pytree of arrays, after so many steps, in the background."""
        self._checkpoints.save(step, args=ocp.args.StandardSave(state))

    def record(self, step: int, **values: float) -> None:
        """Appends a row to the curves: before the checkpoint of the same step is saved."""
        seconds = time.perf_counter() - self._start
        row = {"step": step, "seconds": f"{seconds:.2f}", **values}
        with self._curves.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)

    def rows(self) -> list[dict[str, str]]:
        with self._curves.open(newline="") as file:
            return list(csv.DictReader(file))

    def _forget_rows_after(self, step: int) -> None:
        with self._curves.open("ab+") as file:
            file.seek(0)
            header, *rows = file.readlines() or [b""]
            kept = [row for row in rows if int(row.split(b",")[0]) <= step]
            file.truncate(len(header + b"".join(kept)) if kept else 0)

    def draw(self) -> None:
        """Draws the curves, one panel a column."""
        rows = self.rows()
        names = [name for name in rows[0] if name not in ("step", "seconds")]
        figure = Figure(figsize=(3.5 * len(names), 3), layout="constrained")
        for ax, name in zip(figure.subplots(1, len(names), squeeze=False).flat, names, strict=True):
            steps, values = zip(*((int(r["step"]), float(r[name])) for r in rows), strict=True)
            ax.plot(steps, values, color="#0072B2", linewidth=1.2)
            ax.set(title=name.replace("_", " "), xlabel="steps")
            ax.grid(alpha=0.3)
            ax.spines[["top", "right"]].set_visible(False)
        figure.savefig(self._picture, dpi=100)
