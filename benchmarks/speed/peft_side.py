"""LoRA probes with transformers, PEFT and torch, one after the other: the other side of the comparisons with PEFT.

It is what a competent user would write: one process, the base loaded once and frozen, one adapter a probe. Weights,
drawn adapters, batches, AdamW, clipping, warm-up and eval points are ours, so that both sides train the same lanes;
batches are cut to their longest sample, and turned into tensors outside of what is timed. It measures nothing of our
own engine and writes no results.

Chosen by timing, on the demo base (batch 16, rank 8, two threads, 60 alternating steps each on a machine that was not
quite idle; lowest / lower quartile of a step): attention "sdpa" 48.4 / 55.2 ms, "eager" 51.1 / 56.7 ms, so they hardly
differ; with the head at supervised positions only, 47.7 / 52.8 and 49.8 / 56.7 ms. AdamW's update (lowest of 60) takes
1.0 ms fused, 3.3 ms foreach, 4.7 ms in a loop.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import jax
import numpy as np
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import LlavaOnevisionForConditionalGeneration

from mars_jax.adapters import lora
from mars_jax.adapters.targets import Targets
from mars_jax.adapters.tree import init_adapters
from mars_jax.config.schema import OptimizerConfig
from mars_jax.data.tokenizer import load_tokenizer
from mars_jax.hub.adapter import write_adapter
from mars_jax.hub.read import read_config
from mars_jax.models.families.llava.anyres import Geometry, image_tokens
from mars_jax.models.families.llava.config import LlavaOnevisionConfig
from mars_jax.models.families.llava.table import ONEVISION as FAMILY
from mars_jax.models.families.pictures import NEWLINE

Head = Literal["all", "supervised"]
Row = dict[str, Any]

_MODULES = {"vision_tower": "vision", "multi_modal_projector": "projector", "language_model": "llm"}
_NO_LABEL = -100


class Stream(Protocol):
    """Batches as a function of the step: our numpy arrays [B, ...]."""

    def __getitem__(self, step: int, /) -> Mapping[str, np.ndarray]:
        """The batch of a step."""
        ...


class TorchBatch(NamedTuple):
    """One batch for the Hugging Face model; T is the length of its longest sample."""

    inputs: dict[str, torch.Tensor]  # input_ids and attention_mask [B, T]; pixel_values, image_sizes of the pictures
    labels: torch.Tensor  # int64 [B, T], -100 where nothing is learned
    rows: torch.Tensor  # int64 [M], the M supervised positions as rows of hidden states [B * T, D]
    targets: torch.Tensor  # int64 [M]
    tokens: int  # those that are not padding


@dataclass(frozen=True)
class LaneResult:
    """Results of a lane; seconds are of the wall clock unless noted.

    Attributes:
        losses: training loss of each step taken, nats.
        rows: one an eval point: step, train_loss (mean since the one before; None at step 0), validation_loss.
        setup_seconds: adding the adapter and making the optimizer; drawing our adapter isn't in it.
        step_seconds: forward, backward, clipping and update of all steps.
        eval_seconds: validation.
        data_seconds: fetching the batches and turning them into tensors.
        cpu_seconds: process time of the steps and the eval points.
        tokens: trained on, padding not counted.
        eval_tokens: read at eval points, padding not counted.
    """

    losses: list[float]
    rows: list[Row]
    setup_seconds: float
    step_seconds: float
    eval_seconds: float
    data_seconds: float
    cpu_seconds: float
    tokens: int
    eval_tokens: int


class RepeatedSteps(NamedTuple):
    """Steps on one fixed batch."""

    seconds: list[float]  # of each step
    losses: np.ndarray  # [steps, K]


@dataclass(frozen=True)
class TorchSettings:
    """How torch computes.

    Attributes:
        threads: of torch, in this process.
        head: "all" is what PEFT users get, logits at every position; "supervised" spares what the loss ignores.
        attention: the implementation in transformers.
        device: of model and batches, as torch names it.
        dtype: of the base, and what products are computed in; adapters are float32.
    """

    threads: int = 2
    head: Head = "all"
    attention: Literal["sdpa", "eager"] = "sdpa"
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


class LaneData(NamedTuple):
    """What a lane reads: its data, and its schedule."""

    batches: Stream
    validation: Sequence[TorchBatch]  # from `PeftGrid.encode_all`
    multipliers: Sequence[float] | np.ndarray  # factor on the learning rates at each step
    learning_rates: Mapping[str, float]  # module -> learning rate
    eval_steps: Sequence[int]  # steps at which to validate, rising; the last is the horizon, 0 the base itself


class PeftGrid:
    """The base, loaded once, and lanes that are trained on it one after the other.

    Attributes:
        model: the transformers model, float32, frozen, in eval mode (there is no dropout); never changed by a lane.
    """

    def __init__(
        self,
        checkpoint: Path,
        targets: Targets,
        alpha: lora.AlphaRule,
        optimizer: OptimizerConfig,
        image_size: tuple[int, int],
        settings: TorchSettings = TorchSettings(),
    ) -> None:
        """Loads the base.

        Args:
            checkpoint: folder of a LLaVA-OneVision model with its tokenizer.
            targets: linears that take adapters.
            alpha: the alpha rule.
            optimizer: AdamW and clipping; its learning rates and warm-up are not read.
            image_size: height and width of every picture; our batches hold tiles, transformers wants this as well.
            settings: how torch computes.
        """
        torch.set_num_threads(settings.threads)
        config = read_config(checkpoint)
        assert isinstance(config, LlavaOnevisionConfig)
        self.config = config
        self.model = LlavaOnevisionForConditionalGeneration.from_pretrained(
            checkpoint, dtype=settings.dtype, attn_implementation=settings.attention, local_files_only=True
        )
        # transformers wraps `Module.to` in a type that takes no name of a device.
        self.model.to(settings.device)  # type: ignore[arg-type]
        self._device, self._dtype = settings.device, settings.dtype
        self.model.eval().requires_grad_(False)
        self.targets, self.alpha, self.optimizer, self.head = targets, alpha, optimizer, settings.head
        self._checkpoint = str(checkpoint)
        self._pad = load_tokenizer(checkpoint).pad_token_id
        self._image_size = image_size
        self._layout = image_tokens(*image_size, Geometry.from_config(self.config))

    # Data.

    def encode(self, batch: Mapping[str, np.ndarray]) -> TorchBatch:
        """Turns one of our batches [B, ...] into inputs of transformers, padded to its longest sample only.

        Raises:
            ValueError: pictures whose tokens are not those of the grid's picture size.
        """
        tokens = batch["tokens"]
        lengths = tokens.shape[1] - np.argmax(tokens[:, ::-1] != self._pad, axis=1)
        length = int(lengths.max())
        mask = np.arange(length)[None, :] < lengths[:, None]
        inputs = {
            "input_ids": torch.from_numpy(tokens[:, :length].astype(np.int64)),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),
        }
        pictured = self._pictured(batch)
        if pictured.any():
            tiles = batch["pixels"][pictured, : self._layout.num_tiles]
            inputs["pixel_values"] = torch.from_numpy(tiles)
            inputs["image_sizes"] = torch.tensor([self._image_size] * int(pictured.sum()))
        sample, place = np.nonzero(batch["target_weights"])
        positions, targets = batch["target_positions"][sample, place], batch["targets"][sample, place].astype(np.int64)
        labels = np.full((len(tokens), length), _NO_LABEL, np.int64)
        labels[sample, positions + 1] = targets  # transformers shifts labels by one
        rows = torch.from_numpy(sample * length + positions)
        put = partial(torch.Tensor.to, device=self._device)
        return TorchBatch(
            {name: put(tensor) for name, tensor in inputs.items()},
            put(torch.from_numpy(labels)),
            put(rows),
            put(torch.from_numpy(targets)),
            int(lengths.sum()),
        )

    def encode_all(self, batches: Mapping[str, np.ndarray]) -> list[TorchBatch]:
        """Batches [V, B, ...], as eval points read them."""
        return [self.encode({name: leaf[v] for name, leaf in batches.items()}) for v in range(len(batches["tokens"]))]

    def _pictured(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        index = batch["image_index"]
        newline = batch["pixels"].shape[1] * self.config.vision.num_patches
        expected = np.where(self._layout.index == NEWLINE, newline, self._layout.index)[:, 0]
        pictured = np.any(index[:, :, 0] >= 0, axis=1)
        for rows in index[pictured, :, 0]:
            if not np.array_equal(rows[rows >= 0], expected):
                raise ValueError(
                    f"a picture has {(rows >= 0).sum()} image tokens that are not the {len(expected)} of height and "
                    f"width {self._image_size}. Give the grid the size of the pictures; all must have the same."
                )
        return pictured

    # Adapters.

    @contextmanager
    def drawn(self, ranks: Mapping[str, int], seed: int) -> Iterator[str]:
        """A folder with our drawn adapter in PEFT's format; it is not what a PEFT user does, so never timed."""
        adapters = init_adapters(jax.random.key(seed), self.targets, ranks, lora.Lora(self.alpha))
        with tempfile.TemporaryDirectory() as directory:
            write_adapter(directory, adapters, ranks, self.config, base_name=self._checkpoint, provenance={})
            yield directory

    @contextmanager
    def adapted(self, directory: str) -> Iterator[dict[str, torch.nn.Parameter]]:
        """The base with an adapter: its trainable parameters by name. The adapter is gone afterwards."""
        peft_model = PeftModel.from_pretrained(self.model, directory, is_trainable=True).eval()
        try:
            yield {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        finally:
            peft_model.unload()

    def make_optimizer(
        self, parameters: Mapping[str, torch.Tensor], learning_rates: Mapping[str, float]
    ) -> torch.optim.AdamW:
        """AdamW with one group a module; `step` scales the rates."""
        groups: dict[str, list[torch.Tensor]] = {}
        for name, parameter in parameters.items():
            groups.setdefault(_MODULES[FAMILY.hub_key(name).split(".")[0]], []).append(parameter)
        settings = self.optimizer
        return torch.optim.AdamW(
            [{"params": group, "rate": learning_rates[module]} for module, group in groups.items()],
            betas=(settings.b1, settings.b2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    # Training.

    def loss(self, batch: TorchBatch) -> torch.Tensor:
        """Mean cross-entropy over the supervised tokens, nats, float32 []."""
        # As transformers' trainer does; without it, PEFT's float32 adapters would make float32 products.
        with torch.autocast(self._device, self._dtype, enabled=self._dtype != torch.float32):
            if self.head == "all":
                return self.model(**batch.inputs, labels=batch.labels, use_cache=False).loss
            return F.cross_entropy(self._supervised_logits(batch), batch.targets)

    def _supervised_logits(self, batch: TorchBatch) -> torch.Tensor:
        hidden = self.model.model(**batch.inputs, use_cache=False).last_hidden_state
        return self.model.lm_head(hidden.flatten(0, 1)[batch.rows])

    @torch.inference_mode()
    def validation_loss(self, batches: Sequence[TorchBatch]) -> float:
        """Mean cross-entropy over the supervised tokens of all batches, nats."""
        totals = [F.cross_entropy(self._supervised_logits(b), b.targets, reduction="sum").item() for b in batches]
        return math.fsum(totals) / sum(len(batch.targets) for batch in batches)

    def train_lane(
        self,
        ranks: Mapping[str, int],
        seed: int,
        data: LaneData,
        stop: Callable[[list[Row]], bool] = lambda rows: False,
    ) -> LaneResult:
        """Trains one lane from its drawn adapter to the last eval point, or until `stop`.

        Args:
            ranks: module -> rank; a module of rank 0 has no adapter.
            seed: of the adapter.
            data: what it reads.
            stop: gets the rows so far after every eval point; True ends the lane, and so does a loss that isn't finite.
        """
        losses: list[float] = []
        rows: list[Row] = []
        step_seconds = eval_seconds = data_seconds = cpu_seconds = 0.0
        tokens = 0
        with self.drawn(ranks, seed) as directory:
            start = time.perf_counter()
            with self.adapted(directory) as parameters:
                optimizer = self.make_optimizer(parameters, data.learning_rates)
                setup_seconds = time.perf_counter() - start
                done = 0
                for point in data.eval_steps:
                    for step in range(done, point):
                        start = time.perf_counter()
                        batch = self.encode(data.batches[step])
                        data_seconds += time.perf_counter() - start
                        start, cpu = time.perf_counter(), time.process_time()
                        losses.append(self.step(batch, optimizer, float(data.multipliers[step])).item())
                        step_seconds += time.perf_counter() - start
                        cpu_seconds += time.process_time() - cpu
                        tokens += batch.tokens
                    start, cpu = time.perf_counter(), time.process_time()
                    validation_loss = self.validation_loss(data.validation)
                    eval_seconds += time.perf_counter() - start
                    cpu_seconds += time.process_time() - cpu
                    train_loss = math.fsum(losses[done:]) / (point - done) if point > done else None
                    rows.append({"step": point, "train_loss": train_loss, "validation_loss": validation_loss})
                    done = point
                    if not math.isfinite(validation_loss) or stop(rows):
                        break
        return LaneResult(
            losses=losses,
            rows=rows,
            setup_seconds=setup_seconds,
            step_seconds=step_seconds,
            eval_seconds=eval_seconds,
            data_seconds=data_seconds,
            cpu_seconds=cpu_seconds,
            tokens=tokens,
            eval_tokens=len(rows) * sum(batch.tokens for batch in data.validation),
        )

    def step(self, batch: TorchBatch, optimizer: torch.optim.AdamW, multiplier: float) -> torch.Tensor:
        """One step of AdamW; returns the loss before it, float32 [], and on a GPU doesn't wait for it.

        `clip_grad_norm_` divides by the norm + 1e-6 where optax divides by the norm: a factor of 1 - 1e-6 / norm.
        """
        loss = self.loss(batch)
        loss.backward()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, self.optimizer.clip_norm, foreach=True)
        for group in optimizer.param_groups:
            group["lr"] = multiplier * group["rate"]
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def repeat_step(
        self,
        ranks: Mapping[str, int],
        seed: int,
        batch: TorchBatch,
        learning_rates: Mapping[str, float],
        steps: int,
    ) -> RepeatedSteps:
        """Times steps of one lane on one batch, from its drawn adapter; the first ones warm up."""
        with self.drawn(ranks, seed) as directory, self.adapted(directory) as parameters:
            optimizer = self.make_optimizer(parameters, learning_rates)
            seconds, losses = [], []
            for _ in range(steps):
                start = time.perf_counter()
                losses.append(self.step(batch, optimizer, 1.0).item())
                seconds.append(time.perf_counter() - start)
        return RepeatedSteps(seconds, np.asarray(losses)[:, None])
