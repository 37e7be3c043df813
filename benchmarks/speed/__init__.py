"""Time, FLOPs and compiles, beside PEFT."""
