"""Settings of all tests: float64, no implicit promotion of dtypes or ranks, fixed examples."""

import gc
import importlib.metadata
import os

# One thread and no accelerator for each of the parallel processes. What is set outside wins.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Newer versions don't know the last three flags: with two of them, compilation is three times as
# fast, and without the third sums are wrong now and then.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_multi_thread_eigen=false --xla_force_host_platform_device_count=8"
    + " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    " --xla_cpu_experimental_ynn_fusion_type="
    * importlib.metadata.version("jaxlib").startswith("0.10."),
)

import hypothesis
import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)  # most of the time is compilation
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Looking through the objects that tracing leaves, which live, would take 5 to 10 % of the time.
gc.set_threshold(50_000, 20, 20)

hypothesis.settings.register_profile("reproducible", derandomize=True, deadline=None)
hypothesis.settings.load_profile("reproducible")
