"""The settings of a run: names, types, defaults and what each is for. `mars_jax.config.load` reads them from a file.

Nothing is used here, and nothing looks at data, a model or a device: a setting that can only be judged against those
(a target that matches no linear, more samples than there are) is refused by the phase that needs it.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from mars_jax.hub.paths import on_hub

# The linears that LoRA adapts when the config doesn't say: those of every layer, and the projector's.
DEFAULT_MODULES: Mapping[str, Mapping[str, Sequence[str | int]]] = {
    "vision": {
        "targets": ["vision/layers/(self_attn|mlp)/.*"],
        "ranks": [4, 8, 16, 32, 64],
    },
    "projector": {"targets": ["projector/linear_[12]"], "ranks": [16]},
    "llm": {
        "targets": ["llm/layers/self_attn/(q|k|v|o)_proj", "llm/layers/mlp/(gate|up|down)_proj"],
        "ranks": [4, 8, 16, 32, 64],
    },
}


def _from_config_folder(path: Path, info: ValidationInfo) -> Path:
    if on_hub(path):
        return path
    return Path(os.path.abspath((info.context or {}).get("folder", Path()) / path.expanduser()))


def _from_current_folder(path: Path) -> Path:
    return Path(os.path.abspath(path.expanduser()))


# The first step at which `mars_jax.lanes.schedule.look_steps` looks at a lane, after step 0.
_FIRST_LOOK = 4
# Of a probe that repeats its data.
_STEPS = 500

InputPath = Annotated[Path, AfterValidator(_from_config_folder)]
RunPath = Annotated[Path, AfterValidator(_from_current_folder)]
Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, gt=0)]
CountOrZero = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[float, Field(strict=True, gt=0)]
PositiveOrZero = Annotated[float, Field(strict=True, ge=0)]
Share = Annotated[float, Field(strict=True, ge=0, lt=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(_Section):
    """The frozen base."""

    checkpoint: InputPath = Field(description="folder of a Hugging Face checkpoint, or hf://OWNER/NAME")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="dtype of base and activations")
    remat: Literal["auto", "none", "attention", "full"] = Field(
        default="auto", description="what layers keep for the backward pass; auto: all if it fits, else attention"
    )


class DataConfig(_Section):
    """Where the samples are and how they are split."""

    train: InputPath = Field(description="file or folder of training samples, or hf://datasets/OWNER/NAME")
    validation: InputPath | None = Field(default=None, description="file of validation samples; null: split off train")
    test: InputPath | None = Field(default=None, description="file of test samples; null: split off train")
    image_root: InputPath | None = Field(default=None, description="folder of the images; null: that of the data file")
    validation_fraction: Share = Field(default=0.1, description="share split off when validation is null")
    test_fraction: Share = Field(default=0.1, description="share split off when test is null")
    max_tokens: Count | None = Field(default=None, description="longer samples are dropped, by name; null: none")
    max_pixels: Count | None = Field(
        default=None, description="larger pictures are scaled down (Qwen2.5-VL); null: what the processor's file says"
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


class AlphaConfig(_Section):
    """How LoRA's alpha follows from the rank r; it is part of every result."""

    rule: Literal["proportional", "fixed", "rslora"] = Field(
        default="proportional", description="scale: value (proportional), value / r (fixed), value / sqrt(r) (rslora)"
    )
    value: Positive = Field(default=2.0, description="the value in the rule")


