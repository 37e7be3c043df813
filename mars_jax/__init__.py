"""mars_jax: find the LoRA ranks of a multimodal LLM's modules from short probes, then fine-tune with them.

This file only names the version: import the parts that you need (`from mars_jax import lora`), each stands alone.
"""

__version__ = "0.1.0"
