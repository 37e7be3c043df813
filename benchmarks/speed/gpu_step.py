"""Time of one training step on a GPU at a real model's size: PEFT's over ours.

Both sides train adapters on all modules of a model of LLaVA-OneVision 0.5B's shapes: same random weights, batch, drawn
adapters and optimizer, in bfloat16. PEFT takes a step at a time, as it is or with `torch.compile`; ours is the program
of the probe phase with several lanes. `flash` is cuDNN's attention, `block` the lanes in one vectorised step, `remat`
the activations that are computed twice to save memory, `unroll` the layers in one turn of the loop over them. TFLOP/s
are the fewest FLOPs of a step over its time.

    python -m benchmarks.speed.gpu_step [--short] [--out FOLDER]

`--short` takes two layers of each part. A GPU that JAX and torch can use is needed.

Definitions. A checkpoint is written with random bfloat16 weights and the demo's tokenizer. Each variant reads it in a
fresh process and trains adapters of rank 16 on one batch of four of the demo's pictures, two tiles of 384 pixels each:
about 1,500 tokens a sample. Adapters are in float32. The losses of the first steps are recorded, which shows that both
sides train the same.

PEFT is transformers and torch with "sdpa" attention, autocast, fused AdamW and logits at all positions; "checkpointed"
computes layers again in the backward pass, as users do where memory is short. Ours is the probe engine's chunk with 4
lanes; "plain" attention is products of our own.

A round is 5 steps of the lane (PEFT) or of every lane (ours). The first round compiles and is recorded apart. Nothing
waits for the GPU within a round. The ceiling is a product of two 8192 x 8192 matrices. The result is written after
every variant.

figure = milliseconds of a PEFT step, as it is or compiled / of our lane-step, the fastest of each.
"""

import json
import math
import shutil
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from benchmarks.lib.child import DEMO, Document, answer, arguments, demo_config, publish, run_child
from benchmarks.memory.real_checkpoint import CONFIG, write_random

if TYPE_CHECKING:
    from mars_jax.job.job import Job

RANKS = {"vision": 16, "projector": 16, "llm": 16}
LANES, STEPS, ROUNDS = 4, 5, 4
BATCH_SIZE = 4
UNIT = f"ms of a PEFT step / ms of our lane-step, one GPU, batch {BATCH_SIZE}"
GOAL = "above 1"
VARIANTS: tuple[Document, ...] = (
    {"side": "ours", "variant": "flash", "block": 1, "remat": "attention", "unroll": 4},
    {"side": "peft", "variant": "as it is"},
    {"side": "peft", "variant": "compiled"},
    {"side": "ours", "variant": "flash", "block": 2, "remat": "attention", "unroll": 4},
    {"side": "ours", "variant": "flash", "block": 1, "remat": "none", "unroll": 4},
    {"side": "ours", "variant": "flash", "block": 1, "remat": "none", "unroll": 1},
    {"side": "ours", "variant": "plain", "block": 1, "remat": "attention", "unroll": 4},
    {"side": "peft", "variant": "checkpointed"},
)


def main() -> None:
    """Writes results/gpu_step.json; about twenty minutes, most of it compiling, and 2 GB of disk."""
    options = arguments(__doc__)
    if options.child:
        return answer(options.child, measure)
    rows: list[Document] = []
    with TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), short=options.short)
        device = run_child(__file__, {"side": "ceiling"}, JAX_PLATFORMS="cuda")
        for variant in VARIANTS:
            platform = {"JAX_PLATFORMS": "cuda" if variant["side"] == "ours" else "cpu"}
            try:
                found = run_child(__file__, {"checkpoint": folder, **variant}, **platform)
            except RuntimeError as error:  # out of memory, for one; its message is on stderr
                found = {"failed": str(error)}
            rows.append({**variant, **found})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            if math.isfinite(ratio := figure(rows)):
                publish(options, "gpu_step", ratio, UNIT, GOAL, device | detail_of(rows))


def figure(rows: list[Document]) -> float:
    """PEFT's time over ours, the fastest of each; NaN while one is missing."""
    best = {
        side: min((row["ms"] for row in rows if row["side"] == side and "ms" in row), default=float("nan"))
        for side in ("peft", "ours")
    }
    return best["peft"] / best["ours"]


def detail_of(rows: list[Document]) -> Document:
    """The detail of the result."""
    columns = ("side", "variant", "block", "remat", "unroll", "ms", "TFLOP/s", "peak GiB", "first round, s", "failed")
    shown = [{name: row[name] for name in columns if name in row} for row in rows]
    losses = [
        {"side": row["side"], "variant": row["variant"]}
        | {f"step {step}": f"{loss:.5f}" for step, loss in enumerate(row["losses"][:STEPS])}
        for row in rows
        if "losses" in row
    ]
    return {
        "ranks": RANKS,
        "lanes": LANES,
        "rows": rows,
        "tables": {"A lane-step": shown, "Losses": losses},
    }


