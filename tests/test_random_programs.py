"""Random programs: the gradient is always right, the diagonal is what the method says it is.

That is the dense reference of ``tests/oracle.py``, and the exact one wherever theory says so.

``HESSCALE_EXAMPLES=20`` draws twenty times as many; ``python tests/programs.py`` checks them by
seed.
"""

import os
import random

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import programs
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import hesscale_jax as hs
from hesscale_jax import images

TIMES = int(os.environ.get("HESSCALE_EXAMPLES", "1"))
EXAMPLES = {
    "anything": 30,
    "control": 30,
    "state": 10,
    "half": 10,
    "block": 15,
    "views": 20,
    "segments": 20,
    "chain": 15,
    "loop": 20,
    "last_layer": 15,
    "meeting": 8,
    "plain_last_layer": 10,
    "units": 7,
    "several": 10,
    "penalized": 8,
    "convex": 10,
    "chain, some": 4,
    "last_layer, some": 6,
    "meeting, some": 4,
    "units, some": 4,
    "chain, respelled": 6,
    "last_layer, respelled": 10,
    "meeting, respelled": 8,
    "units, respelled": 6,
    "anything, claimed": 2,
    "control, claimed": 4,
    "loop, claimed": 2,
    "several, claimed": 2,
    "handing_out, claimed": 8,
    "pair, claimed": 15,
}


def test_every_family_is_tested() -> None:
    assert EXAMPLES.keys() == programs.FAMILIES.keys()


@pytest.mark.parametrize("family", EXAMPLES)
def test_random_program(family: str) -> None:
    draw, check = programs.FAMILIES[family]

    # A failing program is shrunk only where there is time for it.
    phases = [Phase.generate, *([Phase.shrink] if TIMES > 1 else [])]

    @settings(
        max_examples=TIMES * EXAMPLES[family],
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=False))
    def run(rng: random.Random) -> None:
        case = draw(rng)
        try:
            with programs.whole():
                check(case)
        except Exception as error:
            error.add_note(case.fun.__doc__)
            raise

    run()


def test_what_a_loop_stacks_comes_back_into_its_block_beyond_a_checkpoint() -> None:
    with programs.whole():
        programs.check_reference(programs.control(random.Random(3200000354)))


@pytest.mark.parametrize("family", ["meeting", "units", "loop"])
def test_traced_again_it_is_the_same_program(family: str) -> None:
    # In several processes too, which have to run the same: no order is that of a set.
    for seed in range(5):
        fun, args, *_ = programs.FAMILIES[family][0](random.Random(seed))
        fun = programs.respelled(fun) if family in programs.EXACT else fun

        def lowered(fun=fun, args=args) -> str:
            transformed = hs.hesscale(lambda *args: fun(*args), range(len(args)))
            return jax.jit(transformed).lower(*args).as_text()

        kept = [lowered() for _ in range(2)]
        assert lowered() == kept[0] == kept[1]


@pytest.mark.parametrize("family", ["anything", "control", "meeting", "segments"])
def test_whatever_is_left_out_the_gradient_is_right(family: str, monkeypatch) -> None:
    monkeypatch.setattr(images, "SHORT", 0)
    monkeypatch.setattr(images, "MOST_ADDED", 10)
    monkeypatch.setattr(images, "ADDED_PER_EQUATION", 0)
    for seed in range(6):
        fun, args, *_ = programs.FAMILIES[family][0](random.Random(seed))
        at = range(len(args))

        def both(*args, fun=fun, at=at):
            def loss(*args):
                return jnp.sum(fun(*args) ** 2)

            return hs.hesscale(loss, at)(*args), jax.grad(loss, tuple(at))(*args)

        (grads, hess_diag), expected = oracle.computed(both, *args)
        if oracle.is_finite(expected):
            assert_close(grads, expected)
            assert oracle.is_finite(hess_diag)


@pytest.mark.parametrize("seed", range(3))
def test_jit_equals_eager(seed: int) -> None:
    fun, args, *_ = programs.anything(random.Random(seed))
    transformed = hs.value_and_hesscale(fun, range(len(args)))
    assert_close(jax.jit(transformed)(*args), transformed(*args))


@pytest.mark.parametrize("seed", range(3))
def test_vmap_equals_a_loop(seed: int) -> None:
    fun, args, *_ = programs.anything(random.Random(seed))
    transformed = jax.jit(hs.hesscale(fun, range(len(args))))
    batch = [jnp.stack([x, 0.5 - x, 0.3 * x]) for x in args]
    looped = [transformed(*(x[i] for x in batch)) for i in range(3)]
    assert_close(jax.vmap(transformed)(*batch), jax.tree.map(lambda *x: jnp.stack(x), *looped))


def assert_close(received: object, expected: object) -> None:
    """Relative to the largest entry of each array."""
    for got, want in zip(jax.tree.leaves(received), jax.tree.leaves(expected), strict=True):
        scale = max(programs.FLOOR, np.abs(want).max())
        np.testing.assert_allclose(got, want, rtol=0, atol=programs.RTOL * scale)
