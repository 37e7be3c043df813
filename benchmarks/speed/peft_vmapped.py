"""Steps of several PEFT adapters at once by torch.func, for comparison with lanes in one program (`lanes_together`)."""

import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from benchmarks.speed.peft_side import PeftGrid, RepeatedSteps, TorchBatch


def repeat_step_vmapped(
    grid: PeftGrid,
    lanes: Sequence[tuple[Mapping[str, int], int]],
    batch: TorchBatch,
    learning_rates: Mapping[str, float],
    steps: int,
) -> RepeatedSteps:
    """As `repeat_step` for K lanes (ranks, seed) at once: torch.func's vmap of grad over stacked adapters.

    All lanes read the same batch, and are padded to the largest ranks with zeros, which train exactly (see `lora`).
    A batch of its own for each lane can't be vmapped in transformers 5.23: `get_placeholder_mask` formats the number
    of image tokens into a message, and `image_size_to_num_patches` lists the picture sizes; both read values. torch
    2.13 has no batching rule for `masked_scatter`, nor for the CPU kernel of "sdpa": it loops over the lanes there, and
    warns. The other products are batched.

    Raises:
        ValueError: an alpha rule whose scale depends on the rank; PEFT keeps the scale as one Python number.
    """
    if grid.alpha.rule != "proportional":
        raise ValueError(
            f"alpha rule {grid.alpha.rule!r} gives ranks different scales; vmapped lanes share one. Use 'proportional'."
        )
    widest = {module: max(ranks[module] for ranks, _ in lanes) for module in lanes[0][0]}
    drawn = []
    for ranks, seed in lanes:
        with grid.drawn(ranks, seed) as directory, grid.adapted(directory) as parameters:
            drawn.append({name: parameter.detach().clone() for name, parameter in parameters.items()})
    with grid.drawn(widest, 0) as directory, grid.adapted(directory) as parameters:
        stacked = {
            name: torch.stack([_padded(lane.get(name), parameter) for lane in drawn]).requires_grad_()
            for name, parameter in parameters.items()
        }
        optimizer = grid.make_optimizer(stacked, learning_rates)
        module = _Loss(grid)

        def loss(lane: dict[str, torch.Tensor]) -> torch.Tensor:
            named = {f"model.{name}": value for name, value in lane.items()}
            return torch.func.functional_call(module, named, (batch,))

        gradients_and_losses = torch.func.vmap(torch.func.grad_and_value(loss))
        seconds, losses = [], []
        for _ in range(steps):
            start = time.perf_counter()
            gradients, values = gradients_and_losses({name: leaf.detach() for name, leaf in stacked.items()})
            squares = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients.values()])
            factors = (grid.optimizer.clip_norm / (squares.sum(0).sqrt() + 1e-6)).clamp(max=1.0)
            for name, leaf in stacked.items():
                leaf.grad = gradients[name] * factors[:, None, None]
            for group in optimizer.param_groups:
                group["lr"] = group["rate"]
            optimizer.step()
            losses.append(values.numpy())
            seconds.append(time.perf_counter() - start)
    return RepeatedSteps(seconds, np.stack(losses))


class _Loss(torch.nn.Module):
    """`PeftGrid.loss` as a module, which `functional_call` needs."""

    def __init__(self, grid: PeftGrid) -> None:
        super().__init__()
        self.model, self._grid = grid.model, grid

    def forward(self, batch: TorchBatch) -> torch.Tensor:
        """The loss of a batch, float32 []."""
        return self._grid.loss(batch)


def _padded(leaf: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """The leaf [rows, columns], or nothing, with zeros after it up to the shape of `like`."""
    padded = torch.zeros_like(like, requires_grad=False)
    if leaf is not None:
        padded[: leaf.shape[0], : leaf.shape[1]] = leaf
    return padded
