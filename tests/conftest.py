"""Strict mode for every test: no silent dtype or rank promotion, 8 virtual CPU devices; warnings fail (pyproject)."""

import os
import signal

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jax
import pytest

# Of a shell's background jobs SIGINT is ignored, in the processes too that tests of interrupts start.
signal.signal(signal.SIGINT, signal.default_int_handler)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session", autouse=True)
def _compiled_programs(tmp_path_factory):
    """Commands that run in this process keep their programs in a temporary folder, not in the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("programs")))
        yield


# Files of few and long tests, which would otherwise come last and leave a worker idle: xdist begins with the files of
# most tests, unless told `--no-loadscope-reorder`.
_LONGEST = (
    "tests/test_pipeline.py",
    "tests/job/test_kill.py",
    "tests/job/test_qwen_job.py",
    "tests/test_extending.py",
    "tests/job/test_full_rank_job.py",
    "tests/data/test_packing.py",
    "tests/search/test_compare.py",
    "tests/search/probes/test_swaps.py",
    "tests/lanes/test_sharded.py",
    "tests/runtime/test_interrupts.py",
    "tests/search/test_warm_start.py",
    "tests/search/probes/test_nested.py",
    "tests/benchmarks/test_counts.py",
    "tests/test_demo.py",
    "tests/models/families/test_llava.py",
    "tests/models/families/test_qwen2_5_vl.py",
)


def pytest_collection_modifyitems(items):
    """Begins with the files that take longest."""
    order = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(str(item.path.relative_to(item.config.rootpath)), len(order)))
