"""Hugging Face checkpoints in (safetensors to parameters), PEFT adapters and merged checkpoints out."""
