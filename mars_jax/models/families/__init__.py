"""Model families, one a folder."""
