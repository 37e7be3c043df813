"""This process and machine: devices, sharding, checkpoints, files, progress."""