def write_checkpoint(folder: Path, *, short: bool) -> None:
    """Random weights at that size, with the demo's tokenizer and its way to make pictures."""
    demo = DEMO.parents[1] / "demo" / "base"
    config, known = json.loads(json.dumps(CONFIG)), json.loads((demo / "config.json").read_text())
    config["image_token_index"] = known["image_token_index"]
    config["text_config"] |= {name: known["text_config"][name] for name in ("eos_token_id", "pad_token_id")}
    if short:
        config["text_config"]["num_hidden_layers"] = config["vision_config"]["num_hidden_layers"] = 2
    write_random(folder, config)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo / name, folder)
    pictures = json.loads((demo / "preprocessor_config.json").read_text())
    side = config["vision_config"]["image_size"]
    pictures |= {"size": {"height": side, "width": side}, "image_grid_pinpoints": config["image_grid_pinpoints"]}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))


def measure(side: str, **spec: Any) -> Document:
    """What one fresh process found."""
    if side == "ceiling":
        return ceiling()
    return (ours if side == "ours" else peft)(**spec)


def ceiling() -> Document:
    """The device, and what a large product reaches there."""
    import jax
    import jax.numpy as jnp

    size, count = 8192, 20
    keys = jax.random.split(jax.random.key(0))
    left, right = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    product = jax.jit(jnp.matmul)
    product(left, right).block_until_ready()
    start = time.perf_counter()
    for _ in range(count):
        found = product(left, right)
    found.block_until_ready()
    seconds = (time.perf_counter() - start) / count
    return {"device": jax.devices()[0].device_kind, "TFLOP/s of a large product": 2 * size**3 / seconds / 1e12}


def job_of(checkpoint: str, remat: str = "none") -> "Job":
    """The demo's data on the checkpoint, in bfloat16; lanes neither stop early nor are averaged."""
    from benchmarks.lib.demo_job import AS_PEFT
    from mars_jax.job.job import make_job
    from mars_jax.runtime.progress import ConsoleReporter

    settings = [
        *AS_PEFT,
        f"model.checkpoint={checkpoint}",
        "model.dtype=bfloat16",
        f"model.remat={remat}",
        f"probe.batch_size={BATCH_SIZE}",
        "probe.sampling=separate",
        "probe.num_samples=[64]",
        f"probe.lanes_per_program={LANES}",
    ]
    return make_job(demo_config("nowhere", settings), ConsoleReporter())


def row_of(job: "Job", milliseconds: list[float], losses: list[float], first: float, peak: int) -> Document:
    """A row of the table, from the times of rounds."""
    median = statistics.median(milliseconds)
    return {
        "ms": median,
        "ms, all rounds": milliseconds,
        "TFLOP/s": job.prices.step(RANKS) / median / 1e9,
        "tokens a sample": job.data.shapes.max_tokens,
        "first round, s": first,
        "peak GiB": peak / 2**30,
        "losses": losses,
    }


def ours(checkpoint: str, variant: str, block: int, remat: str, unroll: int) -> Document:
    """Steps of `LANES` lanes that are copies of one."""
    from mars_jax.models import attention, layers

    layers.SCAN_UNROLL = unroll  # before the models that read it

    import jax
    import numpy as np

    from benchmarks.lib.demo_job import FixedBatch
    from mars_jax.lanes.engine import EngineShape
    from mars_jax.lanes.lane import Lane

    if variant == "plain":
        attention.has_flash = lambda *_: False
    job = job_of(checkpoint, remat)
    lane = Lane(RANKS, 64, seed=0)
    fixed = FixedBatch(job, job.data.probe_stream(lane, cached_encoder=False)[0], STEPS)
    engine = job.engines.engine(EngineShape(RANKS, LANES, block))
    state = fixed.fresh(engine, [lane])
    start = time.perf_counter()
    state, losses = fixed.train(engine, state, LANES)
    first, milliseconds = time.perf_counter() - start, []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        state, _ = fixed.train(engine, state, LANES)
        milliseconds.append(1e3 * (time.perf_counter() - start) / STEPS / LANES)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    return row_of(job, milliseconds, np.asarray(losses)[0].tolist(), first, peak)


def peft(checkpoint: str, variant: str) -> Document:
    """Steps of one PEFT adapter."""
    import torch

    from benchmarks.lib.demo_job import peft_grid
    from mars_jax.lanes.lane import Lane

    job = job_of(checkpoint)
    grid = peft_grid(job, "all", device="cuda", dtype=torch.bfloat16)
    batch = grid.encode(job.data.probe_stream(Lane(RANKS, 64, seed=0), cached_encoder=False)[0])
    with grid.drawn(RANKS, 0) as directory, grid.adapted(directory) as parameters:
        if variant == "compiled":
            grid.model.compile()
        if variant == "checkpointed":
            grid.model.train()  # it recomputes nothing otherwise; there is no dropout
            grid.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = grid.make_optimizer(parameters, job.config.learning_rates())

        def seconds() -> tuple[float, list[torch.Tensor]]:
            start = time.perf_counter()
            losses = [grid.step(batch, optimizer, 1.0) for _ in range(STEPS)]
            torch.cuda.synchronize()
            return time.perf_counter() - start, losses

        first, losses = seconds()
        milliseconds = [1e3 * seconds()[0] / STEPS for _ in range(ROUNDS)]
    listed = [loss.item() for loss in losses]
    return row_of(job, milliseconds, listed, first, torch.cuda.max_memory_allocated())


if __name__ == "__main__":
    main()
