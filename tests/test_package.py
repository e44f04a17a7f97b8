"""What is shipped: the public names, the type information, one version everywhere."""

import importlib.metadata
import importlib.resources
import re

import pytest

import hesscale_jax as hs
import hesscale_jax.optimizers


@pytest.mark.parametrize("module", [hs, hesscale_jax.optimizers], ids=lambda m: m.__name__)
def test_public_names_exist_and_are_documented(module):
    assert len(set(module.__all__)) == len(module.__all__) > 0
    for name in module.__all__:
        # A table has no docstring of its own.
        assert name == "RULES" or getattr(module, name).__doc__, name


def test_the_main_entry_points_are_public():
    assert {"hesscale", "value_and_hesscale", "RULES", "Moments"} <= set(hs.__all__)
    assert set(hesscale_jax.optimizers.__all__) - {"ScaleByHesScaleState"} <= set(hs.__all__)


def test_type_information_is_shipped():
    assert (importlib.resources.files("hesscale_jax") / "py.typed").is_file()


def test_version_is_that_of_the_installed_package():
    try:
        installed = importlib.metadata.version("hesscale_jax")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("tested in a checkout that is not installed; `make test` installs it")
    assert hs.__version__ == installed
    # From the tag; between two releases, with the number of commits since.
    assert re.fullmatch(r"\d+\.\d+(\.\d+)?(\.dev\d+.*)?", installed)
