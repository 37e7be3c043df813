"""Flax Linen models: a file for each part of an architecture, and a folder for each family that composes them."""
