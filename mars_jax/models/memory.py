"""What training keeps in memory, in closed form: activations of a lane-step, the state of a lane.

Estimates for planning, compared with a compiler's own plan in `benchmarks/memory/remat.py`; nothing is measured here.
"""

from collections.abc import Collection, Mapping

from mars_jax.models.attention import MAX_SCORES
from mars_jax.models.configs import ModelConfig
from mars_jax.models.layers import SCAN_UNROLL

# Memory that XLA plans over the size of the layers' outputs, at LLaVA-OneVision-0.5B's shapes
# (benchmarks/memory/remat.py).
_OVERHEAD = 2.3


def lane_state_bytes(parameters: int, looks_per_doubling: int) -> int:
    """Bytes of a lane's state: adapters, average, gradients, two Adam moments, the best and snapshots, float32."""
    return 4 * parameters * (6 + looks_per_doubling)


def activation_bytes(
    config: ModelConfig,
    ranks: Mapping[str, int],
    *,
    batch_size: int,
    tokens: int,
    tiles: int,
    remat: str = "none",
    itemsize: int = 4,
    flash: Collection[str] = (),
) -> int:
    """Bytes that a lane-step keeps from its forward pass for its backward pass.

    Args:
        config: the architecture.
        ranks: module -> rank.
        batch_size: B, samples.
        tokens: T, a sample.
        tiles: N, a sample; windows where the encoder has window attention.
        remat: see `models.layers.rematerialised`.
        itemsize: bytes of an activation.
        flash: modules whose attention keeps no scores, see `models.attention.has_flash`.
    """
    vision, text = config.vision, config.text
    # Attention of long sequences is computed again in the backward pass too, see `models.attention`.
    seen = 0 if vision.recomputes_attention or "vision" in flash else vision.num_positions
    encoder = _layer(vision.hidden_size, vision.intermediate_size, 1 + vision.gated_mlp, vision.num_heads * seen)
    scores = text.num_heads * tokens if tokens**2 <= MAX_SCORES and "llm" not in flash else 0
    decoder = _layer(text.hidden_size, text.intermediate_size, 2, scores)
    rows = {"vision": tiles * vision.num_positions, "llm": tokens}
    layers = {"vision": config.num_vision_layers_used, "llm": text.num_layers}
    kept = {
        "none": {"vision": encoder + 6 * ranks.get("vision", 0), "llm": decoder + 7 * ranks.get("llm", 0)},
        "attention": {"vision": 2 * vision.hidden_size, "llm": 2 * text.hidden_size},
        "full": {"vision": vision.hidden_size, "llm": text.hidden_size},
    }
    total = sum(rows[module] * layers[module] * kept[remat][module] for module in rows)
    if remat != "none":
        # As many layers as the loop over them unrolls are whole at a time.
        total += max(min(SCAN_UNROLL, layers[m]) * rows[m] * kept["none"][m] for m in rows)
    return int(_OVERHEAD * batch_size * itemsize * total)


def _layer(width: int, ffn: int, gates: int, scores: int) -> int:
    """Numbers a position that one transformer layer keeps: norms, projections, scores with their softmax, MLP."""
    return 8 * width + (1 + 2 * gates) * ffn + 2 * scores
