"""Convergence rules, one a file."""
