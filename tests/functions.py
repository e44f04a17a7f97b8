"""One line per public function: where to evaluate it.

What is a JAX array is differentiated; a NumPy array, a number or an option is held. Each line is
exact: the function acts entry by entry, or is one block. What isn't has a reason in ``EXCEPTIONS``.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy import special, stats

Line = tuple[Any, ...]  # operands, and perhaps options by name

REAL = jnp.array([-1.3, 0.4, 6.1])
OTHER = jnp.array([0.7, -0.9, 0.2])
POSITIVE = jnp.array([0.6, 1.7, 9.2])
SHAPE = jnp.array([2.3, 0.9, 1.4])
SECOND = jnp.array([1.2, 3.1, 0.8])
UNIT = jnp.array([0.06, 0.55, 0.93])
HALF = jnp.array([0.2, 0.45, 0.31])
COUNTS = np.array([1.0, 2.0, 5.0])
TRIALS = np.array([3.0, 4.0, 9.0])
LOC, SCALE = np.array([-0.3, 0.2, 0.1]), np.array([1.4, 0.8, 2.1])
AROUND = REAL, jnp.asarray(LOC), jnp.asarray(SCALE)
MATRIX = jnp.array([[0.3, -1.1, 0.8, 0.2], [1.4, 0.6, -0.5, 2.1]])

NN: dict[str, Line] = {
    "celu": (REAL,),
    "elu": (REAL,),
    "gelu": (REAL,),
    "glu": (MATRIX,),
    "hard_sigmoid": (REAL,),
    "hard_silu": (REAL,),
    "hard_swish": (REAL,),
    "hard_tanh": (REAL,),
    "identity": (REAL,),
    "leaky_relu": (REAL, OTHER),
    "log1mexp": (POSITIVE,),
    "log_sigmoid": (REAL,),
    "log_softmax": (MATRIX,),
    "logmeanexp": (MATRIX, {"axis": 1}),
    "logsumexp": (MATRIX, {"axis": 1}),
    "mish": (REAL,),
    "relu": (REAL,),
    "relu6": (REAL,),
    "selu": (REAL,),
    "sigmoid": (REAL,),
    "silu": (REAL,),
    "soft_sign": (REAL,),
    "softmax": (MATRIX,),
    "softplus": (REAL,),
    "sparse_plus": (REAL,),
    "sparse_sigmoid": (REAL,),
    "squareplus": (REAL, POSITIVE),
    "standardize": (MATRIX,),
    "swish": (REAL,),
    "tanh": (REAL,),
}

SPECIAL: dict[str, Line] = {
    "bessel_jn": (POSITIVE, {"v": 2, "n_iter": 20}),
    "beta": (SHAPE, SECOND),
    "betainc": (np.asarray(SHAPE), np.asarray(SECOND), UNIT),
    "betaln": (SHAPE, SECOND),
    "boxcox": (POSITIVE, OTHER),
    "boxcox1p": (POSITIVE, OTHER),
    "comb": (TRIALS + SHAPE, SHAPE),
    "dawsn": (REAL,),
    "digamma": (POSITIVE,),
    "entr": (POSITIVE,),
    "erf": (REAL,),
    "erfc": (REAL,),
    "erfcinv": (UNIT,),
    "erfinv": (UNIT,),
    "exp1": (POSITIVE,),
    "expi": (POSITIVE,),
    "expit": (REAL,),
    "expn": (2, POSITIVE),
    "factorial": (POSITIVE,),
    "fresnel": (REAL,),
    "gamma": (POSITIVE,),
    "gammainc": (SHAPE, POSITIVE),
    "gammaincc": (SHAPE, POSITIVE),
    "gammaln": (POSITIVE,),
    "hyp1f1": (SHAPE, SECOND, REAL),
    "hyp2f1": (np.asarray(SHAPE), np.asarray(SECOND), np.asarray(POSITIVE), HALF),
    "i0": (REAL,),
    "i0e": (REAL,),
    "i1": (REAL,),
    "i1e": (REAL,),
    "kl_div": (SHAPE, SECOND),
    "log_ndtr": (REAL,),
    "log_softmax": (MATRIX, {"axis": 1}),
    "loggamma": (POSITIVE,),
    "logit": (UNIT,),
    "logsumexp": (MATRIX, {"axis": 1}),
    "multigammaln": (POSITIVE + 1, 2),
    "ndtr": (REAL,),
    "ndtri": (UNIT,),
    "owens_t": (REAL, OTHER),
    "poch": (SHAPE, SECOND),
    "polygamma": (1, POSITIVE),
    "rel_entr": (SHAPE, SECOND),
    "sici": (REAL,),
    "softmax": (MATRIX, {"axis": 1}),
    "spence": (jnp.array([2.3, 0.9, 3.1]),),
    "xlog1py": (OTHER, POSITIVE),
    "xlogy": (OTHER, POSITIVE),
    "zeta": (SHAPE + 1, POSITIVE),
}

# The operands of a distribution's functions. Those of a probability have one in the first place.
DISTRIBUTIONS: dict[str, Line] = {
    "bernoulli": (np.array([0.0, 1.0, 1.0]), UNIT),
    "beta": (LOC + SCALE * UNIT, np.asarray(SHAPE), np.asarray(SECOND), LOC, SCALE),
    "betabinom": (COUNTS, TRIALS, SHAPE, SECOND),
    "binom": (COUNTS, TRIALS, UNIT),
    "cauchy": AROUND,
    "chi2": (POSITIVE + 1, SHAPE, LOC, SCALE),
    "dirichlet": (np.array([0.2, 0.5, 0.3]), SHAPE),
    "expon": (POSITIVE + 1, LOC, SCALE),
    "gamma": (POSITIVE + 1, SHAPE, LOC, SCALE),
    "gennorm": (REAL, SHAPE),
    "geom": (COUNTS, UNIT),
    "gumbel_l": (REAL, jnp.asarray(LOC), SCALE),
    "gumbel_r": (REAL, jnp.asarray(LOC), SCALE),
    "laplace": AROUND,
    "logistic": AROUND,
    "multinomial": (COUNTS.astype(int), 8, HALF / 0.96),
    "nbinom": (COUNTS, SHAPE, UNIT),
    "norm": AROUND,
    "pareto": (POSITIVE + 3, SHAPE, LOC, SCALE),
    "poisson": (COUNTS, SHAPE),
    "t": (REAL, SHAPE, LOC, SCALE),
    "truncnorm": (OTHER / 2, np.full(3, -1.2), np.full(3, 1.7), LOC, SCALE),
    "uniform": (LOC + SCALE * UNIT, LOC, SCALE),
    "vonmises": (OTHER, SHAPE),
    "wrapcauchy": (SHAPE, UNIT),
}

NUMPY: dict[str, Line] = {
    "cbrt": (POSITIVE,),
    "copysign": (REAL, np.array([1.0, -1.0, -1.0])),
    "deg2rad": (REAL,),
    "diff": (REAL,),
    "divmod": (REAL, SHAPE),
    "ediff1d": (REAL,),
    "exp2": (REAL,),
    "float_power": (POSITIVE, OTHER),
    "fmod": (REAL, SHAPE),
    "heaviside": (REAL, OTHER),
    "hypot": (REAL, OTHER),
    "i0": (REAL,),
    "interp": (UNIT, np.array([0.0, 0.4, 1.0]), OTHER),
    "logaddexp": (REAL, OTHER),
    "logaddexp2": (REAL, OTHER),
    "modf": (REAL,),
    "nan_to_num": (REAL,),
    "nanmean": (MATRIX,),
    "nanvar": (MATRIX,),
    "ptp": (MATRIX,),
    "remainder": (REAL, SHAPE),
    "sinc": (REAL,),
    "std": (MATRIX,),
    "unwrap": (REAL,),
    "var": (MATRIX,),
}

NN_ELSEWHERE = "tests/test_enumerated.py, among all functions of jax.nn"
UNDEFINED = "JAX has no second derivative of it, or no first"
MIXES = "it is not one block"
EXCEPTIONS: dict[str, str] = {
    "jax.nn.dot_product_attention": NN_ELSEWHERE,
    "jax.nn.get_scaled_dot_general_config": "makes no array",
    "jax.nn.one_hot": "of integers",
    "jax.nn.scaled_dot_general": NN_ELSEWHERE,
    "jax.nn.scaled_matmul": "runs on some GPUs alone",
    "jax.scipy.special.bernoulli": "of integers",
    "jax.scipy.special.erfcx": "JAX 0.12 has no second derivative of it",
    "jax.scipy.special.exp1": UNDEFINED,
    "jax.scipy.special.expn": UNDEFINED,
    "jax.scipy.special.gammasgn": "its derivative is 0",
    "jax.scipy.special.sph_harm_y": "of integers first, complex results",
    "jax.scipy.special.wofz": "complex results",
    "jax.scipy.stats.gaussian_kde": "a class",
    "jax.scipy.stats.gumbel_l.ppf": UNDEFINED,
    "jax.scipy.stats.gumbel_r.ppf": UNDEFINED,
    "jax.scipy.stats.mode": "its derivative is 0",
    "jax.scipy.stats.multivariate_normal.logpdf": MIXES,
    "jax.scipy.stats.multivariate_normal.pdf": MIXES,
    "jax.scipy.stats.rankdata": "its derivative is 0",
    "jax.scipy.stats.sem": MIXES,
}


def public() -> dict[str, Callable[..., Any]]:
    """The functions of ``jax.nn``, ``jax.scipy.special`` and ``jax.scipy.stats``."""
    found = {}
    modules = [jax.nn, special, stats]
    modules += [m for name, m in inspect.getmembers(stats, inspect.ismodule) if name[0] != "_"]
    for module in modules:
        for name, function in inspect.getmembers(module, callable):
            if not name.startswith("_"):
                found[f"{module.__name__}.{name}"] = function
    return found


LINES = ("jax.nn", "jax.scipy.special", "jax.scipy.stats", "jax.numpy")


def in_module(module: str) -> dict[str, tuple[Callable[..., Any], Line]]:
    """The functions of a module that have a line, and their operands."""
    found: dict[str, tuple[Callable[..., Any], Line]] = {}
    functions = {"jax.nn": NN, "jax.scipy.special": SPECIAL}.get(module, {})
    if module == "jax.numpy":
        return {f"jax.numpy.{name}": (getattr(jnp, name), line) for name, line in NUMPY.items()}
    for name, function in public().items():
        *_, distribution, last = name.split(".")
        if not name.startswith(module):
            continue
        if last in functions:
            found[name] = function, functions[last]
        elif module == "jax.scipy.stats" and distribution in DISTRIBUTIONS:
            line = DISTRIBUTIONS[distribution]
            if last == "entropy":
                line = line[1:]
            found[name] = function, (UNIT, *line[1:]) if last in ("ppf", "isf") else line
    return {name: found[name] for name in found if name not in EXCEPTIONS}
