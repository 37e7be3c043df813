"""Interface of a model family.

Code outside a family's folder uses this interface and does not depend on the family. `registry` lists the families and
explains how to add one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

from mars_jax.models.configs import ModelConfig
from mars_jax.models.families.hf_json import Json
from mars_jax.models.families.pictures import Pictures
from mars_jax.models.families.tables import CheckpointTable, ConfigT_co
from mars_jax.models.multimodal import Multimodal
from mars_jax.runtime.sharding import Rule


@dataclass(frozen=True, slots=True)
class Family(Generic[ConfigT_co]):
    """A model family.

    Attributes:
        name: the `model_type` of its config.json, and `family` of its configurations.
        read_config: reads the parsed config.json; the second argument is its source, for error messages.
        model: the Linen class, constructed from a configuration and a remat policy, see `layers.rematerialised`.
        table: returns the checkpoint table of a configuration.
        load_pictures: reads the image processor of a checkpoint folder. The last argument is a limit of pixels per
            picture, None for the limit in the folder; families with tiles of one size refuse it, see
            `pictures.refuse_max_pixels`.
        encoder_inputs: the arrays of a batch that only the vision encoder reads, as its `Pictures` makes them.
        shardings: rules for parameters that `models.shardings.RULES` lacks; they take precedence.
    """

    name: str
    read_config: Callable[[Json, str], ConfigT_co]
    model: type[Multimodal]
    table: Callable[[ConfigT_co], CheckpointTable[ModelConfig]]
    load_pictures: Callable[[Path, ConfigT_co, int | None], Pictures]
    encoder_inputs: tuple[str, ...]
    shardings: tuple[Rule, ...] = ()
