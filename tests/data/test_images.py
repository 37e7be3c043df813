"""Pictures of every kind to RGB, and the order of image tokens against transformers' own code in torch."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers import LlavaOnevisionConfig
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from mars_jax.data.images import load_rgb
from mars_jax.errors import ConfigError, DataError
from mars_jax.models.families.llava.anyres import Geometry, image_tokens, load_anyres_pictures
from mars_jax.models.families.llava.config import LlavaOnevisionConfig as OurConfig
from mars_jax.models.families.pictures import NEWLINE, ImageTokens
from mars_jax.models.families.registry import model_config
from tests.helpers import tiny_data
from tests.helpers.tiny_data import GEOMETRY, save_picture

REAL = Geometry(384, 14, tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7)), 9)


def geometries() -> st.SearchStrategy[Geometry]:
    sides = st.integers(1, 6)
    pinpoints = st.lists(st.tuples(sides, sides), min_size=1, max_size=8, unique=True)
    return st.builds(
        lambda grid, points, most: Geometry(
            grid * 14, 14, tuple((r * grid * 14, c * grid * 14) for r, c in points), most
        ),
        st.integers(1, 5),
        pinpoints,
        st.integers(1, 9),
    )


def tokens_or_skip(height: int, width: int, geometry: Geometry) -> ImageTokens:
    try:
        return image_tokens(height, width, geometry)
    except DataError:  # transformers fails on these too: test_too_thin
        assume(False)
        raise


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 3000), st.integers(1, 3000), geometries())
@example(8000, 20, REAL)
@example(480, 640, REAL)
@example(2304, 2304, REAL)
def test_count_is_the_one_of_transformers(height: int, width: int, geometry: Geometry) -> None:
    side = geometry.image_size
    processor = LlavaOnevisionProcessor.__new__(
        LlavaOnevisionProcessor
    )  # its constructor wants torchvision, for videos
    processor.image_processor = LlavaOnevisionImageProcessorPil(
        image_grid_pinpoints=list(geometry.image_grid_pinpoints)
    )
    processor.num_image_tokens = geometry.num_patches
    processor.vision_aspect_ratio = f"anyres_max_{geometry.max_patches}"
    ours = tokens_or_skip(height, width, geometry)
    assert len(ours.index) == processor._get_number_of_features(height, width, side, side)


@pytest.fixture(scope="module")
def torch_model() -> LlavaOnevisionModel:
    text = {"model_type": "qwen2", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
    text |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 1, "image_size": 28, "patch_size": 14, "vision_use_head": False}
    return LlavaOnevisionModel(LlavaOnevisionConfig(text_config=text, vision_config=vision))


@settings(deadline=None, max_examples=150)
@given(height=st.integers(1, 1500), width=st.integers(1, 1500), geometry=geometries(), seed=st.integers(0, 99))
@example(height=700, width=690, geometry=Geometry(28, 14, ((168, 168),), 9), seed=0)  # scaled down: 36 tiles, 9 allowed
@example(height=300, width=900, geometry=REAL, seed=0)
def test_gather_is_the_packing_of_transformers(
    torch_model: LlavaOnevisionModel, height: int, width: int, geometry: Geometry, seed: int
) -> None:
    ours = tokens_or_skip(height, width, geometry)
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(ours.num_tiles, geometry.num_patches, 8)).astype(np.float32)
    newline = generator.normal(size=8).astype(np.float32)

    torch_model.config.vision_config.image_size = geometry.image_size
    torch_model.config.image_grid_pinpoints = [list(point) for point in geometry.image_grid_pinpoints]
    (expected,), _ = torch_model.pack_image_features(
        [torch.tensor(features)], [[height, width]], torch.tensor(newline), f"anyres_max_{geometry.max_patches}"
    )

    rows = np.concatenate([features.reshape(-1, 8), newline[None]])
    assert NEWLINE == -1  # so that it indexes the last row here
    packed = (rows[ours.index] * ours.weight[:, :, None]).sum(axis=1)
    np.testing.assert_allclose(packed, expected.numpy(), atol=1e-5)
    assert ours.index.shape[1] in (1, 4)
    np.testing.assert_allclose(ours.weight.sum(axis=1), 1, atol=1e-6)


def test_known_counts() -> None:
    # 729 of the thumbnail, then the rows of the fitted picture with a newline each; 9 tiles' worth is 81 x 81.
    square = image_tokens(384, 384, REAL)
    assert (len(square.index), square.num_tiles, square.index.shape[1]) == (729 + 27 * 28, 2, 1)
    huge = image_tokens(2304, 2304, REAL)
    assert (len(huge.index), huge.num_tiles, huge.index.shape[1]) == (729 + 81 * 82, 37, 4)
    with pytest.raises(ValueError, match="read-only"):
        huge.index[0] = 0


@pytest.mark.parametrize(
    ("height", "width", "geometry"), [(1, 9000, REAL), (2, 2000, Geometry(28, 14, ((28, 168),), 1))]
)
def test_too_thin(height: int, width: int, geometry: Geometry) -> None:
    with pytest.raises(DataError, match=f"height {height} and width {width} is too thin"):
        image_tokens(height, width, geometry)


def architecture(image_size: int, **changes: object) -> OurConfig:
    """A model's configuration, from what its file holds on pictures."""
    vision = {"model_type": "siglip_vision_model", "image_size": image_size, "patch_size": 14}
    config = model_config({"model_type": "llava_onevision", "text_config": {}, "vision_config": vision, **changes})
    assert isinstance(config, OurConfig)
    return config


