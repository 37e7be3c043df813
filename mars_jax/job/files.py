"""Names of the files of a run directory, relative to it. Folders are made by whoever writes into them first."""

from pathlib import Path

SOURCES = Path("sources.json")  # content of every file that the run is made from: data, pictures, base
DATA = Path("data.json")  # counts of samples, and those dropped, by name
PLAN = Path("plan.json")  # the lanes to run and what they cost
PROGRESS = Path("progress.json")  # state of the running phase: lanes done, running and queued, steps, loss, memory

LANES = Path("probes/lanes.jsonl")  # a record for each finished lane
CURVES = Path("probes/curves.jsonl")  # a record for each lane and eval point
LANE_BLOCK = Path("probes/lane_block.json")  # how many lanes run in one step, where that was measured
PROBE_ADAPTERS = Path("probes/adapters")  # the best adapters of each probe, where final runs may start from them
PROBE_CHECKPOINTS = Path("probes/checkpoints")  # state of the probes in progress

LAWS = Path("laws.json")  # both fitted laws
SELECTION = Path("selection.json")  # the pick and all candidates

SWEEP = Path("sweep/runs.json")  # the curves of the final runs that a strategy began
SWEEP_CHECKPOINTS = Path("sweep/checkpoints")  # their state
FINAL_RUN = Path("sweep/final.json")  # the final run that the strategy leaves, if it trained one
FINAL_ADAPTERS = Path("sweep/final.safetensors")  # its adapters at the best validation loss

METRICS = Path("finetune/metrics.jsonl")  # a record for each eval point of the final run
ADAPTERS = Path("finetune/adapters.safetensors")  # its adapters at the best validation loss
SUMMARY = Path("finetune/summary.json")  # what it came to
FINETUNE_CHECKPOINTS = Path("finetune/checkpoints")  # its state

TRIALS = Path("compare/trials.jsonl")  # a record for each final run of the comparison
COMPARISON_CHECKPOINTS = Path("compare/checkpoints")  # state of those in progress
COMPARISON = Path("compare.json")  # the pick beside its alternatives

EVALUATION = Path("evaluation.json")  # measurements on the test samples
SAMPLES = Path("samples.jsonl")  # a record for each test sample
ADAPTER = Path("adapter")  # the exported PEFT adapter
ADAPTER_CONFIG = Path("adapter/adapter_config.json")  # its settings
MERGED = Path("merged")  # the whole checkpoint with the adapters added
REPORT = Path("report")  # the page, its figures and report.json

STATE = Path("state.json")  # phases, versions and peak memory
EVENTS = Path("events.jsonl")  # what happened, one line an event


EVERY = tuple(value for value in list(globals().values()) if isinstance(value, Path))
"""All of them."""


def probe_adapters(lane: str) -> Path:
    """The best adapters of a probe, kept where the final run may start from them."""
    return PROBE_ADAPTERS / f"{lane}.safetensors"
