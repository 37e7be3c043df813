"""What importing costs: seconds, no torch, no device."""

import os
import subprocess
import sys
import time

from mars_jax.runtime.environment import cpu_device_for_each_core


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)


def test_the_package_is_imported_in_under_two_seconds():
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        python("import mars_jax")
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 2


def test_every_core_becomes_a_device_unless_the_user_has_chosen(monkeypatch):
    for name in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    assert cpu_device_for_each_core() == {"JAX_NUM_CPU_DEVICES": str(len(os.sched_getaffinity(0)))}
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    assert cpu_device_for_each_core() == {}
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    assert cpu_device_for_each_core() == {}


def test_reading_a_config_file_imports_no_jax():
    code = "import sys; import mars_jax.config.load; print('jax' in sys.modules, 'transformers' in sys.modules)"
    assert python(code).stdout == "False False\n"


def test_naming_the_model_families_imports_none_of_them():
    code = (
        "import sys\n"
        "from mars_jax.models.families.registry import FAMILIES, model_config\n"
        "from mars_jax.errors import ConfigError\n"
        "try: model_config({'model_type': 'other'})\n"
        "except ConfigError: pass\n"
        "loaded = [name for name in sys.modules if name.startswith('mars_jax.models.families.')]\n"
        "print([name for name in FAMILIES.names if any(name in module for module in loaded)])"
    )
    assert python(code).stdout == "[]\n"


def test_no_module_of_ours_imports_torch_or_starts_a_device():
    # transformers imports torch wherever that is installed, so it has to wait for the first tokenizer.
    code = (
        "import importlib, pkgutil, sys\n"
        "import mars_jax\n"
        "names = [module.name for module in pkgutil.walk_packages(mars_jax.__path__, 'mars_jax.')]\n"
        "for name in names: importlib.import_module(name)\n"
        "import jax\n"
        "jax.config.update('jax_num_cpu_devices', 3)  # refused once there are devices\n"
        "print('mars_jax.pipeline' in names, 'torch' in sys.modules, 'transformers' in sys.modules, len(jax.devices()))"
    )
    assert python(code).stdout == "True False False 3\n"
