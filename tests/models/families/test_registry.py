"""One suite over every model family: what the rest of the package asks of it holds, and outsiders can add one."""

import json
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from PIL import Image

from benchmarks.compat.adapter_bases import BASES
from mars_jax.adapters.targets import find_targets
from mars_jax.config.adapted import DEFAULT_MODULES
from mars_jax.data.preprocessor import load_preprocessor
from mars_jax.errors import ConfigError
from mars_jax.models.families.llava.config import LlavaConfig
from mars_jax.models.families.llava.family import LLAVA
from mars_jax.models.families.llava.model import Llava
from mars_jax.models.families.llava.table import llava_table
from mars_jax.models.families.registry import (
    FAMILIES,
    build_model,
    checkpoint_table,
    family_of,
    model_config,
    parameters,
)
from mars_jax.models.families.tables import Row
from mars_jax.models.flops import BatchShape, evaluation_flops, lane_step_flops
from mars_jax.models.memory import activation_bytes
from mars_jax.models.shardings import base_shardings
from mars_jax.runtime.sharding import make_mesh
from mars_jax.runtime.trees import flatten, unflatten
from tests.helpers import tiny_data

RANKS = {"vision": 2, "projector": 3, "llm": 4}
SIZES = {"batch_size": 2, "tokens": 20, "tiles": 4}


def checkpoint(folder, config_json, processor):
    """The files of a checkpoint that have no weights."""
    tiny_data.tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config_json))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(params=BASES)
def config(request):
    """The tiny configuration of every family, and of every kind of encoder that it has."""
    return model_config(BASES[request.param][0])


@pytest.fixture(params=BASES)
def folder(request, tmp_path):
    """The checkpoint folders of the same."""
    return checkpoint(tmp_path, *BASES[request.param])


def load(folder):
    """The configuration and the pictures of a checkpoint folder."""
    return model_config(json.loads((folder / "config.json").read_text())), load_preprocessor(folder).pictures


def abstract_batch(config, pictures):
    """A batch [2, ...] of text alone, with padding where pictures would be."""
    tiles = {name: np.stack([array, array]) for name, array in pictures.padding(SIZES["tiles"]).items()}
    length, axes = SIZES["tokens"], len(config.text.mrope_section or (1,))
    positions = {"positions": np.zeros((2, length, axes), np.int32)} if axes > 1 else {}
    return {
        **tiles,
        **positions,
        "tokens": np.zeros((2, length), np.int32),
        "image_index": np.full((2, length, 1), -1, np.int32),
        "image_weight": np.zeros((2, length, 1), np.float32),
        "targets": np.zeros((2, 3), np.int32),
        "target_positions": np.zeros((2, 3), np.int32),
        "target_weights": np.ones((2, 3), np.float32),
    }


def initial_shapes(config, pictures):
    """Path -> shape of what the Linen module initialises."""
    batch, key = abstract_batch(config, pictures), jax.random.key(0)
    params = jax.eval_shape(lambda: build_model(config).init(key, batch))["params"]
    return {path: leaf.shape for path, leaf in flatten(params).items()}


def default_targets(config):
    base = unflatten({p.path: jax.ShapeDtypeStruct(p.shape, np.float32) for p in parameters(config)})
    return find_targets(base, {name: module["targets"] for name, module in DEFAULT_MODULES.items()})


# Every family.


def test_every_family_has_an_example_and_the_name_of_its_configurations():
    found = {config_json["model_type"] for config_json, _ in BASES.values()}
    assert found == set(FAMILIES.names)
    assert all(family.name == name for name, family in zip(FAMILIES.names, FAMILIES, strict=True))


def test_a_configuration_finds_the_family_that_read_it(config):
    family = family_of(config)
    assert FAMILIES[config.family] is family
    assert type(build_model(config)) is family.model
    assert build_model(config, "full").remat == "full"
    assert hash(config) == hash(replace(config))


def test_parameters_are_those_that_the_module_initialises(folder):
    config, pictures = load(folder)
    assert {p.path: p.shape for p in parameters(config)} == initial_shapes(config, pictures)


def test_keys_and_paths_of_the_table_are_unique_and_the_hubs_own(config):
    table = checkpoint_table(config)
    for whole in (config, config.with_all_vision_layers()):
        found = table.parameters(whole)
        keys = [key for parameter in found for key in parameter.keys]
        assert len(keys) == len(set(keys))
        assert len(found) == len({parameter.path for parameter in found})
        for key in keys:
            assert table.hub_key(key) == key
            assert table.hub_key(table.memory_key(key)) == key
    assert not any(table.unused(key, config) for parameter in parameters(config) for key in parameter.keys)


