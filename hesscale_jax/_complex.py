"""Complex numbers as pairs of real ones: the engine never learns of any other.

Where a program has complex values on the way from its inputs, each becomes its real and its
imaginary part, and each equation on them the equations that compute the parts:

    z w = (a c - b d) + i (a d + b c)       z = a + i b,   w = c + i d

So blocks carry the covariance of the two parts, as that of any two values. A part that is the same
number everywhere, as the imaginary part of a real array is, stays a Python float, and nothing is
computed for it. A function of which the parts have no short form is taken from JAX, part by part,
and its derivatives from JAX's derivative rule, so that they are JAX's at zeros and branch cuts too.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hesscale_jax._mesh import lying, varying

if TYPE_CHECKING:
    from hesscale_jax._jaxpr import Equation

__all__ = [
    "ANALYTIC",
    "FORMS",
    "MATRIX",
    "Complex",
    "apart",
    "filled",
    "is_complex",
    "own",
    "together",
]

# (equation, bind, *operands) -> results; each operand and result a real array or a Complex.
# bind applies the equation's primitive to other operands.
Form = Callable[..., Any]


class Complex(NamedTuple):
    """A complex value in two parts.

    Attributes:
      re: The real part: a real array, or a float if it is the same everywhere.
      im: The imaginary part, alike.
    """

    re: Any
    im: Any


def is_complex(aval: Any) -> bool:
    """Whether an array or a type of arrays is complex."""
    return getattr(getattr(aval, "dtype", None), "kind", "") == "c"


def real_dtype(value: Any) -> Any:
    """The dtype of the parts of a complex value, or of a real one."""
    return np.finfo(value.dtype).dtype if is_complex(value) else value.dtype


def apart(z: Any) -> Any:
    """A complex array in two parts; a real one as it is."""
    return Complex(lax.real(z), lax.imag(z)) if is_complex(z) else z


def together(x: Any) -> Any:
    """The array that was taken apart."""
    return lax.complex(x.re, x.im) if isinstance(x, Complex) else x


def filled(x: Any, value: Any) -> Any:
    """The parts of an operand or result as arrays, in the shape and dtype of the ``value``."""
    return Complex(*(_filled(part, value) for part in x)) if isinstance(x, Complex) else x


def _filled(part: Any, value: Any) -> Any:
    dtype = real_dtype(value)
    part = lax.convert_element_type(part, dtype)
    part = part if part.shape == value.shape else jnp.broadcast_to(part, value.shape)
    aval = getattr(value, "aval", value)
    return varying(lying(part, aval), aval)


# Arithmetic of parts


def plus(a: Any, b: Any) -> Any:
    """``a + b``."""
    for one, other in ((a, b), (b, a)):
        if isinstance(one, float) and (one == 0.0 or isinstance(other, float)):
            return one + other if isinstance(other, float) else other
    return lax.add(*_alike(a, b))


def negative(a: Any) -> Any:
    """``-a``."""
    return -a if isinstance(a, float) else lax.neg(a)


def minus(a: Any, b: Any) -> Any:
    """``a - b``."""
    if isinstance(a, float) or isinstance(b, float):
        return plus(a, negative(b))
    return lax.sub(a, b)


def times(a: Any, b: Any) -> Any:
    """``a b``, zero where one of them is."""
    for one, other in ((a, b), (b, a)):
        if isinstance(one, float):
            if isinstance(other, float) or one == 0.0:
                return one * other if isinstance(other, float) else 0.0
            if abs(one) == 1.0:
                return other if one == 1.0 else lax.neg(other)
    return lax.mul(*_alike(a, b))


def _alike(a: Any, b: Any) -> tuple[Any, Any]:
    """A float in the dtype of the other."""
    if isinstance(a, float):
        return np.asarray(a, b.dtype), b
    return a, np.asarray(b, a.dtype) if isinstance(b, float) else b


def _is_zero(part: Any) -> bool:
    return isinstance(part, float) and part == 0.0


# Sums and products


def _each(function: Callable[..., Any]) -> Form:
    """Part by part, the same function of real values."""

    def form(eqn: "Equation", bind: Any, *operands: Complex) -> Complex:
        return Complex(*map(function, *operands))

    return form


def _complex(eqn: "Equation", bind: Any, re: Any, im: Any) -> Complex:
    return Complex(re, im)


def _real(eqn: "Equation", bind: Any, z: Complex) -> Any:
    return _filled(z.re, eqn.inputs[0])


def _imag(eqn: "Equation", bind: Any, z: Complex) -> Any:
    return _filled(z.im, eqn.inputs[0])


def _conj(eqn: "Equation", bind: Any, z: Any) -> Complex:
    return Complex(z.re, negative(z.im)) if isinstance(z, Complex) else Complex(z, 0.0)


def _convert(eqn: "Equation", bind: Any, x: Any) -> Any:
    dtype = real_dtype(eqn.outputs[0])
    if not is_complex(eqn.outputs[0]):
        return lax.convert_element_type(_filled(x.re, eqn.inputs[0]), dtype)
    return _unless_float(
        lambda part: lax.convert_element_type(part, dtype),
        x if isinstance(x, Complex) else Complex(x, 0.0),
    )


def _broadcast(eqn: "Equation", bind: Any, z: Complex) -> Complex:
    return _unless_float(bind, z)


def _unless_float(function: Callable[[Any], Any], z: Complex) -> Complex:
    return Complex(*(part if isinstance(part, float) else function(part) for part in z))


def _mul(eqn: "Equation", bind: Any, z: Complex, w: Complex) -> Complex:
    """``(a c - b d) + i (a d + b c)``."""
    return _product(times, z, w)


def _product(f: Callable[[Any, Any], Any], z: Complex, w: Complex) -> Complex:
    return Complex(
        minus(f(z.re, w.re), f(z.im, w.im)),
        plus(f(z.re, w.im), f(z.im, w.re)),
    )


def _div(eqn: "Equation", bind: Any, z: Complex, w: Complex) -> Complex:
    """``z / c`` part by part for a real ``c``, else ``z (1 / w)``."""
    if _is_zero(w.im):
        a, b = (p if _is_zero(p) else lax.div(_filled(p, eqn.outputs[0]), w.re) for p in z)
        return Complex(a, b)
    inverse = _analytic("reciprocal", _reciprocal, filled(w, eqn.inputs[1]))
    return _product(times, z, inverse)


def _reciprocal(z: Any) -> Any:
    return lax.div(lax.full_like(z, 1), z)


def _square(eqn: "Equation", bind: Any, z: Complex) -> Complex:
    """``(a^2 - b^2) + i 2 a b``."""
    a, b = z
    squares = (x * x if isinstance(x, float) else lax.square(x) for x in z)
    return Complex(minus(*squares), times(2.0, times(a, b)))


def _integer_pow(eqn: "Equation", bind: Any, z: Complex) -> Complex:
    if eqn.params["y"] == 2:
        return _square(eqn, bind, z)
    return _by_jax(eqn, bind, z)


def _exp(eqn: "Equation", bind: Any, z: Complex) -> Complex:
    """``e^a cos b + i e^a sin b``."""
    size = float(np.exp(z.re)) if isinstance(z.re, float) else lax.exp(z.re)
    if isinstance(z.im, float):
        return Complex(times(float(np.cos(z.im)), size), times(float(np.sin(z.im)), size))
    return Complex(times(size, lax.cos(z.im)), times(size, lax.sin(z.im)))


def _multilinear(eqn: "Equation", bind: Any, x: Any, w: Any) -> Complex:
    """``(f(a, c) - f(b, d)) + i (f(a, d) + f(b, c))``."""
    changes = {}
    if eqn.params.get("preferred_element_type") is not None:
        changes["preferred_element_type"] = real_dtype(eqn.outputs[0])

    def f(a: Any, b: Any) -> Any:
        if _is_zero(a) or _is_zero(b):
            return 0.0
        return bind(_filled(a, eqn.inputs[0]), _filled(b, eqn.inputs[1]), **changes)

    x, w = (y if isinstance(y, Complex) else Complex(y, 0.0) for y in (x, w))  # one may be real
    return _product(f, x, w)


# Primitives that move entries, choose them, or add them up


def _selection(eqn: "Equation", bind: Any, *operands: Any) -> Any:
    """The same primitive on the real parts and on the imaginary parts."""
    fill = eqn.params.get("fill_value")  # of a gather
    if fill is None:
        return _by_part(eqn, [bind, bind], operands)
    fills = (functools.partial(bind, fill_value=x) for x in (np.real(fill), np.imag(fill)))
    return _by_part(eqn, list(fills), operands, always=True)


def _by_part(
    eqn: "Equation",
    binds: Sequence[Callable[..., Any]],
    operands: Sequence[Any],
    always: bool = False,
) -> Any:
    """A part that is zero everywhere stays so, unless it is ``always`` to be computed."""
    always = always or not all(map(is_complex, eqn.outputs))
    parts = []
    for name, bind in zip(("re", "im"), binds, strict=True):
        of_part = [getattr(x, name) if isinstance(x, Complex) else x for x in operands]
        moved = [p for p, x in zip(of_part, operands, strict=True) if isinstance(x, Complex)]
        if all(map(_is_zero, moved)) and not always:
            parts.append([0.0] * len(eqn.outputs))
            continue
        arrays = [
            _filled(p, v) if isinstance(x, Complex) else p
            for p, x, v in zip(of_part, operands, eqn.inputs, strict=True)
        ]
        parts.append(_listed(bind(*arrays)))
    # What is real comes out of both.
    results = [
        Complex(re, im) if is_complex(v) else re
        for re, im, v in zip(*parts, eqn.outputs, strict=True)
    ]
    return results if len(results) > 1 else results[0]


def _scatter(scatter: Callable[..., Any]) -> Form:
    """A scatter, whose reducer is of one dtype."""
    names = ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")

    def form(eqn: "Equation", bind: Any, *operands: Any) -> Any:
        params = {name: eqn.params[name] for name in names}
        return _by_part(eqn, [functools.partial(scatter, **params)] * 2, operands)

    return form


def _scatter_mul(eqn: "Equation", bind: Any, z: Any, indices: Any, w: Any) -> Any:
    """Part by part, if the factors are real; else ``z`` times an array of factors."""
    if isinstance(w, Complex) and _is_zero(w.im):
        w = Complex(w.re, w.re)  # what each part of the operand is multiplied by
        return _scatter(lax.scatter_mul)(eqn, bind, z, indices, w)
    one = Complex(lax.full(eqn.outputs[0].shape, 1, real_dtype(eqn.outputs[0])), 0.0)
    factors = _scatter(lax.scatter)(eqn, bind, one, indices, w)
    return _product(times, filled(z, eqn.inputs[0]), filled(factors, eqn.outputs[0]))


def _running(eqn: "Equation", bind: Any, z: Complex) -> Complex:
    """Running products, by products of neighbours as JAX's derivative takes them."""
    return _scanned(filled(z, eqn.inputs[0]), eqn.params["axis"], eqn.params["reverse"])


