"""Every test runs on four virtual CPU devices, with strict dtype and rank promotion."""

import atexit
import os
import shutil
import tempfile

if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker has what its parent has
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["EYAS_PROCESSES"] = "1"  # no pod is looked for
    # Tests are tiny and wait for compiling only; without LLVM's optimisations it takes half as long.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    # Programs that several tests compile, in whichever process, are compiled once a run.
    _CACHE = tempfile.mkdtemp(prefix="eyas-test-programs-")
    atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

import jax  # reads the environment

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