def test_layers_that_are_stored_and_never_read_are_known_to_the_table(config):
    whole, table = config.with_all_vision_layers(), checkpoint_table(config)
    assert whole.num_vision_layers_used == whole.vision.num_layers == config.vision.num_layers
    used = {key for parameter in parameters(config) for key in parameter.keys}
    stored = {key for parameter in parameters(whole) for key in parameter.keys}
    assert used <= stored
    assert all(table.unused(key, config) for key in stored - used)


def test_settings_without_unused_layers_describe_the_same_model(folder):
    settings = json.loads((folder / "config.json").read_text())
    config = model_config(settings)
    for key, value in config.trimmed_settings.items():
        part, _, name = key.rpartition(".")
        (settings[part] if part else settings)[name] = value
    trimmed = model_config(settings)
    assert trimmed.vision.num_layers == trimmed.num_vision_layers_used == config.num_vision_layers_used
    assert parameters(trimmed) == parameters(config)


def test_every_linear_of_the_table_is_a_default_target(config):
    targets = default_targets(config)
    assert set(targets) == set(checkpoint_table(config).linears)
    assert {target.module for target in targets.values()} == set(RANKS)


def test_pictures_make_the_inputs_of_the_encoder_and_nothing_else(folder):
    config, pictures = load(folder)
    names = family_of(config).encoder_inputs
    assert load_preprocessor(folder).encoder_inputs == names
    image = Image.fromarray(np.zeros((60, 90, 3), np.uint8))
    made, spare = pictures.tiles([image]), pictures.padding(2)
    assert list(made) == list(spare) == list(names)
    assert "pixels" in names
    (tokens,) = pictures.tokens([(60, 90)])
    for name in names:
        assert len(made[name]) == tokens.num_tiles
        assert spare[name].shape == (2, *made[name].shape[1:])
        assert spare[name].dtype == made[name].dtype
    assert tokens.index.max() < tokens.num_tiles * pictures.rows_per_tile


def test_the_encoder_gives_as_many_rows_as_its_configuration_says(folder):
    config, pictures = load(folder)
    assert pictures.rows_per_tile * config.vision.group == config.vision.num_positions
    model, batch = build_model(config), abstract_batch(config, pictures)
    params = unflatten({p.path: jax.ShapeDtypeStruct(p.shape, np.float32) for p in parameters(config)})
    encoded = jax.eval_shape(lambda base: model.apply({"params": base}, batch, method="encode"), params)
    assert encoded.shape == (2, SIZES["tiles"], config.vision.num_positions, config.feature_width)


def test_every_encoder_computes_in_bfloat16(folder):
    """Tests run under strict promotion: a float32 number beside a bfloat16 one would be refused."""
    config, pictures = load(folder)
    model, batch = build_model(config), abstract_batch(config, pictures)
    params = unflatten({p.path: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16) for p in parameters(config)})
    loss, _ = jax.eval_shape(lambda base: model.apply({"params": base}, batch, method="loss"), params)
    batch["pixels"] = batch["pixels"].astype(jnp.bfloat16)
    encoded = jax.eval_shape(lambda base: model.apply({"params": base}, batch, method="encode"), params)
    assert (loss.dtype, encoded.dtype) == (jnp.float32, jnp.bfloat16)


def test_a_limit_of_pixels_is_followed_or_refused_by_name(folder):
    config, pictures = load(folder)
    limit, picture = 28 * 28 * 4, [(400, 600)]
    try:
        limited, refusal = load_preprocessor(folder, max_pixels=limit).pictures, ""
    except ConfigError as error:
        limited, refusal = None, str(error)
    if limited:
        assert len(limited.tokens(picture)[0].index) < len(pictures.tokens(picture)[0].index)
    else:
        assert refusal == (
            f"data.max_pixels is {limit}, but {folder / 'config.json'} is of {config.family}, whose tiles have one "
            "size whatever the picture's. Leave it out."
        )


def test_sequences_of_every_encoder_layer_hold_all_its_tokens(config):
    for layer in range(config.vision.num_layers):
        for tiles in (1, 3):
            count, length = config.vision.sequences(layer, tiles)
            assert count * length == tiles * config.vision.num_positions


