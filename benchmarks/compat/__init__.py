"""Adapters across versions of transformers and PEFT; kills."""