def _scanned(z: Complex, axis: int, reverse: bool = False) -> Complex:
    return lax.associative_scan(lambda z, w: _product(times, z, w), z, reverse, axis)


def _reduce_prod(eqn: "Equation", bind: Any, z: Complex) -> Complex:
    """The last of the running products over the axes."""
    z = filled(z, eqn.inputs[0])
    for axis in sorted(eqn.params["axes"], reverse=True):
        if z.re.shape[axis]:
            z = Complex(*(lax.index_in_dim(p, -1, axis, False) for p in _scanned(z, axis)))
        else:
            shape = [n for i, n in enumerate(z.re.shape) if i != axis]
            z = Complex(*(lax.full(shape, x, p.dtype) for x, p in zip((1, 0), z, strict=True)))
    return z


# Functions of which JAX has the values and the derivatives


def own(name: str) -> str:
    """What a function of parts is called that stands for a primitive. No Python function is."""
    return f"complex.{name}"


def as_function(name: str, function: Callable[..., Any], *parts: Any) -> Any:
    """A function of real arrays that has complex values inside, with JAX's derivative of it."""
    function.__name__ = own(name)
    wrapped = jax.custom_jvp(function)
    wrapped.defjvp(lambda primals, tangents: jax.jvp(function, primals, tangents))
    return wrapped(*parts)


