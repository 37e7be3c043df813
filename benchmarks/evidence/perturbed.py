"""Share of runs of the demo on perturbed rounding that pick what the unperturbed one picks.

Definitions. The search of configs/demo.yaml runs again and again from one seed and the same data, each time compiled
anew in another way: for other instruction sets of the CPU, on another number of devices, at another level of
optimisation. All of these differ in rounding only, as machines do. Compared are the picks and the validation losses of
the runs that are kept. Convergence is not measured, since it decides nothing.

figure = share of the perturbed searches whose pick, ranks and rates, is that of the first.

    python -m benchmarks.evidence.perturbed
"""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.lib.child import DEMO, arguments, publish
from benchmarks.lib.trials import make_data
from mars_jax.runtime.jsonfiles import Document, read_json

_MARS = "from mars_jax.cli import main; main()"
_ISA, _LEVEL = "--xla_cpu_max_isa", "--xla_backend_optimization_level"
PERTURBATIONS: Mapping[str, Mapping[str, str]] = {
    "none": {},
    "AVX2": {"XLA_FLAGS": f"{_ISA}=AVX2"},
    "AVX": {"XLA_FLAGS": f"{_ISA}=AVX"},
    "SSE4_2": {"XLA_FLAGS": f"{_ISA}=SSE4_2"},
    "one device": {"JAX_NUM_CPU_DEVICES": "1"},
    "four devices": {"JAX_NUM_CPU_DEVICES": "4"},
    "AVX2, one device": {"XLA_FLAGS": f"{_ISA}=AVX2", "JAX_NUM_CPU_DEVICES": "1"},
    "SSE4_2, four devices": {"XLA_FLAGS": f"{_ISA}=SSE4_2", "JAX_NUM_CPU_DEVICES": "4"},
    "optimisation level 1": {"XLA_FLAGS": f"{_LEVEL}=1"},
    "optimisation level 2, AVX2": {"XLA_FLAGS": f"{_LEVEL}=2 {_ISA}=AVX2"},
    "no fast minimum and maximum": {"XLA_FLAGS": "--xla_cpu_enable_fast_min_max=false"},
    "one thread of products": {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"},
}
"""Name -> environment of a search."""


def main() -> None:
    """Runs the searches one after the other; on two cores each takes about a minute."""
    options = arguments(__doc__)
    names = ["none", "AVX2"] if options.short else list(PERTURBATIONS)
    rows = []
    with TemporaryDirectory() as folder:
        data = make_data(Path(folder) / "data", [])
        for name in names:
            began = time.monotonic()
            rows.append(searched(name, Path(folder) / name, data))
            seconds = time.monotonic() - began
            print(f"{name}: {rows[-1]['pick']}, {rows[-1]['loss']:.4f}, {seconds:.0f} s", file=sys.stderr, flush=True)
    first, *others = rows
    share = sum(row["pick"] == first["pick"] for row in others) / len(others)
    detail: Document = {"tables": {"Picks": rows}}
    publish(options, "perturbed", share, "share of the perturbed searches with the same pick", "at least 1", detail)


def searched(name: str, run: Path, data: Path) -> Document:
    """What a search under a perturbation picks, and the lowest validation loss of its final run."""
    files = [f"data.{split}={data / split}.json" for split in ("train", "validation", "test")]
    command = [sys.executable, "-c", _MARS, "select", str(DEMO), f"run_dir={run}", "convergence.rule=null"]
    environment = {**os.environ, **PERTURBATIONS[name], "JAX_COMPILATION_CACHE_DIR": str(run.parent / f"{name} cache")}
    subprocess.run([*command, *files], check=True, env=environment, stdout=sys.stderr, stderr=subprocess.DEVNULL)
    selection, begun = read_json(run / "selection.json"), read_json(run / "sweep" / "runs.json")["runs"]
    picked = [
        one
        for one in begun
        if (one["ranks"], one["factors"]) == (selection["pick"], selection["factors"]) and one["looks"][-1][1]
    ]
    factors = {module: f" x {factor:g}" for module, factor in selection["factors"].items()}
    return {
        "perturbation": name,
        "pick": ", ".join(f"{module} {rank}{factors.get(module, '')}" for module, rank in selection["pick"].items()),
        "loss": min(loss for _, loss in picked[0]["looks"]),
        "to the end": sum(one["looks"][-1][0] == picked[0]["looks"][-1][0] for one in begun),
    }


if __name__ == "__main__":
    main()