def test_geometry_from_config() -> None:
    assert Geometry.from_config(architecture(28, image_grid_pinpoints=tiny_data.PINPOINTS)) == GEOMETRY
    default = Geometry.from_config(architecture(384))
    assert default == REAL
    assert [list(point) for point in default.image_grid_pinpoints] == LlavaOnevisionConfig().image_grid_pinpoints


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"vision_aspect_ratio": "pad"}, r"vision_aspect_ratio is 'pad'; only 'anyres_max_N' is supported"),
        (
            {"image_grid_pinpoints": [[28, 30]]},
            r"image_grid_pinpoints has \[28, 30\]; every height and width must be a",
        ),
    ],
)
def test_geometry_errors(change: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=rf"^some/config.json: .*{text}"):
        Geometry.from_config(architecture(28, **change), "some/config.json")


def test_processor_is_checked_against_the_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has neither preprocessor_config.json nor an image_processor in"):
        load_anyres_pictures(tmp_path, GEOMETRY)
    folder = tiny_data.checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=r"has image_grid_pinpoints = .* but config.json has \(\(28, 28\),\)"):
        load_anyres_pictures(folder, Geometry(28, 14, ((28, 28),), 9))
    with pytest.raises(ConfigError, match=r"has size = \(28, 28\), but config.json has \(14, 14\)"):
        load_anyres_pictures(folder, Geometry(14, 14, GEOMETRY.image_grid_pinpoints, 9))
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"preprocessor_config.json: not JSON at line 1, column 2"):
        load_anyres_pictures(folder, GEOMETRY)


def test_processor_nested_in_processor_config(tmp_path: Path) -> None:
    folder = tiny_data.checkpoint(tmp_path)
    values = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": values}))
    assert load_anyres_pictures(folder, GEOMETRY).geometry == GEOMETRY


def test_pixels_are_the_thumbnail_and_the_tiles(tmp_path: Path) -> None:
    pictures = load_anyres_pictures(tiny_data.checkpoint(tmp_path), GEOMETRY)
    image = load_rgb(save_picture(tmp_path / "a.png", 56, 56))
    pixels = pictures.tiles([image])["pixels"]
    assert (pixels.shape, pixels.dtype) == ((5, 3, 28, 28), np.float32)
    assert image_tokens(56, 56, GEOMETRY).num_tiles == 5
    processor = LlavaOnevisionImageProcessorPil()
    raw = (np.asarray(image, np.float32) / 255 - processor.image_mean) / processor.image_std
    np.testing.assert_allclose(pixels[2], raw[:28, 28:].transpose(2, 0, 1), atol=1e-5)  # top right
