"""Search for ranks: probes, strategies, final runs."""
