"""The training engine: many lanes in one compiled program."""