class ModuleConfig(_Section):
    """The adapted linears of one module, and the ranks to try."""

    targets: tuple[str, ...] = Field(min_length=1, description="regular expressions over whole parameter paths")
    ranks: tuple[CountOrZero, ...] = Field(
        min_length=1, description="ranks to search, rising; one rank is used as it is, 0 freezes the module"
    )

    @field_validator("targets")
    @classmethod
    def _check_targets(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        for target in targets:
            try:
                re.compile(target)
            except re.error as error:
                raise ValueError(f"{target!r} is not a regular expression: {error}") from None
        return targets

    @field_validator("ranks")
    @classmethod
    def _check_ranks(cls, ranks: tuple[int, ...]) -> tuple[int, ...]:
        if list(ranks) != sorted(set(ranks)):
            raise ValueError(f"ranks must rise without repeats, e.g. {sorted(set(ranks))}; seen {list(ranks)}")
        if len(ranks) > 1 and ranks[0] == 0:
            raise ValueError(f"rank 0 freezes a module, so it can't be searched with others; seen {list(ranks)}")
        return ranks


def _default_modules() -> dict[str, ModuleConfig]:
    return {name: ModuleConfig.model_validate(settings) for name, settings in DEFAULT_MODULES.items()}


class LoraConfig(_Section):
    """Which modules are adapted. A module that isn't listed stays frozen."""

    alpha: AlphaConfig = AlphaConfig()
    modules: dict[str, ModuleConfig] = Field(
        default_factory=_default_modules,
        description="adapted modules by name; vision, projector and llm have default targets and ranks",
    )

    @field_validator("modules", mode="before")
    @classmethod
    def _fill_defaults(cls, modules: Any) -> Any:
        if not isinstance(modules, Mapping):
            return modules
        return {
            name: {**DEFAULT_MODULES.get(name, {}), **settings} if isinstance(settings, Mapping) else settings
            for name, settings in modules.items()
        }

    @field_validator("modules")
    @classmethod
    def _check_adapted(cls, modules: dict[str, ModuleConfig]) -> dict[str, ModuleConfig]:
        if not any(max(module.ranks) > 0 for module in modules.values()):
            raise ValueError("at least one module needs a rank above 0")
        return modules

    @property
    def is_searched(self) -> bool:
        """Whether some module has ranks to choose from."""
        return any(len(module.ranks) > 1 for module in self.modules.values())


class OptimizerConfig(_Section):
    """AdamW, used by the probes and the final run."""

    learning_rate: Positive | dict[str, Positive] = Field(default=1e-3, description="one number, or one a module")
    weight_decay: PositiveOrZero = Field(default=0.0, description="decoupled weight decay")
    b1: Share = Field(default=0.9, description="decay of the gradient's mean")
    b2: Share = Field(default=0.999, description="decay of the squared gradient's mean")
    eps: Positive = Field(default=1e-8, description="added to the root of the squared gradient's mean")
    clip_norm: Positive = Field(default=1.0, description="largest global norm of a gradient")
    warmup_steps: CountOrZero = Field(default=10, description="steps of linear warm-up of a probe; constant after")


class ProbeConfig(_Section):
    """The short runs that the laws are fitted to."""

    num_samples: tuple[Count, ...] = Field(
        default=(512, 1024, 2048), min_length=1, description="numbers of training samples D to try, rising"
    )
    seeds: Count = Field(default=1, description="runs of each (ranks, D), with seeds 0, 1, ...")
    steps: Count | None = Field(
        default=None, description="optimizer steps of a lane, its horizon, with sampling: separate; null: 500"
    )
    batch_size: Count = Field(default=16, description="samples a step of one lane")
    looks_per_doubling: Count = Field(
        default=4, description="looks at the validation loss each time the step doubles (log-spaced)"
    )
    validation_samples: Count = Field(default=128, description="validation samples in a look")
    averaging: PositiveOrZero | None = Field(
        default=2.0,
        description="looks read the mean of the adapters over the steps t so far, weighted by t^averaging: "
        "what a constant learning rate shakes then hides no convergence; null: they read the newest adapters",
    )
    sampling: Literal["separate", "nested"] = Field(
        default="nested", description="one single pass over the largest D that is read at each D, or a run for each D"
    )
    patience: Annotated[float, Field(strict=True, gt=1)] | None = Field(
        default=2.0, description="a lane leaves this many times its best step without a better look; null: never"
    )
    chunk_steps: Count = Field(default=8, description="most steps whose batches are in memory at once")
    lanes_per_program: Count = Field(default=16, description="lanes in memory at once, on all devices")
    lane_block: Count | Literal["auto"] = Field(
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
                        f"sampling: nested reads one pass over {largest} samples at each of num_samples, which must be "
                        f"it halved again and again, and multiples of batch_size {self.batch_size}; seen {size}"
                    )
            if self.num_samples[0] < _FIRST_LOOK * self.batch_size:
                raise ValueError(
                    f"sampling: nested reads every one of num_samples after at least {_FIRST_LOOK} batches of "
                    f"{self.batch_size} samples, for the first look; seen {self.num_samples[0]}"
                )
        return self

    @property
    def horizon(self) -> int:
        """Steps of the longest lane."""
        return self.num_samples[-1] // self.batch_size if self.sampling == "nested" else self.steps or _STEPS


class ConvergenceConfig(_Section):
    """When a module counts as converged. With `loss_fraction`, lanes that adapt one module only are planned too."""

    rule: Literal["loss_fraction", "splice", "drift"] | None = Field(
        default=None,
        description="the signal that is followed; null: none, so the ranks are picked by loss alone, from fewer lanes",
    )
    epsilon: Annotated[float, Field(strict=True, gt=0, lt=1)] | None = Field(
        default=None, description="its threshold; null: the rule's own"
    )
    sustain: Count = Field(default=3, description="looks in a row that must stay below the threshold")


class LawsConfig(_Section):
    """How the two laws are fitted."""

    bootstraps: Annotated[int, Field(strict=True, ge=20)] = Field(
        default=200, description="bootstrap fits behind the intervals"
    )
    huber: Annotated[float, Field(strict=True, gt=0)] | None = Field(
        default=None,
        description="relative error beyond which a loss pulls Law-P no harder (Huber), such as 0.02; null: none",
    )


class SelectionConfig(_Section):
    """How the ranks are picked."""

    method: Literal["laws", "paper"] = Field(default="laws", description="by expected loss, or as in the paper")
    target_num_samples: Count | None = Field(default=None, description="D to pick for; null: all training samples")
    sweep: Count = Field(
        default=4,
        description="final runs that are begun, with the ranks of the best probes; rung by rung the worse half ends, "
        "and the last one is the final run; 1: the laws' pick alone is trained",
    )


class FinetuneConfig(_Section):
    """The final run with the picked ranks on all the data."""

    steps: Count = Field(default=1000, description="optimizer steps")
    batch_size: Count = Field(default=16, description="samples a step")
    learning_rate: Positive | None = Field(default=None, description="null: that of the optimizer section")
    warmup_steps: CountOrZero = Field(default=30, description="steps of linear warm-up")
    schedule: Literal["cosine", "constant", "linear"] = Field(default="cosine", description="shape after the warm-up")
    look_every: Count = Field(default=50, description="steps between two looks at the validation loss")
    validation_samples: Count = Field(default=256, description="validation samples in a look")
    warm_start: Flag = Field(
        default=False, description="start from the probe with the picked ranks and the largest D, if there was one"
    )

    @model_validator(mode="after")
    def _check_steps(self) -> "FinetuneConfig":
        for name in ("look_every", "warmup_steps"):
            if getattr(self, name) > self.steps:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at most steps ({self.steps})")
        return self


class EvaluateConfig(_Section):
    """The measurements on the test samples."""

    batch_size: Count = Field(default=16, description="samples a step")
    max_samples: Count | None = Field(default=None, description="test samples to use; null: all")
    max_candidates: Count = Field(default=64, description="most answers that one question may be scored against")
    max_new_tokens: Count | None = Field(
        default=None, description="tokens of an answer that the model writes itself, read by rules; null: none"
    )
    controls: Flag = Field(default=True, description="also measure without images and with shuffled images")


class MeshConfig(_Section):
    """Devices along each axis; -1 for all that remain."""

    lane: Annotated[int, Field(strict=True, ge=-1)] = Field(default=-1, description="probes are split over these")
    data: Annotated[int, Field(strict=True, ge=-1)] = Field(default=1, description="samples are split over these")
    fsdp: Annotated[int, Field(strict=True, ge=-1)] = Field(default=1, description="samples and base are split")
    tensor: Annotated[int, Field(strict=True, ge=-1)] = Field(default=1, description="each product is split")


class ExportConfig(_Section):
    """What is written for other tools, besides the PEFT adapter."""

    merged: Flag = Field(default=False, description="also write the whole checkpoint with the adapters added")


class Config(_Section):
    """All settings of a run. Only `run_dir`, `model.checkpoint` and `data.train` have no default."""

    run_dir: RunPath = Field(description="folder that the run writes to, from the current directory")
    seed: CountOrZero = Field(default=0, description="the seed that every random choice follows from")
    model: ModelConfig
    data: DataConfig
    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    probe: ProbeConfig = ProbeConfig()
    convergence: ConvergenceConfig = ConvergenceConfig()
    laws: LawsConfig = LawsConfig()
    selection: SelectionConfig = SelectionConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
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
        if self.selection.method == "paper" and self.convergence.rule is None:
            raise ValueError(
                "selection.method: paper balances the modules' convergence, which convergence.rule: null doesn't "
                "measure. Name a rule (loss_fraction, splice or drift), or choose selection.method: laws"
            )
        return self

    def resolved_yaml(self) -> str:
        """All settings, defaults and absolute paths included; `load_config` reads back an equal config."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
