"""FLOPs of our compiled training step over the fewest that the step can take.

The fewest are a closed form (`mars_jax.models.flops`): matrix products only, no gradient for frozen weights, logits at
supervised positions only, nothing computed twice. XLA's own count of the compiled program shows whether the code does
more. The step is compiled from shapes alone, at the size of LLaVA-OneVision 0.5B (the figure) and of the demo; nothing
is run or timed. The same step in transformers and PEFT is counted by torch.

    python -m benchmarks.speed.xla_flops [--short] [--out FOLDER]

`--short` counts the demo only.

Definitions. XLA counts the body of a loop over layers once, so models of one and two layers, which are unrolled, are
extrapolated to the real depth. Matrix products alone are also counted in the program of the real depth, with its loops
times their trips.

figure = FLOPs of the step by XLA's count / the closed form's.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from benchmarks.lib.child import arguments, publish
from mars_jax.adapters.targets import Targets, find_targets
from mars_jax.adapters.tree import init_adapters, join_trainable, split_trainable
from mars_jax.config.adapted import DEFAULT_MODULES
from mars_jax.hub.adapter import write_adapter
from mars_jax.hub.read import read_config
from mars_jax.lanes.step import mean_loss
from mars_jax.models.configs import TextConfig, VisionConfig
from mars_jax.models.families.llava.anyres import Geometry, image_tokens
from mars_jax.models.families.llava.config import LlavaOnevisionConfig
from mars_jax.models.families.registry import build_model, parameters
from mars_jax.models.flops import BatchShape, lane_step_flops
from mars_jax.runtime.trees import unflatten

DEMO_BASE = Path(__file__).parents[2] / "demo" / "base"

Counts = dict[str, dict[str, float]]
"""Kind of step -> what is counted (`xla`, `products`) -> FLOPs."""

# llava-hf/llava-onevision-qwen2-0.5b-ov-hf.
LLAVA_05B = LlavaOnevisionConfig(
    vision=VisionConfig(1152, 4304, num_layers=26, num_heads=16, image_size=384, patch_size=14),
    text=TextConfig(
        151_936,
        896,
        4864,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        rope_theta=1e6,
        tie_word_embeddings=True,
    ),
    image_token_id=151_646,
    vision_feature_layers=(26,),
    image_grid_pinpoints=((384, 384),),
)


def default_patterns() -> dict[str, Any]:
    """The linears that are adapted when a config doesn't say."""
    return {name: module["targets"] for name, module in DEFAULT_MODULES.items()}


@dataclass(frozen=True)
class Case:
    """A lane-step: architecture, ranks, and the shapes of its batch (B samples, T tokens, N tiles, S supervised)."""

    config: LlavaOnevisionConfig
    ranks: Mapping[str, int]
    batch_size: int
    tokens: int
    tiles: int
    supervised: int
    cached_encoder: bool = False
    patterns: Mapping[str, Any] = field(default_factory=default_patterns)

    @property
    def base(self) -> Any:
        """Abstract parameters, float32."""
        return unflatten({p.path: jax.ShapeDtypeStruct(p.shape, jnp.float32) for p in parameters(self.config)})

    @property
    def targets(self) -> Targets:
        """The linears that take adapters."""
        return find_targets(self.base, self.patterns)

    @property
    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """An abstract batch."""
        size, length, vision = self.batch_size, self.tokens, self.config.vision
        pixels = (size, self.tiles, 3, vision.image_size, vision.image_size)
        features = (size, self.tiles, vision.num_patches, vision.hidden_size)
        supervised = (size, self.supervised)
        shapes = {
            "tokens": ((size, length), jnp.int32),
            "features" if self.cached_encoder else "pixels": (features if self.cached_encoder else pixels, jnp.float32),
            "image_index": ((size, length, 1), jnp.int32),
            "image_weight": ((size, length, 1), jnp.float32),
            "targets": (supervised, jnp.int32),
            "target_positions": (supervised, jnp.int32),
            "target_weights": (supervised, jnp.float32),
        }
        return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}

    def minimum(self) -> dict[str, float]:
        """The closed form by part, and their total."""
        shape = BatchShape(self.batch_size, self.tokens, self.tiles, self.supervised)
        flops = lane_step_flops(self.config, self.targets, self.ranks, shape, cached_encoder=self.cached_encoder)
        return {**dataclasses.asdict(flops), "total": flops.total}

    def with_depth(self, vision: int, llm: int) -> "Case":
        """The same with other numbers of layers."""
        config = dataclasses.replace(
            self.config,
            vision=dataclasses.replace(self.config.vision, num_layers=vision),
            text=dataclasses.replace(self.config.text, num_layers=llm),
            vision_feature_layers=(vision,),
        )
        return dataclasses.replace(self, config=config)


