"""Tiny LLaVAs of transformers, of every encoder and decoder that ours takes, as folders of checkpoints."""

from pathlib import Path

import torch
import transformers
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.helpers import tiny_data

VISION = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
CROP = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
}


class Kind:
    """A combination of parts, as transformers' configuration and the encoder's image processor."""

    def __init__(self, vision, text, processor, **top):
        self.vision, self.text, self.processor, self.top = vision, text, processor, top

    def checkpoint(self, directory: Path) -> transformers.LlavaForConditionalGeneration:
        """A random model, and its folder."""
        config = transformers.LlavaConfig(
            vision_config=self.vision, text_config=self.text, image_token_index=tiny_data.IMAGE_TOKEN_ID, **self.top
        )
        config._attn_implementation = "eager"
        model = transformers.LlavaForConditionalGeneration(config).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(0.0, 0.15, generator=generator)
                if ("norm" in name or "lambda" in name) and not name.endswith("bias"):
                    parameter.add_(1.0)
        model.save_pretrained(directory)
        tiny_data.tokenizer().save_pretrained(directory)
        self.processor.save_pretrained(directory)
        return model


CLIP = transformers.CLIPVisionConfig(**VISION, intermediate_size=40)
SIGLIP = transformers.SiglipVisionConfig(**VISION, intermediate_size=40, vision_use_head=False)
DINOV2 = transformers.Dinov2Config(**VISION, mlp_ratio=2)
KINDS = {
    "clip, llama": Kind(CLIP, transformers.LlamaConfig(**TEXT), CLIPImageProcessorPil(**CROP)),
    "dinov2, tied llama": Kind(
        DINOV2,
        transformers.LlamaConfig(
            **TEXT, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e5}
        ),
        BitImageProcessorPil(**CROP),
        tie_word_embeddings=True,
    ),
    "several states of siglip, qwen2": Kind(
        SIGLIP,
        transformers.Qwen2Config(**TEXT),
        SiglipImageProcessorPil(size={"height": 28, "width": 28}),
        vision_feature_layer=[-2, 1, 0],
        vision_feature_select_strategy="full",
        multimodal_projector_bias=False,
    ),
}
