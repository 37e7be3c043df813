"""Memory, beside PEFT and by the compilers of accelerators."""