def large() -> Case:
    """LLaVA-OneVision-0.5B, one picture of one tile, and an answer of 64 tokens."""
    ranks = {"vision": 16, "projector": 16, "llm": 16}
    return Case(LLAVA_05B, ranks, batch_size=1, tokens=1024, tiles=1, supervised=64)


def demo() -> Case:
    """The demo's base and data at its largest ranks (configs/demo.yaml)."""
    ranks = {"vision": 32, "projector": 8, "llm": 32}
    config = read_config(DEMO_BASE)
    assert isinstance(config, LlavaOnevisionConfig)
    return Case(config, ranks, batch_size=16, tokens=43, tiles=2, supervised=2)


def compile_step(
    case: Case, transform: optax.GradientTransformation | None = None, lanes: int | None = None, **options: Any
) -> jax.stages.Compiled:
    """Compiles loss and gradients, abstractly: nothing is allocated.

    Args:
        case: the lane-step.
        transform: adds the update of the adapters by this optimizer.
        lanes: K lanes in one vmapped program, each with its own batch; None for one lane without vmap.
        options: options of the compiler.
    """
    model, base = build_model(case.config), case.base

    def loss(trainable: Any, scales: Any, base: Any, batch: Any) -> Array:
        return mean_loss(model, base, join_trainable(trainable, scales), batch)

    def step(trainable: Any, state: Any, scales: Any, base: Any, batch: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(trainable, scales, base, batch)
        if transform is None:
            return value, gradients
        updates, state = transform.update(gradients, state, trainable)
        return value, optax.apply_updates(trainable, updates), state

    adapters = jax.eval_shape(lambda: init_adapters(jax.random.key(0), case.targets, case.ranks))
    trainable, scales = split_trainable(adapters)
    state = jax.eval_shape(transform.init, trainable) if transform else None
    own: tuple[Any, ...] = (trainable, state, scales, case.batch)
    if lanes:
        step = jax.vmap(step, in_axes=(0, 0, 0, None, 0))
        own = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((lanes, *leaf.shape), leaf.dtype), own)
    return jax.jit(step).lower(*own[:3], base, own[3]).compile(options)


def count(compiled: jax.stages.Compiled) -> dict[str, float]:
    """FLOPs of a program without loops: XLA's own count, elementwise work included, and that of products alone."""
    program = compiled.as_text() or ""
    if " while(" in program:
        raise ValueError("XLA counts the body of a loop once: count a program whose layers are unrolled")
    analysis = compiled.cost_analysis() or {}
    return {"xla": analysis["flops"], "products": product_flops(program)}


def product_flops(program: str) -> float:
    """FLOPs of the matrix products of an optimized HLO text, 2 m n k each, loops times their trips."""
    computations: dict[str, list[str]] = {}
    shapes: dict[str, list[int]] = {}
    entry = ""
    for line in program.splitlines():
        if start := re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line):
            body = computations.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        elif result := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = \w+\[([\d,]*)\]", line):
            shapes[result[1]] = [int(size) for size in result[2].split(",") if size]
            body.append(line)
        elif line.startswith(" "):  # results that are tuples
            body.append(line)

    @cache
    def flops(computation: str) -> float:
        total = 0.0
        for line in computations[computation]:
            if product := re.search(r"%([\w.\-]+) = \S+ (?:dot|convolution)\(%([\w.\-]+), ", line):
                contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line)
                if contracted is None:
                    raise ValueError(f"can't count the product {line.strip()}")
                inner = prod(shapes[product[2]][int(axis)] for axis in contracted[1].split(",") if axis)
                total += 2.0 * prod(shapes[product[1]]) * inner
            if " conditional(" in line:
                raise ValueError(f"which branch runs isn't in the program: {line.strip()}")
            if " while(" in line:
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                if trips is None:
                    raise ValueError(f"a loop without a known number of trips: {line.strip()}")
                total += int(trips[1]) * flops(re.search(r"body=%([\w.\-]+)", line)[1])  # type: ignore[index]
            else:
                total += sum(map(flops, re.findall(r"(?:calls|to_apply)=%([\w.\-]+)", line)))
        return total

    return flops(entry)


