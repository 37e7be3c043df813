"""The interface of adapter methods: which leaves adapt a frozen linear, what they compute, and what that costs.

A method is a stateless object in `adapters.registry`. Everything else (the optimizer, checkpoints, files, exports, FLOP
counts) asks it and never names a leaf. An adapter tree mirrors the parameter tree, with the leaves of a method in place
of a linear's weights, and rides in a Linen collection of the method's name: `{"params": base, "lora": adapters}`.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jax import Array

from mars_jax.adapters.targets import Target, Targets
from mars_jax.runtime.trees import Tree

if TYPE_CHECKING:
    from mars_jax.adapters.lora import AlphaRule

Rank = int | Array
AnyArray = Array | np.ndarray
Leaves = Mapping[str, Array]
"""Leaves of one linear by name; with a leading axis L where layers are stacked, which `apply` never sees."""
AnyLeaves = Leaves | Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Leaf:
    """An array of an adapted linear.

    Attributes:
        shape: with the leading axis L where layers are stacked.
        trained: whether the optimizer trains it. The others are set by `fixed`, or by `init` and `between_steps`; they
            are not kept with the best adapters, so what a loss depends on must be trained, constant or of `fixed`.
    """

    shape: tuple[int, ...]
    trained: bool = True


class Context(NamedTuple):
    """What a layer knows of its input besides the numbers.

    Attributes:
        modality: int32 [...], an axis less than the input: 1 where a token stands for a picture, 0 for text; None
            where the model doesn't pass it.
    """

    modality: Array | None = None


NO_CONTEXT = Context()


@dataclass(frozen=True, slots=True)
class MethodSettings:
    """What a run's config says of adapter methods; each takes what concerns it."""

    alpha: "AlphaRule"


@dataclass(frozen=True, slots=True)
class PeftTensor:
    """A trained leaf as PEFT stores it: transposed, a tensor a layer.

    Attributes:
        name: in PEFT's keys, such as "lora_A".
        rank_axis: axis of our leaf that has an entry for each unit of rank.
    """

    name: str
    rank_axis: int


@dataclass(frozen=True, slots=True)
class PeftFormat:
    """How PEFT stores a method.

    Attributes:
        peft_type: of adapter_config.json.
        tensors: trained leaf -> tensor.
        scale: the leaf that PEFT computes as alpha over rank.
        settings: of adapter_config.json, besides ranks, alphas and targets.
    """

    peft_type: str
    tensors: Mapping[str, PeftTensor]
    scale: str
    settings: Mapping[str, object] = field(default_factory=dict)


