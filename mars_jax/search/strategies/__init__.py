"""Strategies: how ranks and rates are chosen, one a file."""
