"""Data formats of samples, one file each."""