class AdapterMethod(Protocol):
    """How a frozen linear `y = x W + bias` is adapted.

    Members inherit from this class, are registered in `adapters.registry.METHODS`, and keep four promises, which
    tests/adapters/test_common.py checks for each of them:

    - Fresh leaves change nothing: with them `apply` gives what the linear gives alone.
    - `apply` and `delta` read leaves only, never settings of the method: those enter by `init` and `fixed`.
    - The leaves of fewer columns are the leading parts of those of more columns.
    - Where `padding_is_exact`, leaves padded with zeros train as the unpadded ones do, under optimizers that act on
      each entry alone or through the norm of all.

    Attributes:
        name: unique; of the Linen collection, and what configs say.
        has_ranks: whether a module's rank is a size to choose; else 1 trains the module, and 0 freezes it in any case.
        padding_is_exact: see above.
    """

    name: str
    has_ranks: bool
    padding_is_exact: bool

    def configured(self, settings: MethodSettings) -> "AdapterMethod":
        """The method with the settings of a run."""
        return self

    @abstractmethod
    def leaves(self, target: Target, columns: int) -> dict[str, Leaf]:
        """The leaves of a linear for ranks up to `columns`; none for 0."""

    @abstractmethod
    def init(
        self,
        key: Array,
        targets: Targets,
        ranks: Mapping[str, Rank],
        columns: Mapping[str, int],
        kernels: Mapping[str, Array],
    ) -> Tree:
        """Draws fresh adapters, float32; for all linears at once, so that draws of one shape can share a program.

        Args:
            key: a typed PRNG key.
            targets: the linears that take adapters.
            ranks: module -> rank [], traced or not; 0 freezes the module.
            columns: module -> columns R to allocate; a module with 0 has no leaves.
            kernels: path -> frozen weight [L?, in, out]; empty where the caller has none.
        """

    def fixed(self, rank: Rank) -> dict[str, Array]:
        """Untrained leaves that are one number [] for all linears of a module, from its rank, traced or not."""
        return {}

    @abstractmethod
    def apply(self, x: Array, kernel: Array, bias: Array | None, leaves: Leaves, context: Context) -> Array:
        """The adapted linear.

        Args:
            x: [..., in].
            kernel: [in, out], cast to the dtype of x.
            bias: [out] or None.
            leaves: of this linear and layer.
            context: of x.

        Returns:
            [..., out] in the dtype of x.
        """

    @abstractmethod
    def delta(self, kernel: AnyArray | None, leaves: AnyLeaves) -> AnyArray | None:
        """What the adapter adds to the weight, float32 [L?, in, out]; None where no addition gives what `apply` does.

        Args:
            kernel: the frozen weight [L?, in, out]; None where the caller has none.
            leaves: of this linear; numpy arrays give a numpy array, so that a host merges without a device.
        """

    def squared_norm(self, kernel: Array | None, leaves: Leaves) -> Array:
        """Squared Frobenius norm of `delta` over all layers, float32 []."""
        return jnp.sum(jnp.square(self._delta(kernel, leaves)))

    def squared_change(self, kernel: Array | None, new: Leaves, old: Leaves) -> Array:
        """Squared Frobenius norm of the difference of two deltas over all layers, float32 []."""
        return jnp.sum(jnp.square(self._delta(kernel, new) - self._delta(kernel, old)))

    def _delta(self, kernel: Array | None, leaves: Leaves) -> Array:
        """The delta that the norms of most methods are those of."""
        delta = self.delta(kernel, leaves)
        if delta is None:
            raise NotImplementedError(
                f"adapter method {self.name!r} has no delta, so it must define squared_norm and squared_change itself"
            )
        return jnp.asarray(delta)

    def between_steps(self, adapters: Tree, gradients: Tree, step: Array) -> Tree:
        """The adapters after what is done to them besides the optimizer's step: budgets, changes of basis.

        The optimizer's own state stays as it is.

        Args:
            adapters: after the step, untrained leaves among them.
            gradients: of the trained leaves.
            step: int32 [], the steps done.

        Returns:
            The same tree; to give back the very tree that was taken costs nothing.
        """
        return adapters

    @abstractmethod
    def flops(self, target: Target, rank: int, rows: float, *, trains: bool, moves: bool) -> float:
        """Fewest FLOPs that the adapter of one layer adds to the frozen linear's products.

        Args:
            target: the linear.
            rank: of its module.
            rows: of x.
            trains: whether gradients of the leaves are asked for.
            moves: whether the gradient of x is.
        """

    def parameters(self, target: Target, rank: int) -> int:
        """Trained numbers of a linear, over all layers."""
        return sum(math.prod(leaf.shape) for leaf in self.leaves(target, rank).values() if leaf.trained)

    def peft(self) -> PeftFormat | None:
        """How PEFT stores the method; None if it doesn't."""
        return None


def leaf_names(method: AdapterMethod) -> dict[str, bool]:
    """The leaves that a method has for a linear -> whether they are trained."""
    return {name: leaf.trained for name, leaf in method.leaves(Target("", None, 1, 1), 1).items()}


def dense(x: Array, kernel: Array, bias: Array | None) -> Array:
    """`y = x W + bias`, the frozen linear: x [..., in], kernel [in, out], bias [out]; computed in the dtype of x."""
    rows = x.reshape(-1, x.shape[-1])  # one flat product: fast on every backend, also under vmap over adapters
    y = rows @ kernel.astype(x.dtype)
    if bias is not None:
        y = y + bias[None].astype(x.dtype)
    return y.reshape(*x.shape[:-1], -1)
