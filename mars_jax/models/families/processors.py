"""Loads transformers' numpy image processors, without torch and torchvision.

Files of all versions are read here and checked against one schema; transformers' class gets the checked settings alone,
so that nothing else in a file reaches it.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from mars_jax.errors import ConfigError
from mars_jax.runtime.json_object import Settings, checked, key_in, read_json_object, refusal
from mars_jax.runtime.jsonfiles import Document

_FILES = ("preprocessor_config.json", "processor_config.json")
# Settings of files that the class does not get: they have one allowed value.
_FIXED = {"use_square_size", "data_format"}
# transformers' own.
_SIZES = (
    {"height", "width"},
    {"shortest_edge"},
    {"longest_edge"},
    {"shortest_edge", "longest_edge"},
    {"max_height", "max_width"},
)

Edge = Annotated[int, Field(ge=1, le=4096)]
Pixels = Annotated[int, Field(ge=1, le=2**36)]
_Three = Annotated[list[Annotated[float, Field(ge=-1e6, le=1e6)]], Field(min_length=3, max_length=3)]
_Deviation = Annotated[float, Field(gt=0, le=1e6)]
_ThreeDeviations = Annotated[list[_Deviation], Field(min_length=3, max_length=3)]

ResultT = TypeVar("ResultT")


class ImageProcessor(Protocol):
    """An image processor of transformers, as the families call it."""

    def __call__(
        self, images: Sequence[Image.Image] | Sequence[Sequence[Image.Image]], *, return_tensors: str
    ) -> Mapping[str, np.ndarray]:
        """Maps pictures, or the pictures of each record, to arrays; `return_tensors` is "np"."""
        ...


class Size(Settings):
    """Sides in pixels, in one of the combinations that transformers knows."""

    height: Edge | None = None
    width: Edge | None = None
    shortest_edge: Edge | None = None
    longest_edge: Edge | None = None
    max_height: Edge | None = None
    max_width: Edge | None = None

    @model_validator(mode="after")
    def _is_known_combination(self) -> "Size":
        if set(self.model_dump(exclude_none=True)) not in _SIZES:
            known = "; ".join(" and ".join(sorted(keys)) for keys in _SIZES)
            raise ValueError(f"one of these combinations of keys is expected: {known}")
        return self


AnySize = Edge | Annotated[list[Edge], Field(min_length=2, max_length=2)] | Size


class ProcessorSettings(Settings):
    """Settings of image processors, apart from `size`; null stands for the default of its class."""

    do_resize: bool | None = None
    default_to_square: bool | None = None
    resample: Annotated[int, Field(ge=0, le=5)] | None = None
    do_center_crop: bool | None = None
    crop_size: AnySize | None = None
    do_rescale: bool | None = None
    rescale_factor: Annotated[float, Field(gt=0, le=1e6)] | None = None
    do_normalize: bool | None = None
    image_mean: Annotated[float, Field(ge=-1e6, le=1e6)] | _Three | None = None
    image_std: _Deviation | _ThreeDeviations | None = None
    do_pad: bool | None = None
    pad_size: AnySize | None = None
    use_square_size: Literal[False] | None = None
    data_format: Literal["channels_first"] | None = None

    def given(self) -> Document:
        """The settings in the file, as the class takes them."""
        return self.model_dump(exclude_none=True, exclude=_FIXED)


class SidedSettings(ProcessorSettings):
    """Settings of the image processors that scale pictures to given sides."""

    size: AnySize | None = None


SchemaT = TypeVar("SchemaT", bound=ProcessorSettings)


def read_processor(directory: Path, schema: type[SchemaT], known: Sequence[str]) -> tuple[SchemaT, str]:
    """Reads the image processor's settings of a checkpoint folder.

    Args:
        directory: the folder.
        schema: of the processors that the family takes.
        known: names of these, without the suffixes of their variants; the first is that of a folder without a name.

    Returns:
        The settings, and the name of the processor.

    Raises:
        ConfigError: the folder has no image processor, one that the family does not take, or impossible settings.
    """
    file, section, settings = _settings(directory)
    name = settings.get("image_processor_type")
    if name is None and settings.get("feature_extractor_type") is not None:
        name = str(settings["feature_extractor_type"]).replace("FeatureExtractor", "ImageProcessor")
    if not isinstance(name, str | None):
        raise refusal(str(file), key_in(section, "image_processor_type"), name, "a text expected")
    read = checked(schema, settings, str(file), section)
    name = name.removesuffix("Fast").removesuffix("Pil") if name else known[0]
    if name not in known:
        raise ConfigError(
            f"{directory}: the image processor is {name!r}; {', '.join(known)} are supported. Copy the processor of "
            "the checkpoint's source."
        )
    return read, name


def make_processor(directory: Path, name: str, settings: Mapping[str, object]) -> Any:
    """An image processor of transformers.

    Args:
        directory: folder of the settings, for error messages.
        name: module and name of its class without suffix, such as "clip.CLIPImageProcessor".
        settings: the checked settings that the class gets.

    Raises:
        ConfigError: the class does not take the settings.
    """
    part, name = name.split(".")
    module = import_module(f"transformers.models.{part}.image_processing_pil_{part}")
    return attempt(directory, lambda: getattr(module, f"{name}Pil")(**settings))


def attempt(directory: Path, work: Callable[[], ResultT]) -> ResultT:
    """Runs transformers' code with the settings of a folder.

    Raises:
        ConfigError: it failed, whatever with.
    """
    try:
        return work()
    except Exception as error:  # transformers' classes raise any type
        raise ConfigError(
            f"{directory}: the image processor cannot be used with its settings ({type(error).__name__}: {error}). "
            "Copy its configuration again from the checkpoint's source."
        ) from error


def _settings(directory: Path) -> tuple[Path, str, Document]:
    """File, key and settings of the image processor: as transformers, nested ones in the newer file come first."""
    old, new = (directory / name for name in _FILES)
    if new.is_file():
        document = read_json_object(new)
        if "image_processor" in document:
            nested = document["image_processor"]
            if not isinstance(nested, dict):
                raise refusal(str(new), "image_processor", nested, "an object expected")
            return new, "image_processor", nested
    if old.is_file():
        return old, "", read_json_object(old)
    raise ConfigError(
        f"{directory} has neither {_FILES[0]} nor an image_processor in {_FILES[1]}. Copy them from the checkpoint's "
        "source: they hold the vision encoder's scaling and normalisation of pictures."
    )
