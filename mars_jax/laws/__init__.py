"""Law-C and Law-P: fits, balance and convergence rules. Usable without the rest of the package."""
