"""The family Qwen2.5-VL (arXiv 2502.13923)."""

from mars_jax.models.families.base import Family
from mars_jax.models.families.pictures import PICTURE_NUMBERS
from mars_jax.models.families.qwen2_5_vl.config import Qwen25VlConfig, read_qwen2_5_vl
from mars_jax.models.families.qwen2_5_vl.model import Qwen25Vl
from mars_jax.models.families.qwen2_5_vl.table import TABLE
from mars_jax.models.families.qwen2_5_vl.windows import load_window_pictures

FAMILY: Family[Qwen25VlConfig] = Family(
    name="qwen2_5_vl",
    read_config=read_qwen2_5_vl,
    model=Qwen25Vl,
    table=lambda config: TABLE,
    load_pictures=load_window_pictures,
    encoder_inputs=("pixels", "patch_positions", PICTURE_NUMBERS),
)
