"""Settings of a run: names, types, defaults and descriptions. `mars_jax.config.load` reads them from a file.

Nothing here reads data, a model or a device: a setting that can only be checked against those (a target that matches no
linear, more samples than there are) is refused by the phase that needs it.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from mars_jax.config.adapted import AdapterConfig, LoraConfig
from mars_jax.config.fields import (
    MAX_LISTED,
    Count,
    Devices,
    Few,
    Flag,
    InputPath,
    Lanes,
    Positive,
    PositiveOrZero,
    RunPath,
    Section,
    Seed,
    Share,
    Size,
    Steps,
    StepsOrZero,
    member_name,
)
from mars_jax.config.planned import check_eval_points, check_lanes
from mars_jax.laws.convergence.registry import RULES

# Step of a lane's first eval point after step 0, in `mars_jax.lanes.schedule`.
_FIRST_EVAL_STEP = 4
# Default steps of a probe that repeats its data.
_STEPS = 500


class ModelConfig(Section):
    """The frozen base model."""

    checkpoint: InputPath = Field(description="folder of a Hugging Face checkpoint, or hf://OWNER/NAME")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="dtype of base and activations")
    remat: Literal["auto", "none", "attention", "full"] = Field(
        default="auto", description="what layers keep for the backward pass; auto: all if it fits, else attention"
    )


class DataConfig(Section):
    """The samples and how they are split."""

    train: InputPath = Field(description="file or folder of training samples, or hf://datasets/OWNER/NAME")
    validation: InputPath | None = Field(default=None, description="file of validation samples; null: split off train")
    test: InputPath | None = Field(default=None, description="file of test samples; null: split off train")
    image_root: InputPath | None = Field(default=None, description="folder of the images; null: that of the data file")
    validation_fraction: Share = Field(default=0.1, description="share split off when validation is null")
    test_fraction: Share = Field(default=0.1, description="share split off when test is null")
    learn: Literal["all", "last"] = Field(
        default="all",
        description="answers of a conversation that are trained on: all but those its row excludes, or the last",
    )
    max_tokens: Count | None = Field(default=None, description="longer samples are dropped and listed; null: none")
    max_pixels: Count | None = Field(
        default=None,
        description="larger pictures are scaled down (Qwen2.5-VL); null: the limit in the processor's file",
    )
    packing: Flag = Field(
        default=False, description="training samples of different lengths share rows, so that less padding is computed"
    )

    @model_validator(mode="after")
    def _check_split(self) -> "DataConfig":
        held_out = self.validation_fraction * (self.validation is None) + self.test_fraction * (self.test is None)
        if held_out >= 1:
            raise ValueError(
                f"validation_fraction + test_fraction must be less than 1 to leave training samples; seen {held_out:g}"
            )
        if self.validation is None and self.validation_fraction == 0:
            raise ValueError("validation_fraction is 0 and validation is null; ranks are chosen on validation samples")
        return self


class OptimizerConfig(Section):
    """AdamW, used by the probes and the final run."""

    learning_rate: Positive | dict[str, Positive] = Field(default=1e-3, description="one number, or one a module")
    weight_decay: PositiveOrZero = Field(default=0.0, description="decoupled weight decay")
    b1: Share = Field(default=0.9, description="decay of the gradient's mean")
    b2: Share = Field(default=0.999, description="decay of the squared gradient's mean")
    eps: Positive = Field(default=1e-8, description="added to the root of the squared gradient's mean")
    clip_norm: Positive = Field(default=1.0, description="largest global norm of a gradient")
    warmup_steps: StepsOrZero = Field(default=10, description="steps of linear warm-up of a probe; constant after")


class ProbeConfig(Section):
    """The short training runs that the laws are fitted to."""

    num_samples: tuple[Count, ...] = Field(
        default=(512, 1024, 2048),
        min_length=1,
        max_length=MAX_LISTED,
        description="numbers of training samples D to try, rising",
    )
    seeds: Few = Field(default=1, description="runs of each (ranks, D), with seeds 0, 1, ...")
    steps: Steps | None = Field(
        default=None, description="optimizer steps of a lane, its horizon, with sampling: separate; null: 500"
    )
    batch_size: Size = Field(default=16, description="samples a step of one lane")
    looks_per_doubling: Few = Field(default=4, description="eval points each time the step doubles (log-spaced)")
    validation_samples: Count = Field(default=128, description="validation samples of an eval point")
    averaging: PositiveOrZero | None = Field(
        default=2.0,
        description="eval points use the mean of the adapters over the steps t so far, weighted by t^averaging, so "
        "that the noise of a constant learning rate hides no convergence; null: they use the newest adapters",
    )
    sampling: Literal["separate", "nested"] = Field(
        default="nested",
        description="one pass over the largest D whose prefixes are the lanes of each D, or a run for each D",
    )
    patience: Annotated[float, Field(strict=True, gt=1)] | None = Field(
        default=2.0,
        description="a lane stops early at this multiple of its best step without a better eval point; null: never",
    )
    chunk_steps: Few = Field(default=8, description="most steps whose batches are in memory at once")
    lanes_per_program: Lanes = Field(default=16, description="lanes in memory at once, on all devices")
    lane_block: Few | Literal["auto"] = Field(
        default="auto", description="lanes in one vectorised step of a device; auto: measured on runs that are long"
    )
    corners: Flag = Field(default=True, description="also run the corners of the rank grid, all modules adapted")

    @model_validator(mode="after")
    def _check_steps(self) -> "ProbeConfig":
        if list(self.num_samples) != sorted(set(self.num_samples)):
            raise ValueError(f"num_samples must rise without repeats; seen {list(self.num_samples)}")
        if self.sampling == "nested":
            if self.steps is not None:
                raise ValueError(
                    f"steps ({self.steps}) is for sampling: separate; with nested a lane takes the largest of "
                    f"num_samples / batch_size, {self.horizon}. Set sampling: separate, or leave steps out"
                )
            largest = self.num_samples[-1]
            for size in self.num_samples:
                if size % self.batch_size or largest % size or (largest // size).bit_count() != 1:
                    raise ValueError(
                        f"sampling: nested takes each of num_samples from one pass over {largest} samples, so "
                        f"each must be {largest} halved any number of times, and a multiple of batch_size "
                        f"{self.batch_size}; seen {size}"
                    )
            if self.num_samples[0] < _FIRST_EVAL_STEP * self.batch_size:
                raise ValueError(
                    f"sampling: nested needs at least {_FIRST_EVAL_STEP} batches of {self.batch_size} samples in each "
                    f"of num_samples, for the first eval point; seen {self.num_samples[0]}"
                )
        return self

    @property
    def horizon(self) -> int:
        """Steps of the longest lane."""
        return self.num_samples[-1] // self.batch_size if self.sampling == "nested" else self.steps or _STEPS


class ConvergenceConfig(Section):
    """The convergence rule of modules. `loss_fraction` also needs lanes that adapt one module only."""

    rule: str | None = Field(
        default="loss_fraction",
        description="loss_fraction, splice (module swaps) or drift, for the strategies that run probes; null: "
        "convergence is not measured",
    )
    epsilon: Annotated[float, Field(strict=True, gt=0, lt=1)] | None = Field(
        default=None, description="threshold; null: the rule's default"
    )
    sustain: Few = Field(default=3, description="eval points in a row that must stay below the threshold")

    @field_validator("rule")
    @classmethod
    def _check_rule(cls, rule: str | None) -> str | None:
        return None if rule is None else member_name(RULES, rule)


class LawsConfig(Section):
    """The fits of the two laws."""

    bootstraps: Annotated[int, Field(strict=True, ge=20, le=100_000)] = Field(
        default=200, description="bootstrap fits behind the intervals"
    )
    huber: Annotated[float, Field(strict=True, gt=0)] | None = Field(
        default=None,
        description="relative error beyond which Law-P's Huber loss is linear, such as 0.02; null: squares",
    )


class SelectionConfig(Section):
    """The strategy that picks the ranks."""

    method: str = Field(
        default="laws+race",
        description="the strategy: laws+race (final runs, raced; their Law-P proposes more), race, best_probes (final "
        "runs of the best probes, halved in rungs), laws, paper, halving, random, restarts, uniform, separate_rates, "
        "tpe, gp or hyperband",
    )
    target_num_samples: Count | None = Field(default=None, description="D to pick for; null: all training samples")
    sweep: Few | None = Field(
        default=None,
        description="final runs that the strategy starts, of which it keeps the last or best; null: its default, 5 for "
        "laws+race before its law proposes",
    )


class FinetuneConfig(Section):
    """The final run, with the picked ranks on all the data."""

    steps: Steps = Field(default=1000, description="optimizer steps")
    batch_size: Size = Field(default=16, description="samples a step")
    learning_rate: Positive | None = Field(
        default=None, description="learning rate; null: that of the optimizer section"
    )
    warmup_steps: StepsOrZero = Field(default=30, description="steps of linear warm-up")
    schedule: Literal["cosine", "constant", "linear"] = Field(default="cosine", description="shape after the warm-up")
    look_every: Steps = Field(default=50, description="steps between two eval points")
    validation_samples: Count = Field(default=256, description="validation samples of an eval point")
    averaging: PositiveOrZero | None = Field(
        default=8.0,
        description="eval points, and so the result, use the mean of the adapters over the steps t so far, weighted by "
        "t^averaging: of about the last ninth of the steps at 8; null: they use the newest adapters",
    )
    warm_start: Flag = Field(
        default=False,
        description="start from the adapters of the probe with the picked ranks and the largest D, if there is one",
    )

    @property
    def eval_steps(self) -> list[int]:
        """Steps of the eval points of a final run."""
        return sorted({*range(0, self.steps, self.look_every), self.steps})

    @model_validator(mode="after")
    def _check_steps(self) -> "FinetuneConfig":
        for name in ("look_every", "warmup_steps"):
            if getattr(self, name) > self.steps:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at most steps ({self.steps})")
        check_eval_points(self.steps, self.look_every)
        return self


class EvaluateConfig(Section):
    """The measurements on the test samples."""

    batch_size: Size = Field(default=16, description="samples a step")
    max_samples: Count | None = Field(default=None, description="test samples to use; null: all")
    max_candidates: Size = Field(default=64, description="most candidate answers of a question")
    max_new_tokens: Size | None = Field(
        default=None, description="tokens of a generated answer, which is read by rules; null: none"
    )
    controls: Flag = Field(default=True, description="also measure without images and with shuffled images")


class CompareConfig(Section):
    """What `mars compare` trains beside the pick, uniform ranks, separate learning rates and random ranks."""

    strategies: tuple[str, ...] = Field(
        default=(),
        description="strategies that search the same space, by their default budgets, such as [race, restarts]",
    )


class MeshConfig(Section):
    """Devices along each axis; -1 for all that remain."""

    lane: Devices = Field(default=-1, description="lanes are split over these")
    data: Devices = Field(default=1, description="samples are split over these")
    fsdp: Devices = Field(default=1, description="samples and base are split over these")
    tensor: Devices = Field(default=1, description="each matrix product is split over these")


class ExportConfig(Section):
    """Files for other tools besides the PEFT adapter."""

    merged: Flag = Field(default=False, description="also write the whole checkpoint with the adapters added")


class Config(Section):
    """All settings of a run. Only `run_dir`, `model.checkpoint` and `data.train` have no default."""

    run_dir: RunPath = Field(description="folder that the run writes to, from the current directory")
    seed: Seed = Field(default=0, description="the seed that every random choice follows from")
    model: ModelConfig
    data: DataConfig
    adapter: AdapterConfig = AdapterConfig()
    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    probe: ProbeConfig = ProbeConfig()
    convergence: ConvergenceConfig = ConvergenceConfig()
    laws: LawsConfig = LawsConfig()
    selection: SelectionConfig = SelectionConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    compare: CompareConfig = CompareConfig()
    export: ExportConfig = ExportConfig()
    mesh: MeshConfig = MeshConfig()

    @model_validator(mode="after")
    def _check_across_sections(self) -> "Config":
        rates = self.optimizer.learning_rate
        if isinstance(rates, dict) and set(rates) != set(self.lora.modules):
            raise ValueError(
                "optimizer.learning_rate must be one number, or name each module of lora.modules "
                f"({', '.join(self.lora.modules)}); seen {', '.join(rates) or 'no module'}"
            )
        if self.optimizer.warmup_steps > self.probe.horizon:
            raise ValueError(
                f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) must be at most the {self.probe.horizon} "
                "steps of a probe"
            )
        rule = self.convergence.rule
        check_lanes(
            self.lora.grids,
            self.lora.factors,
            corners=self.probe.corners,
            single_module=rule is not None and RULES[rule].needs_single_module,
            sizes=1 if self.probe.sampling == "nested" else len(self.probe.num_samples),
            seeds=self.probe.seeds,
        )
        return self

    def learning_rates(self, override: float | None = None) -> dict[str, float]:
        """Module -> learning rate, with the module's factor where it has a single one.

        Args:
            override: one rate for all modules; None: those of the optimizer section.
        """
        rate = override or self.optimizer.learning_rate
        rates = rate if isinstance(rate, Mapping) else dict.fromkeys(self.lora.modules, rate)
        factors = {name: module.rates[0] for name, module in self.lora.modules.items() if len(module.rates) == 1}
        return {name: rates[name] * factors.get(name, 1.0) for name in rates}

    def resolved_yaml(self) -> str:
        """All settings as YAML, with defaults and absolute paths; `load_config` reads back an equal config."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