def _analytic(name: str, function: Callable[..., Any], *operands: Any) -> Any:
    """Each part of a pointwise function by itself, as one of the parts of the operands."""
    leaves, tree = jax.tree.flatten(operands)

    def part(of: Callable[[Any], Any]) -> Any:
        def evaluated(*leaves: Any) -> Any:
            return of(function(*map(together, jax.tree.unflatten(tree, leaves))))

        return as_function(name, evaluated, *leaves)

    if is_complex(jax.eval_shape(lambda xs: function(*map(together, xs)), operands)):
        return Complex(part(lax.real), part(lax.imag))
    return part(lambda y: y)


def _by_jax(eqn: "Equation", bind: Any, *operands: Any) -> Any:
    """Any pointwise primitive."""
    return _analytic(eqn.name, bind, *map(filled, operands, eqn.inputs))


def _whole(eqn: "Equation", bind: Any, *operands: Any) -> Any:
    """The parts of all results together, as one function of those of the operands."""
    parts_of = [
        filled(x, v)[: 1 if _is_zero(x.im) else 2] if isinstance(x, Complex) else (x,)
        for x, v in zip(operands, eqn.inputs, strict=True)
    ]
    leaves, tree = jax.tree.flatten(parts_of)

    def evaluated(*leaves: Any) -> Sequence[Any]:
        parts = jax.tree.unflatten(tree, leaves)
        arrays = (lax.complex(*x) if len(x) == 2 else x[0] for x in parts)
        wanted = zip(arrays, eqn.inputs, strict=True)
        found = bind(*(lax.convert_element_type(x, v.dtype) for x, v in wanted))
        return tuple(jax.tree.leaves(list(map(apart, _listed(found)))))

    parts = iter(as_function(eqn.name, evaluated, *leaves))
    results = [
        Complex(next(parts), next(parts)) if is_complex(v) else next(parts) for v in eqn.outputs
    ]
    return results if len(results) > 1 else results[0]


