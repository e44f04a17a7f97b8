"""Examples in docstrings run as users have it; the tests are stricter, see tests/conftest.py."""

import jax
import pytest


@pytest.fixture(autouse=True)
def promotion_of_users(request):
    """Optax's own arithmetic needs the standard promotion of dtypes."""
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    with jax.numpy_dtype_promotion("standard"):
        yield
