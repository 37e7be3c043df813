"""Flax Linen models: one file per architecture part, and one per family that composes them."""
