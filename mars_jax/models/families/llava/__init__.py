"""LLaVA-1.5 and LLaVA-OneVision."""
