"""Measurements, one command each: `python -m benchmarks.FOLDER.NAME`."""
