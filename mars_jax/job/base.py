"""The base of a job: checkpoint, architecture, target linears, devices and frozen parameters."""

from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mars_jax.adapters.lora import AlphaRule
from mars_jax.adapters.method import AdapterMethod, MethodSettings
from mars_jax.adapters.registry import METHODS
from mars_jax.adapters.targets import Targets, check_ranks, count_parameters, find_targets, parameters_per_rank
from mars_jax.config.load import Config
from mars_jax.data.batches import Batch
from mars_jax.hub.paths import local
from mars_jax.hub.read import read_checkpoint, read_config
from mars_jax.lanes.lane import Ranks
from mars_jax.models.configs import ModelConfig
from mars_jax.models.families.registry import build_model, parameters
from mars_jax.models.multimodal import Multimodal
from mars_jax.models.shardings import base_shardings
from mars_jax.runtime.devices import devices_to_use, single_lane_mesh
from mars_jax.runtime.sharding import check_batch, make_mesh, place
from mars_jax.runtime.trees import Tree, unflatten


class JobBase:
    """Checkpoint, targets, devices and frozen parameters of a job, each loaded when first asked for."""

    def __init__(self, config: Config) -> None:
        self._config = config

    @cached_property
    def checkpoint(self) -> Path:
        """The folder of the base, downloaded if it is named by its address."""
        return local(self._config.model.checkpoint)

    @cached_property
    def model_config(self) -> ModelConfig:
        """Architecture of the checkpoint."""
        return read_config(self.checkpoint)

    @cached_property
    def model(self) -> Multimodal:
        """The Linen module for forward passes; `Engines` builds the one that trains."""
        return build_model(self.model_config)

    @cached_property
    def abstract_params(self) -> Tree:
        """Shapes of the parameters, from the config alone."""
        dtype = jnp.dtype(self._config.model.dtype)
        return unflatten({p.path: jax.ShapeDtypeStruct(p.shape, dtype) for p in parameters(self.model_config)})

    @property
    def num_bytes(self) -> int:
        """Bytes of the parameters."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.abstract_params))

    @cached_property
    def targets(self) -> Targets:
        """Linears that take adapters.

        Raises:
            ConfigError: patterns that match nothing, or ranks that the linears don't allow.
        """
        modules = self._config.lora.modules
        targets = find_targets(self.abstract_params, {name: module.targets for name, module in modules.items()})
        for ends in (min, max):
            check_ranks(targets, {name: ends(module.ranks) for name, module in modules.items()}, self.method)
        return targets

    @property
    def parameters_per_rank(self) -> dict[str, int]:
        """Module -> trainable parameters of one rank."""
        return parameters_per_rank(self.targets, self.method)

    def num_trained(self, ranks: Ranks) -> int:
        """Trainable parameters of adapters of some ranks."""
        return count_parameters(self.targets, ranks, self.method)

    @property
    def alpha(self) -> AlphaRule:
        """The alpha rule."""
        return AlphaRule(self._config.lora.alpha.rule, self._config.lora.alpha.value)

    @property
    def method(self) -> AdapterMethod:
        """The adapter method, as the config sets it."""
        return METHODS[self._config.adapter.method].configured(MethodSettings(alpha=self.alpha))

    @cached_property
    def mesh(self) -> Mesh:
        """The devices of the config.

        Raises:
            ConfigError: sizes that don't fit the devices, or a base or batch that they don't divide.
        """
        config = self._config
        sizes = config.mesh.model_dump()
        mesh = make_mesh(sizes, devices_to_use(sizes, self.num_bytes, config.probe.lanes_per_program))
        for batch_size in (config.probe.batch_size, config.finetune.batch_size):
            check_batch(batch_size, mesh)
        base_shardings(self.model_config, mesh)
        return mesh

    @cached_property
    def single_lane_mesh(self) -> Mesh:
        """The same devices for one lane: see `devices.single_lane_mesh`."""
        return single_lane_mesh(self.mesh, self._config.finetune.batch_size)

    @cached_property
    def params(self) -> Tree:
        """Frozen parameters on the devices."""
        loaded = read_checkpoint(self.checkpoint, self._config.model.dtype)[1]
        return place(loaded, base_shardings(self.model_config, self.mesh))

    def params_on(self, mesh: Mesh) -> Tree:
        """Frozen parameters as an engine on this mesh takes them."""
        return self.params if mesh == self.mesh else place(self.params, base_shardings(self.model_config, mesh))

    def encode(self, inputs: Batch) -> np.ndarray:
        """Features [B, N, P, D] by the frozen vision encoder of the encoder's inputs of a batch, on the host."""
        params, dtype = self.params_on(self.single_lane_mesh), jnp.dtype(self._config.model.dtype)
        return jax.device_get(self._encoder(params, {**inputs, "pixels": inputs["pixels"].astype(dtype)}))

    @cached_property
    def _encoder(self) -> jax.stages.Wrapped:
        return jax.jit(lambda params, batch: self.model.apply({"params": params}, batch, method="encode"))
