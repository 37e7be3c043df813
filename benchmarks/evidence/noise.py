"""How much final runs of one configuration differ, by what differs: adapters, order of the data, rounding.

Six configurations of one task (`negative`) are trained as the tabular benchmark trains them: with four draws of the
adapters, with three more orders of the data, and with the program compiled for three other instruction sets, which
changes rounding alone. Given are standard deviations of the log of the final validation loss, pooled over the
configurations; and beside them the spread of the configurations that the benchmark holds of the task, those with a
frozen module among them, where its file is there. The setting was found on this task: batches, steps, averaged
adapters, and a base that knows German and sentences where they are asked for.

figure = the standard deviation between runs that differ in the draw of the adapters and in the order of the data.

    python -m benchmarks.evidence.noise [--short] [--anyway] [--out FOLDER]

Twelve minutes on two cores that did other work too.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.evidence.design import LENGTHS, configuration
from benchmarks.evidence.record import cell_job, run_together
from benchmarks.evidence.table import TABLE, cell_name, read_cell
from benchmarks.evidence.tasks import TASKS
from benchmarks.lib.child import answer, argument_parser, publish, run_child
from mars_jax.lanes.eval_points import best_loss
from mars_jax.runtime.jsonfiles import Document

TASK = "negative"
CHOSEN = (((2, 2), 3.0), ((8, 8), 1.0), ((2, 32), 1.0), ((32, 8), 1.0), ((32, 32), 1.0), ((8, 8), 1 / 3))
DRAWS, ORDERS = 4, 3
TARGETS = ("AVX2", "AVX", "SSE4_2")
GOAL = 0.015


def main() -> None:
    """Writes results/noise.json."""
    options = argument_parser(__doc__).parse_args()
    if options.child:
        answer(options.child, losses_of_runs)
        return
    steps = 32 if options.short else LENGTHS[0]
    targets = TARGETS[:1] if options.short else TARGETS
    orders = 1 if options.short else ORDERS
    with TemporaryDirectory() as folder:
        first = {"folder": folder, "steps": steps, "draws": list(range(2 if options.short else DRAWS)), "order": 0}
        by_draw = np.asarray(run_child(__file__, first)["losses"])  # [draws, configurations]
        others = [first | {"draws": [0], "order": order} for order in range(1, orders + 1)]
        by_order = np.concatenate([by_draw[:1], *(run_child(__file__, spec)["losses"] for spec in others)])
        flags = [f"--xla_cpu_max_isa={target}" for target in targets]
        by_target = [run_child(__file__, first | {"draws": [0]}, XLA_FLAGS=flag)["losses"] for flag in flags]
        by_rounding = np.concatenate([by_draw[:1], *by_target])
    deviations = {
        "draws of the adapters": pooled(by_draw),
        "orders of the data": pooled(by_order),
        "rounding": pooled(by_rounding),
    }
    total = math.hypot(deviations["draws of the adapters"], deviations["orders of the data"])
    rows = [
        {
            "configuration": configuration(pair, (factor, factor)).name,
            "loss": float(np.exp(np.log(by_draw[:, k]).mean())),
        }
        | {
            name: float(np.log(losses[:, k]).std(ddof=1))
            for name, losses in zip(deviations, (by_draw, by_order, by_rounding), strict=True)
        }
        for k, (pair, factor) in enumerate(CHOSEN)
    ]
    detail: Document = {"tables": {"Standard deviation of the log loss": rows}, "deviations": deviations}
    file = TABLE / f"{cell_name(TASK, 0, LENGTHS[0])}.parquet"
    if file.exists():
        detail["spread"] = spread(file)
    publish(options, "noise", total, "standard deviation of log final loss, run to run", f"at most {GOAL}", detail)


def losses_of_runs(folder: str, steps: int, draws: Sequence[int], order: int) -> Document:
    """Final losses [draws, configurations] of the chosen configurations."""
    job = cell_job(TASKS[TASK], 0, steps, Path(folder))
    wanted = [replace(configuration(pair, (factor, factor)), seed=draw) for draw in draws for pair, factor in CHOSEN]
    _, _, result = run_together(job, wanted, order)
    found = [best_loss(points, steps) for points in result.points]
    return {"losses": np.reshape(found, (len(draws), len(CHOSEN))).tolist()}


def pooled(losses: np.ndarray) -> float:
    """Standard deviation of log losses [runs, configurations] about their configuration's mean."""
    return float(np.sqrt(np.log(losses).var(axis=0, ddof=1).mean()))


def spread(file: Path) -> Document:
    """How far the configurations of a cell are apart: shares by which losses are above the lowest."""
    losses = np.sort([run.curve.loss for run in read_cell(file).runs if math.isfinite(run.curve.loss)])
    return {name: float(np.quantile(losses, part) / losses[0] - 1) for name, part in (("median", 0.5), ("worst", 1.0))}


if __name__ == "__main__":
    main()
