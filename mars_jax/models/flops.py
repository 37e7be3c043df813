"""The fewest FLOPs that a lane-step or an evaluation batch can cost, in closed form from shapes and ranks.

It counts matrix products, 2 m n k each, and nothing elementwise; no compiler is asked and no time is predicted.
Counted is what the loss needs: of the last decoder layer its keys and values everywhere, the rest at the supervised
positions. Attention is full T x T (that half of it is masked saves nothing here), `x A B` is not merged into the
weight, and nothing is computed twice (no remat). What adapters cost is their method's to say.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

from mars_jax.adapters.lora import LORA
from mars_jax.adapters.method import AdapterMethod
from mars_jax.adapters.targets import Targets
from mars_jax.models.configs import ModelConfig
from mars_jax.models.families.registry import parameters


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs by what they are spent on; the parts add up to `total`.

    Attributes:
        encoder: frozen linears of the vision encoder, with the patch embedding.
        projector: frozen linears of the projector.
        llm: frozen linears of the decoder layers.
        attention: the batched products of attention, encoder and decoder.
        adapters: what adapters add to the linears, of every module.
        head: logits, at the supervised positions only, and in training their gradient.
    """

    encoder: float = 0.0
    projector: float = 0.0
    llm: float = 0.0
    attention: float = 0.0
    adapters: float = 0.0
    head: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return sum(asdict(self).values())


class BatchShape(NamedTuple):
    """Sizes of a batch.

    Attributes:
        batch_size: B, samples.
        tokens: T, a sample.
        tiles: N, a sample; windows where the encoder has window attention.
        supervised: S, positions of a sample that need logits.
    """

    batch_size: int
    tokens: int
    tiles: int
    supervised: int


def lane_step_flops(
    config: ModelConfig,
    targets: Targets,
    ranks: Mapping[str, int],
    shape: BatchShape,
    *,
    method: AdapterMethod = LORA,
    cached_encoder: bool = False,
) -> Flops:
    """Loss and gradients of the adapters of one lane on one batch, without the optimizer.

    Frozen weights get no gradient, and activations get one only where something adapted lies below them.

    Args:
        config: the architecture.
        targets: the linears that take adapters.
        ranks: module -> rank; give the padded ranks for what a bucket really computes. 0 freezes a module.
        shape: of the batch.
        method: the adapter method.
        cached_encoder: whether features of the vision encoder are read instead of computed.

    Raises:
        ValueError: a cached encoder that is adapted, or a target that the model doesn't have.
    """
    return _Walk(config, targets, ranks, method, shape.batch_size, trains=True).model(shape, cached_encoder)


def evaluation_flops(
    config: ModelConfig,
    targets: Targets,
    ranks: Mapping[str, int],
    shape: BatchShape,
    *,
    method: AdapterMethod = LORA,
    cached_encoder: bool = False,
) -> Flops:
    """The loss of one lane on one batch, forward only; arguments and errors as in `lane_step_flops`."""
    return _Walk(config, targets, ranks, method, shape.batch_size, trains=False).model(shape, cached_encoder)


# The linears after attention and of the MLP have one of these names, whichever a model has.
_OUTPUT, _UP, _DOWN = ("o_proj", "out_proj", "proj"), ("gate_proj", "up_proj", "fc1"), ("down_proj", "fc2")


class _Walk:
    """Follows one batch through the model and adds up what each product costs.

    `moves` says of an activation that something adapted lies below it, so training needs its gradient.
    """

    def __init__(
        self,
        config: ModelConfig,
        targets: Targets,
        ranks: Mapping[str, int],
        method: AdapterMethod,
        batch_size: int,
        trains: bool,
    ) -> None:
        self.config, self.batch_size, self.trains = config, batch_size, trains
        self.targets, self.method = targets, method
        weights = [p for p in parameters(config) if p.path.endswith(("/kernel", "/embedding"))]
        self.shapes = {p.path.removesuffix("/kernel"): p.shape[-2:] for p in weights}
        self.ranks = {path: ranks[target.module] for path, target in targets.items()}
        self.parts = dict.fromkeys((field.name for field in fields(Flops)), 0.0)
        unknown = sorted(set(targets) - set(self.shapes))
        if unknown:
            raise ValueError(f"flops: the model has no linear {', '.join(map(repr, unknown))}.")

    def model(self, shape: BatchShape, cached_encoder: bool) -> Flops:
        """The whole model."""
        _, tokens, tiles, supervised = shape
        config, vision = self.config, self.config.vision
        if cached_encoder:
            adapted = [path for path, rank in self.ranks.items() if path.startswith("vision/") and rank]
            if adapted:
                raise ValueError(f"flops: features can't come from a cache while {adapted[0]!r} is adapted.")
            moves = False
        else:
            moves = self.linear("encoder", "vision/patch_embed", tiles * vision.num_patches, False)
            for number in range(config.num_vision_layers_used):
                sequences, length = vision.sequences(number, tiles)
                moves = self.layer("encoder", "vision", sequences, length, moves, length)
        for path in [path for path in self.shapes if path.startswith("projector/")]:
            moves = self.linear("projector", path, tiles * vision.num_positions // vision.group, moves)
        for left in reversed(range(config.text.num_layers)):
            # Of the last layer only the supervised positions are asked for.
            moves = self.layer("llm", "llm", 1, tokens, moves, tokens if left else supervised)
        tied = config.text.tie_word_embeddings
        self.linear("head", "llm/embed_tokens/embedding" if tied else "llm/lm_head", supervised, moves)
        return Flops(**self.parts)

    def layer(self, part: str, module: str, sequences: int, length: int, moves: bool, asked: int) -> bool:
        """One transformer layer on `sequences` sequences a sample, whose output is needed at `asked` positions of each.

        Returns whether its output moves.
        """
        rows, prefix = sequences * asked, f"{module}/layers"
        if f"{prefix}/self_attn/qkv" in self.shapes:
            query = key = value = self.linear(part, f"{prefix}/self_attn/qkv", rows, moves)
        else:
            query = self.linear(part, f"{prefix}/self_attn/q_proj", rows, moves)
            key, value = (self.linear(part, f"{prefix}/self_attn/{x}_proj", sequences * length, moves) for x in "kv")
        (output,) = self.paths(f"{prefix}/self_attn", _OUTPUT)
        # Two products forward; backward one each for queries, keys, values and attention weights, where they move.
        products = 2 + self.trains * (query + key + value + (query or key))
        self.parts["attention"] += 2.0 * self.batch_size * rows * length * self.shapes[output][0] * products
        moves |= self.linear(part, output, rows, query or key or value)
        wide = [self.linear(part, path, rows, moves) for path in self.paths(f"{prefix}/mlp", _UP)]
        (down,) = self.paths(f"{prefix}/mlp", _DOWN)
        return moves | self.linear(part, down, rows, any(wide))

    def paths(self, prefix: str, names: tuple[str, ...]) -> list[str]:
        """Those of the linears that the model has."""
        return [f"{prefix}/{name}" for name in names if f"{prefix}/{name}" in self.shapes]

    def linear(self, part: str, path: str, rows: int, moves: bool) -> bool:
        """One linear on `rows` rows a sample; returns whether its output moves."""
        (d_in, d_out), rank = self.shapes[path], self.ranks.get(path, 0)
        product = 2.0 * self.batch_size * rows
        self.parts[part] += product * d_in * d_out * (1 + (self.trains and moves))
        if rank:
            self.parts["adapters"] += self.method.flops(
                self.targets[path], rank, self.batch_size * rows, trains=self.trains, moves=moves
            )
        return moves or rank > 0
