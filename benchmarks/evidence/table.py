"""The tabular benchmark: every eval point of every recorded lane, in parquet files beside this one.

A file holds the lanes of one task, seed and length, a row for each eval point. Its schema is `SCHEMA`; what the columns
mean is in docs/evidence.md. Nothing is trained here.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.evidence.design import SEARCHED
from mars_jax.lanes.eval_points import EvalPoint
from mars_jax.runtime.durable import replacing
from mars_jax.runtime.jsonfiles import Document, dump_json
from mars_jax.search.trainer import Configuration, Curve

TABLE = Path(__file__).parent / "table"
VALIDATION = 256  # samples of an eval point

SCHEMA = pa.schema(
    [
        ("configuration", pa.int16()),  # number of the lane in the file, from 0
        *((f"{module}_rank", pa.int16()) for module in ("vision", "projector", "llm")),
        *((f"{module}_factor", pa.float64()) for module in SEARCHED),  # on the learning rate of the module
        ("draw", pa.int8()),  # of the adapters; 0 but for restarts
        ("step", pa.int32()),
        ("train_loss", pa.float32()),  # mean since the eval point before, nats a token; null at step 0
        ("validation_loss", pa.float32()),  # nats a token; null where it was not finite
        *((f"{module}_norm", pa.float32()) for module in ("vision", "projector", "llm")),  # of the update
        ("alive", pa.bool_()),
        ("sample_losses", pa.list_(pa.float16(), VALIDATION)),  # at rungs: `EvalPoint.sample_losses`
        ("test_loss", pa.float32()),  # at the last row of a lane: of its adapters with the lowest validation loss
    ]
)


@dataclass(frozen=True)
class RecordedRun:
    """A lane that ran to its end.

    Attributes:
        curve: its configuration and eval points.
        test_loss: of its adapters with the lowest validation loss, nats a token.
    """

    curve: Curve
    test_loss: float


@dataclass(frozen=True)
class Cell:
    """The lanes of a task, seed and length.

    Attributes:
        task: name of the task.
        seed: of the adapters, the order of the data and the choice of samples.
        steps: of a final run.
        num_samples: D of a final run.
        rates: module -> learning rate at a factor of 1.
        parameters_per_rank: module -> trainable parameters of one rank.
        runs: the lanes.
    """

    task: str
    seed: int
    steps: int
    num_samples: int
    rates: Mapping[str, float]
    parameters_per_rank: Mapping[str, int]
    runs: Sequence[RecordedRun]

    @property
    def name(self) -> str:
        """Stem of its file."""
        return cell_name(self.task, self.seed, self.steps)


def cell_name(task: str, seed: int, steps: int) -> str:
    """Stem of the file of a cell."""
    return f"{task}-seed{seed}-{steps}"


def write_cell(cell: Cell, rungs: Sequence[int], folder: Path = TABLE) -> None:
    """Writes a cell; losses of single samples are kept at the steps `rungs` alone."""
    rows = [_row(number, run, point, rungs) for number, run in enumerate(cell.runs) for point in run.curve.points]
    about = {one.name: getattr(cell, one.name) for one in fields(cell) if one.name != "runs"}
    table = pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata({"cell": dump_json(about)}))
    with replacing(folder / f"{cell.name}.parquet") as temporary:
        pq.write_table(table, temporary, compression="zstd", compression_level=19)


def _row(number: int, run: RecordedRun, point: EvalPoint, rungs: Sequence[int]) -> Document:
    configuration, last = run.curve.configuration, run.curve.points[-1].step
    samples = np.asarray(point.sample_losses, np.float16) if point.step in rungs and point.sample_losses else None
    return {
        "configuration": number,
        **{f"{module}_rank": rank for module, rank in configuration.ranks.items()},
        **{f"{module}_factor": configuration.factors.get(module, 1.0) for module in SEARCHED},
        "draw": configuration.seed,
        "step": point.step,
        "train_loss": point.train_loss,
        "validation_loss": point.validation_loss if np.isfinite(point.validation_loss) else None,
        **{f"{module}_norm": norm for module, norm in point.update_norm.items()},
        "alive": point.alive,
        "sample_losses": samples,
        "test_loss": run.test_loss if point.step == last and np.isfinite(run.test_loss) else None,
    }


def read_cell(file: Path) -> Cell:
    """The inverse of `write_cell`; losses of single samples have the digits of float16."""
    table = pq.read_table(file)
    about = json.loads(table.schema.metadata[b"cell"])
    points: dict[int, list[EvalPoint]] = {}
    configurations: dict[int, Configuration] = {}
    test_losses: dict[int, float] = {}
    for row in table.to_pylist():
        number = row["configuration"]
        if number not in configurations:
            configurations[number] = _configuration(row)
            points[number], test_losses[number] = [], np.inf
        points[number].append(_point(row))
        if row["test_loss"] is not None:
            test_losses[number] = row["test_loss"]
    runs = [
        RecordedRun(Curve(configuration, tuple(points[number])), test_losses[number])
        for number, configuration in configurations.items()
    ]
    return Cell(**about, runs=runs)


def read_table(folder: Path = TABLE) -> list[Cell]:
    """All cells that are there, by name."""
    return [read_cell(file) for file in sorted(folder.glob("*.parquet"))]


def _configuration(row: Document) -> Configuration:
    ranks = {module: row[f"{module}_rank"] for module in ("vision", "projector", "llm")}
    factors = {module: row[f"{module}_factor"] for module in SEARCHED}
    return Configuration(ranks, {module: factor for module, factor in factors.items() if factor != 1.0}, row["draw"])


def _point(row: Document) -> EvalPoint:
    loss = row["validation_loss"]
    return EvalPoint(
        step=row["step"],
        validation_loss=np.inf if loss is None else loss,
        train_loss=row["train_loss"],
        update_norm={module: row[f"{module}_norm"] for module in ("vision", "projector", "llm")},
        alive=row["alive"],
        sample_losses=tuple(map(float, row["sample_losses"] or ())),
    )