def _linear_solve(eqn: "Equation", bind: Any, *operands: Any) -> Any:
    """Whole; there is no derivative in what the solver is made of, as a factorisation."""
    first = eqn.params["const_lengths"].matvec
    last = len(operands) - len(eqn.params["jaxprs"].matvec.out_avals)

    def solved(*operands: Any) -> Any:
        of_solver = map(lax.stop_gradient, operands[first:last])
        return bind(*operands[:first], *of_solver, *operands[last:])

    return _whole(eqn, solved, *operands)


def _listed(found: Any) -> list[Any]:
    return list(found) if isinstance(found, list | tuple) else [found]


# Written out by JAX's own values and derivatives, each part as a pointwise function.
ANALYTIC = (
    *("abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "cbrt", "cos", "cosh", "exp2"),
    *("expm1", "integer_pow", "log", "log1p", "logistic", "pow", "reciprocal", "rsqrt", "sin"),
    *("max", "min", "sinh", "sqrt", "tan", "tanh"),
)

# Taken whole: each part of a result may depend on all of the operands.
MATRIX = (
    *("cholesky", "custom_linear_solve", "eigh", "lu", "qr", "svd"),
    *("triangular_solve", "tridiagonal_solve"),
)

FORMS: Mapping[str, Form] = MappingProxyType(
    {
        **dict.fromkeys((name for name in ANALYTIC if name != "reciprocal"), _by_jax),
        # Parts, and numbers
        "broadcast_in_dim": _broadcast,
        "complex": _complex,
        "conj": _conj,
        "convert_element_type": _convert,
        "imag": _imag,
        "real": _real,
        # Pointwise
        **dict.fromkeys(("add", "add_any"), _each(plus)),
        "sub": _each(minus),
        "neg": _each(negative),
        "mul": _mul,
        "div": _div,
        "exp": _exp,
        "integer_pow": _integer_pow,
        "square": _square,
        # Products
        **dict.fromkeys(("dot_general", "conv_general_dilated"), _multilinear),
        "cumprod": _running,
        "reduce_prod": _reduce_prod,
        # Sums, choices and moves
        **dict.fromkeys(("reshape", "squeeze", "stack", "unstack"), _selection),
        **dict.fromkeys(("concatenate", "copy", "cumsum", "gather", "name", "pad"), _selection),
        **dict.fromkeys(("dynamic_slice", "dynamic_update_slice", "slice", "split"), _selection),
        **dict.fromkeys(("optimization_barrier", "reduce_sum", "rev", "select_n"), _selection),
        **dict.fromkeys(("reduce_window_sum", "tile", "transpose"), _selection),
        **dict.fromkeys(("device_put", "reshard", "sharding_constraint"), _selection),
        "scatter": _scatter(lax.scatter),
        "scatter-add": _scatter(lax.scatter_add),
        "scatter-mul": _scatter_mul,
        "scatter-sub": _scatter(lax.scatter_sub),
        # Linear algebra
        **dict.fromkeys(("fft", *MATRIX), _whole),
        "custom_linear_solve": _linear_solve,
    }
)
