"""The public face: every name that is listed loads, and importing loads nothing else."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import mars_jax

ROOT = Path(__file__).parent.parent
LISTED = re.findall(r"import (\w+) as \1$", (ROOT / "mars_jax" / "__init__.pyi").read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", LISTED)
def test_a_public_name_loads_and_is_documented(name):
    member = getattr(mars_jax, name)
    assert member.__doc__


def test_the_public_names_are_those_of_the_list():
    assert len(set(LISTED)) == len(LISTED) > 60
    assert set(mars_jax.__all__) == {*LISTED, "__version__"}
    with pytest.raises(AttributeError, match="Workspace"):
        mars_jax.Workspace  # noqa: B018


def test_importing_the_package_loads_no_array_library():
    code = "import mars_jax, sys; print(*({'jax', 'numpy', 'torch', 'flax', 'grain'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []
