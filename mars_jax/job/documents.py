"""Shapes of the JSON files of a run directory that are read as they are: the keys that are read, and their types.

A file of another shape is refused by `RunDirectory.read` or `RunDirectory.lines`, at the key. Other keys may be there
too; what the report may lack has a default. None stands for NaN and infinities, which JSON lacks, or for what older
runs didn't write. The trials and the sources have classes of their own, which `load_json` and `load_jsonl` read; so
has the pick where it is trained, `search.selection`, of which only the shape for others stands here.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mars_jax.job import files
from mars_jax.laws.records import LaneRecord
from mars_jax.runtime.durable import Content

Number = float | None
Numbers = dict[str, float | None]
Counts = dict[str, int]


@dataclass(frozen=True)
class PhaseRecord:
    """A phase in state.json.

    Attributes:
        status: how far it is.
        started: when this attempt began.
        finished: when it ended.
        seconds: that all attempts at these inputs took.
        error: what ended it.
        inputs: name -> hash of each input; older runs wrote none.
        outputs: file, relative to the run directory -> what the finished phase left in it.
    """

    status: Literal["running", "done", "failed", "interrupted"]
    started: str = ""
    finished: str | None = None
    seconds: float = 0.0
    error: str | None = None
    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, Content] | None = None


@dataclass(frozen=True)
class State:
    """state.json."""

    phases: dict[str, PhaseRecord]
    versions: dict[str, str] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    config: str | None = None


@dataclass(frozen=True)
class Data:
    """data.json."""

    files: dict[str, str] = field(default_factory=dict)
    sources: str | None = None
    prompt: str | None = None
    train: int | None = None
    validation: int | None = None
    test: int | None = None
    formats: list[str] | dict[str, Any] | None = None
    dropped: list[dict[str, Any]] | None = None
    shapes: dict[str, Any] | None = None
    padding: dict[str, Any] | None = None
    tokens_per_sample: float | None = None


@dataclass(frozen=True)
class Plan:
    """plan.json."""

    lanes: int
    runs: int | None = None
    lane_steps: int | None = None
    samples: int | None = None
    flops: Number = None
    final_runs: int | None = None
    full_grid_steps: int | None = None


@dataclass(frozen=True)
class Progress:
    """progress.json."""

    phase: str
    lanes: Counts


@dataclass(frozen=True)
class Event:
    """A line of events.jsonl; `lanes` and `steps`, one of each lane, are those of a group."""

    event: str
    lanes: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuses a group without lanes, or without the last step of each."""
        if self.event == "group" and not 0 < len(self.lanes) == len(self.steps):
            raise ValueError(
                f"a group has {len(self.lanes)} lanes and {len(self.steps)} steps; it has as many of each, 1 or more"
            )


