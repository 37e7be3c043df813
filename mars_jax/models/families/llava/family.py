"""The families LLaVA-1.5 (arXiv 2310.03744) and LLaVA-OneVision (arXiv 2408.03326)."""

from mars_jax.models.families.base import Family
from mars_jax.models.families.llava.anyres import load_onevision_pictures
from mars_jax.models.families.llava.config import LlavaConfig, LlavaOnevisionConfig, read_llava, read_llava_onevision
from mars_jax.models.families.llava.model import Llava, LlavaOnevision
from mars_jax.models.families.llava.table import ONEVISION, llava_table
from mars_jax.models.families.llava.tiles import load_tile_pictures

LLAVA: Family[LlavaConfig] = Family(
    name="llava",
    read_config=read_llava,
    model=Llava,
    table=llava_table,
    load_pictures=load_tile_pictures,
    encoder_inputs=("pixels",),
)

LLAVA_ONEVISION: Family[LlavaOnevisionConfig] = Family(
    name="llava_onevision",
    read_config=read_llava_onevision,
    model=LlavaOnevision,
    table=lambda config: ONEVISION,
    load_pictures=load_onevision_pictures,
    encoder_inputs=("pixels",),
    shardings=((r"image_newline", (None,)),),
)
