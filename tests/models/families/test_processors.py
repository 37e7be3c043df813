"""Image processor files as versions of transformers wrote them, against transformers' own processors."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from benchmarks.compat.adapter_bases import BASES
from mars_jax.errors import ConfigError
from mars_jax.models.families.registry import family_of, model_config

CLIP, SIGLIP, DINOV2, ONEVISION, QWEN = BASES
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8))


def load(folder, name, change, file="preprocessor_config.json"):
    """The pictures of a family whose processor file has some keys changed; None takes a key away."""
    settings, processor = BASES[name]
    values = {key: value for key, value in {**processor, **change}.items() if value is not None}
    document = {"image_processor": values} if file == "processor_config.json" else values
    (folder / file).write_text(json.dumps(document))
    config = model_config(settings)
    return family_of(config).load_pictures(folder, config, None)


@pytest.mark.parametrize(
    "change",
    [
        {"size": {"min_pixels": 3136, "max_pixels": 15680}},
        {"size": {"min_pixels": 784, "max_pixels": 784}, "min_pixels": 3136, "max_pixels": 15680},
        {"size": None, "min_pixels": 3136, "max_pixels": 15680},
        {"size": {"shortest_edge": 784, "longest_edge": 1568}, "min_pixels": 3136, "max_pixels": 15680},
        {"size": {"shortest_edge": 3136, "longest_edge": 15680}, "image_processor_type": "Qwen2_5_VLImageProcessor"},
        {"size": {"shortest_edge": 3136, "longest_edge": 15680}, "image_processor_type": "Qwen2VLImageProcessorFast"},
        {"size": {"shortest_edge": 3136, "longest_edge": 15680}, "image_processor_type": None},
    ],
    ids=["saved by 4.45", "both", "of the hub", "top level first", "early name", "fast", "no name"],
)
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_bounds_of_pixels_in_every_spelling_are_the_same(change, file, tmp_path):
    pictures = load(tmp_path, QWEN, change, file)
    size = {"shortest_edge": 3136, "longest_edge": 15680}
    theirs = Qwen2VLImageProcessorPil(size=size, patch_size=14, merge_size=2, temporal_patch_size=2)
    for picture in (PICTURE, PICTURE.resize((30, 20)), PICTURE.resize((300, 200))):
        expected = theirs([picture], return_tensors="np")
        found = pictures.torch_inputs([[picture]])
        np.testing.assert_array_equal(found["pixel_values"], expected["pixel_values"])
        (tokens,) = pictures.tokens([(picture.height, picture.width)])
        assert len(tokens.index) * 4 == len(expected["pixel_values"])


@pytest.mark.parametrize(
    "change",
    [
        {"size": 28, "crop_size": 28, "image_processor_type": None, "feature_extractor_type": "CLIPFeatureExtractor"},
        {"size": [28, 28], "crop_size": [28, 28], "image_processor_type": "CLIPImageProcessorFast"},
        {
            "size": {"shortest_edge": 28, "longest_edge": 40},
            "crop_size": 28,
            "image_processor_type": "CLIPImageProcessorPil",
        },
        {"size": {"height": 28, "width": 28}, "do_center_crop": False, "image_mean": 0.5, "image_std": [0.3, 0.2, 0.1]},
        {"do_resize": None, "do_rescale": None, "resample": 2, "do_convert_rgb": True, "data_format": "channels_first"},
        {"do_normalize": False, "rescale_factor": 0.5, "unknown_key": {"a": [1]}, "preprocess": 5, "_preprocess": "x"},
    ],
    ids=["numbers", "lists", "edges", "no crop", "nulls", "other scale"],
)
def test_sides_in_every_spelling_give_the_pictures_of_transformers(change, tmp_path):
    pictures = load(tmp_path, CLIP, change)
    known = CLIPImageProcessorPil.valid_kwargs.__annotations__
    settings = {key: value for key, value in {**BASES[CLIP][1], **change}.items() if key in known and value is not None}
    expected = CLIPImageProcessorPil(**settings)([PICTURE], return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(pictures.tiles([PICTURE])["pixels"], np.asarray(expected, np.float32))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (QWEN, {"size": {"shortest_edge": 3136, "longest_edge": 784}}, "size is 3136 to 784 pixels; shortest_edge and"),
        (QWEN, {"size": {"shortest_edge": 3136}}, "size is 3136 to None pixels; shortest_edge and longest_edge"),
        (QWEN, {"size": {"height": 28, "width": 28}}, "size is None to None pixels"),
        (QWEN, {"size": 28}, "size is 28; an object expected"),
        (QWEN, {"do_resize": False}, "do_resize is false; this version supports true"),
        (QWEN, {"patch_size": "14"}, "patch_size is '14'; an integer expected"),
        (
            QWEN,
            {"image_processor_type": "CLIPImageProcessor"},
            "is 'CLIPImageProcessor'; Qwen2VLImageProcessor, Qwen2_5",
        ),
        (QWEN, {"image_processor_type": 5}, "image_processor_type is 5; a text expected"),
        (CLIP, {"size": "224"}, "size is '224'; an integer or a list or an object expected"),
        (
            CLIP,
            {"size": {"height": 28}},
            r"size is \{'height': 28\}; .*one of these combinations of keys is expected: hei",
        ),
        (CLIP, {"size": {"shortest_edge": 0}}, "size.shortest_edge is 0; 1 or more"),
        (CLIP, {"size": {"shortest_edge": 10**9}}, "size.shortest_edge is 1000000000; 4096 or less"),
        (CLIP, {"crop_size": [28]}, r"crop_size is \[28\]; .*2 or more items"),
        (CLIP, {"image_mean": [0.5]}, r"image_mean is \[0.5\]; .*3 or more items"),
        (CLIP, {"image_std": [0, 1, 1]}, "image_std.0 is 0; more than 0"),
        (CLIP, {"image_mean": ["a", 0, 0]}, "image_mean.0 is 'a'; a number expected"),
        (CLIP, {"rescale_factor": float("nan")}, "rescale_factor is nan; a finite number expected"),
        (CLIP, {"resample": 99}, "resample is 99; 5 or less"),
        (CLIP, {"do_center_crop": "yes"}, "do_center_crop is 'yes'; true or false expected"),
        (CLIP, {"use_square_size": True}, "use_square_size is true; this version supports false"),
        (
            CLIP,
            {"data_format": "channels_last"},
            "data_format is 'channels_last'; this version supports 'channels_first'",
        ),
        (
            CLIP,
            {"size": {"longest_edge": 28}},
            r"the image processor cannot be used with its settings \(ValueError: Size",
        ),
        (ONEVISION, {"image_grid_pinpoints": 5}, "image_grid_pinpoints is 5; a list expected"),
        (ONEVISION, {"image_processor_type": "SiglipImageProcessor"}, "'SiglipImageProcessor'; LlavaOnevisionImagePro"),
        (ONEVISION, {"size": {"shortest_edge": 14}}, r"the image processor has size = \(14, 14\), but config.json has"),
        (ONEVISION, {"crop_size": 14}, r"has a number of tiles \(crop_size\) = 5, but config.json has 2"),
    ],
)
def test_a_setting_that_is_not_possible_is_refused_at_its_key(name, change, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, name, change)


def test_nested_settings_of_the_newer_file_come_first(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert load(tmp_path, QWEN, {}, "processor_config.json").geometry.min_pixels == 784
    (tmp_path / "processor_config.json").write_text('{"image_processor": [1]}')
    config = model_config(BASES[QWEN][0])
    with pytest.raises(ConfigError, match=r"processor_config.json: image_processor is \[1\]; an object expected"):
        family_of(config).load_pictures(tmp_path, config, None)
    (tmp_path / "processor_config.json").write_text('{"processor_class": "LlavaProcessor"}')
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(
        ConfigError, match=r"has neither preprocessor_config.json nor an image_processor in processor_config"
    ):
        family_of(config).load_pictures(tmp_path, config, None)