def test_flops_and_memory_are_positive_and_grow_with_pictures(config):
    def prices(tiles):
        sizes, targets = SIZES | {"tiles": tiles}, default_targets(config)
        step = lane_step_flops(config, targets, RANKS, BatchShape(**sizes, supervised=3))
        kept = [activation_bytes(config, RANKS, remat=remat, **sizes) for remat in ("none", "attention", "full")]
        assert min(step.encoder, step.projector, step.llm, step.attention, step.adapters, step.head) > 0
        assert kept[0] > kept[1] > kept[2] > 0
        return step.total, evaluation_flops(config, targets, RANKS, BatchShape(**sizes, supervised=3)).total, *kept

    few, many = prices(2), prices(5)
    assert all(less < more for less, more in zip(few, many, strict=True))
    assert few[0] > few[1]


def test_shardings_cover_every_parameter_and_split_every_linear(config):
    mesh = make_mesh({"fsdp": 2, "data": -1})
    shardings = flatten(base_shardings(config, mesh))
    assert shardings.keys() == {p.path for p in parameters(config)}
    linears = [f"{path}/kernel" for path in checkpoint_table(config).linears]
    assert not any(shardings[path].is_fully_replicated for path in linears)


def test_another_family_is_refused_with_those_that_there_are():
    with pytest.raises(ConfigError) as refusal:
        model_config({"model_type": "llava_next"}, "some/config.json")
    assert str(refusal.value) == (
        "some/config.json: model_type is 'llava_next', which is not supported. Supported families: llava, "
        "llava_onevision, qwen2_5_vl. Point model.checkpoint at a checkpoint of one of them."
    )


# A family from outside.


@dataclass(frozen=True, slots=True)
class ToyConfig(LlavaConfig):
    """A LLaVA whose features get a bias after the projector."""

    family: ClassVar[str] = "toy"


class Toy(Llava):
    """The model of `ToyConfig`."""

    def setup(self):
        super().setup()
        self.feature_bias = self.param("feature_bias", jax.nn.initializers.zeros, (self.config.text.hidden_size,))

    def image_features(self, encoded):
        return super().image_features(encoded) + self.feature_bias[None, None]


def read_toy(config, source):
    llava = LLAVA.read_config(config, source)
    return ToyConfig(**{field.name: getattr(llava, field.name) for field in fields(llava)})


def toy_table(config):
    table = llava_table(config)
    return replace(table, rows=(*table.rows, Row("feature_bias", "feature_bias", ("text",))))


TOY = replace(
    LLAVA,
    name="toy",
    read_config=read_toy,
    model=Toy,
    table=toy_table,
    shardings=((r"feature_bias", ("tensor",)),),
)


def test_one_registration_from_outside_reaches_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(FAMILIES, "_members", dict(FAMILIES._members))
    settings, processor = BASES["LLaVA, CLIP, Llama"]
    settings = settings | {"model_type": "toy"}
    with pytest.raises(ConfigError, match="model_type is 'toy', which is not supported"):
        model_config(settings)

    assert FAMILIES.register(TOY) is TOY
    config, pictures = load(checkpoint(tmp_path, settings, processor))
    assert isinstance(config, ToyConfig)
    assert isinstance(build_model(config), Toy)
    shapes = initial_shapes(config, pictures)
    assert {p.path: p.shape for p in parameters(config)} == shapes
    assert shapes["feature_bias"] == (config.text.hidden_size,)
    assert lane_step_flops(config, default_targets(config), RANKS, BatchShape(**SIZES, supervised=3)).total > 0
    assert activation_bytes(config, RANKS, **SIZES) > 0
    shardings = base_shardings(config, make_mesh({"tensor": 2, "data": -1}))
    assert shardings["feature_bias"].spec == P("tensor")
    with pytest.raises(ConfigError, match=r"config\.json is of toy, whose tiles have one size"):
        load_preprocessor(tmp_path, max_pixels=99)
    with pytest.raises(ConfigError, match="Supported families: llava, llava_onevision, qwen2_5_vl, toy"):
        model_config({"model_type": "other"})


def test_a_name_is_taken_by_one_family_only(monkeypatch):
    monkeypatch.setattr(FAMILIES, "_members", dict(FAMILIES._members))
    with pytest.raises(ConfigError, match="there is a model family named 'llava' already"):
        FAMILIES.register(replace(TOY, name="llava"))
