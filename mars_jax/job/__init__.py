"""One run: its data, base, engines, directory and phases."""