def extrapolate(case: Case) -> dict[str, float]:
    """Counts at the real depth from models of one and two layers: a + b L for each of the two transformers."""
    one, more_vision, more_llm = (count(compile_step(case.with_depth(*depth))) for depth in ((1, 1), (2, 1), (1, 2)))
    vision, llm = case.config.num_vision_layers_used - 1, case.config.text.num_layers - 1
    return {
        name: one[name] + vision * (more_vision[name] - one[name]) + llm * (more_llm[name] - one[name]) for name in one
    }


def peft_flops(case: Case, checkpoint: Path) -> float:
    """Products of the same step in transformers and PEFT by torch's count, with logits at every position, as is usual.

    Args:
        case: the lane-step; its samples hold one picture of one tile's size.
        checkpoint: a folder with the weights of `case.config`.
    """
    import peft
    import torch
    import transformers
    from torch.utils.flop_counter import FlopCounterMode

    # Eager, because torch doesn't count the products inside its fused attention on the CPU.
    model = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    adapters = init_adapters(jax.random.key(0), case.targets, case.ranks)
    with TemporaryDirectory() as folder:
        write_adapter(folder, adapters, case.ranks, case.config, base_name=str(checkpoint), provenance={})
        adapted = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
    side, image_token = case.config.vision.image_size, case.config.image_token_id
    places = len(image_tokens(side, side, Geometry.from_config(case.config)).index)
    tokens = torch.full((case.batch_size, case.tokens), image_token + 2)
    tokens[:, :places] = image_token
    labels = torch.full_like(tokens, -100)
    labels[:, -case.supervised :] = image_token + 2
    with FlopCounterMode(display=False) as counter:
        adapted(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            pixel_values=torch.zeros(case.batch_size, case.tiles, 3, side, side),
            image_sizes=torch.full((case.batch_size, 2), side),
            labels=labels,
        ).loss.backward()
    return float(counter.get_total_flops())


def main() -> None:
    """Writes results/xla_flops.json; about two minutes of compiling."""
    options = arguments(__doc__)
    detail = {} if options.short else {"llava_onevision_05b": compared(large(), large_counts())}
    detail["demo"] = compared(demo(), demo_counts())
    figure = next(iter(detail.values()))["over_minimum"]["step"]["xla"]
    publish(options, "xla_flops", figure, "XLA FLOPs of a lane-step / closed-form minimum", "at most 1.05", detail)


def large_counts() -> Counts:
    """Of our step at the size of LLaVA-OneVision-0.5B."""
    return {
        "step": extrapolate(large()),
        "step, program of the real depth": {"products": product_flops(compile_step(large()).as_text() or "")},
    }


def demo_counts() -> Counts:
    """Of our step at the demo's size, with the optimizer, in lanes, and of PEFT's."""
    case = demo()
    adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    lanes = count(compile_step(case, adamw, lanes=4))
    return {
        "step": count(compile_step(case)),
        "step with AdamW": count(compile_step(case, adamw)),
        "step with AdamW, each of 4 vmapped lanes": {name: flops / 4 for name, flops in lanes.items()},
        "step in PEFT and torch": {"products": peft_flops(case, DEMO_BASE)},
    }


def compared(case: Case, counts: Counts) -> dict[str, Any]:
    """A case's shapes, its minimum, its counts and their ratios to the minimum."""
    minimum = case.minimum()
    return {
        "shapes": {key: getattr(case, key) for key in ("ranks", "batch_size", "tokens", "tiles", "supervised")},
        "minimum_flops": minimum,
        "flops": counts,
        "over_minimum": {
            row: {what: flops / minimum["total"] for what, flops in numbers.items()} for row, numbers in counts.items()
        },
    }


if __name__ == "__main__":
    main()
