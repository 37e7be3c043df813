"""Model families, one folder each, listed in `registry`."""