@dataclass(frozen=True)
class Point:
    """An eval point; `remaining`, `interaction` and `hybrids` are those of module swaps (see `EvalPoint`)."""

    step: int
    validation_loss: Number
    train_loss: Number
    update_norm: Numbers
    drift: Numbers
    alive: bool
    reason: str | None
    remaining: Numbers = field(default_factory=dict)
    interaction: Number = None
    hybrids: Numbers = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses one part of the module swaps without the other."""
        if bool(self.remaining) != bool(self.hybrids):
            raise ValueError("has one of remaining and hybrids, which belong together")


@dataclass(frozen=True, kw_only=True)
class CurvePoint(Point):
    """A line of probes/curves.jsonl."""

    lane: str


@dataclass(frozen=True)
class LaneBlock:
    """probes/lane_block.json."""

    lane_block: int


@dataclass(frozen=True)
class ConvergenceLaw:
    """A Law-C in laws.json."""

    k: float
    gamma: float
    delta: float
    E: float
    rmse_log: float
    ci: dict[str, list[float]]
    points: int
    censored: int


@dataclass(frozen=True)
class PerformanceLaw:
    """A Law-P in laws.json."""

    form: Literal["power", "power_overfit"]
    A: float
    alpha: dict[str, float]
    beta: float
    E: float
    ci: dict[str, list[float]]
    overfit: dict[str, Any] | None
    held_out_error: Number
    order_tau: Number


@dataclass(frozen=True)
class Draws:
    """The bootstrap draws in laws.json."""

    convergence: dict[str, dict[str, list[float]]]
    performance: dict[str, list[float]] | None
    multiplicative: dict[str, list[float]] | None


@dataclass(frozen=True)
class Laws:
    """laws.json."""

    convergence: dict[str, ConvergenceLaw]
    untimed: dict[str, str]
    performance: PerformanceLaw | None
    multiplicative: PerformanceLaw | None
    diverged: int
    draws: Draws


@dataclass(frozen=True)
class Candidate:
    """A rank vector in selection.json, as the report shows it."""

    ranks: Counts
    parameters: int = 0
    predicted_loss: Number = None
    predicted_ci: list[float | None] = field(default_factory=list)
    convergence_steps: Numbers = field(default_factory=dict)
    imbalance: Number = None
    kept: bool = False
    reason: str | None = None
    p_best: Number = None
    probed_loss: Number = None


@dataclass(frozen=True)
class Selection:
    """selection.json, as the report shows it."""

    pick: Counts
    target_num_samples: int | None = None
    method: str = ""
    explanation: str = ""
    candidates: list[Candidate] = field(default_factory=list)
    p_best: Number = None
    fallback: str | None = None
    tau: Number = None
    factors: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    step_law: dict[str, Any] | None = None
    convergence_steps: Numbers = field(default_factory=dict)


@dataclass(frozen=True)
class BegunRun:
    """A final run in sweep/runs.json."""

    ranks: Counts
    looks: list[list[float | None]]
    factors: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    parameters: dict[str, int] = field(default_factory=dict)
    learning_rate: dict[str, float] = field(default_factory=dict)
    sample_losses: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class Sweep:
    """sweep/runs.json."""

    runs: list[BegunRun]


@dataclass(frozen=True)
class KeptRun:
    """The final run in sweep/final.json."""

    ranks: Counts
    num_samples: int
    learning_rate: dict[str, float]
    points: list[Point]
    warm_start: str | None
    seed: int = 0


@dataclass(frozen=True)
class Kept:
    """sweep/final.json."""

    settings: str
    run: KeptRun


@dataclass(frozen=True)
class Metric:
    """A line of finetune/metrics.jsonl."""

    step: int
    validation_loss: Number = None
    train_loss: Number = None


@dataclass(frozen=True)
class Summary:
    """finetune/summary.json."""

    ranks: Counts
    steps: int | None = None
    best_step: int | None = None
    best_validation_loss: Number = None
    num_samples: int | None = None
    learning_rate: dict[str, float] | float | None = None
    parameters: int | None = None
    warm_start: str | None = None
    from_sweep: bool | None = None


@dataclass(frozen=True)
class Comparison:
    """compare.json."""

    methods: list[dict[str, Any]]


@dataclass(frozen=True)
class Condition:
    """A condition in evaluation.json."""

    loss: Number
    perplexity: Number
    accuracy: Number


@dataclass(frozen=True)
class Evaluation:
    """evaluation.json."""

    conditions: dict[str, Condition]


@dataclass(frozen=True)
class Outcome:
    """What the fine-tuned model did with a test sample, in samples.jsonl."""

    loss: float
    right: dict[str, bool]


@dataclass(frozen=True)
class Sample:
    """A line of samples.jsonl."""

    id: str
    prompt: str
    target: str
    finetuned: Outcome


@dataclass(frozen=True)
class AdapterConfig:
    """adapter/adapter_config.json, as the report shows it."""

    base_model_name_or_path: str | None = None


SHAPES: dict[Path, type] = {
    files.STATE: State,
    files.DATA: Data,
    files.PLAN: Plan,
    files.PROGRESS: Progress,
    files.EVENTS: Event,
    files.LANES: LaneRecord,
    files.CURVES: CurvePoint,
    files.LANE_BLOCK: LaneBlock,
    files.LAWS: Laws,
    files.SELECTION: Selection,
    files.SWEEP: Sweep,
    files.FINAL_RUN: Kept,
    files.METRICS: Metric,
    files.SUMMARY: Summary,
    files.COMPARISON: Comparison,
    files.EVALUATION: Evaluation,
    files.SAMPLES: Sample,
    files.ADAPTER_CONFIG: AdapterConfig,
}
"""File, relative to the run directory -> the shape of the document, or of each of its lines."""
