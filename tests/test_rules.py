"""Every rule and every block, alone, against dense algebra at random cotangents."""

import jax
import jax.numpy as jnp
import pytest
from cases import CASES, normal

import hesscale_jax as hs
from hesscale_jax import _jaxpr
from hesscale_jax.testing import check_rule


@pytest.mark.parametrize("name", CASES)
def test_equals_dense_algebra(name):
    fun, *args = CASES[name]
    # float32 in the middle of a float64 program leaves float32's rounding.
    rtol = 1e-6 if name == "convert_element_type" else 1e-9
    check_rule(fun, *args, key=jax.random.key(3), rtol=rtol)


def test_every_rule_has_a_case():
    tested = set()
    for fun, *args in CASES.values():
        tested.update(eqn.name for eqn in _jaxpr.flatten(_jaxpr.trace(fun, *args)).equations)
    differentiable = {name for name, rule in hs.RULES.items() if rule is not hs.rules.constant}
    # add_any only arises from derivatives inside the loss, tested in test_transform.py; the other
    # is a primitive of newer versions of JAX that no public function of this one makes.
    assert differentiable - tested - {"add_any"} <= {"log2", "one_minus_square"}


def test_a_wrong_rule_is_found():
    spread_forgotten = hs.rules.unary(lambda x, y: (2 * x, None))
    rules = hs.RULES | {"square": spread_forgotten}
    with pytest.raises(AssertionError, match="hess_diag in argument 0"):
        check_rule(jnp.square, normal(3, 2), key=jax.random.key(0), rules=rules)
