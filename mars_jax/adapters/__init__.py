"""Adapter methods, the linears they adapt, and adapter files."""
