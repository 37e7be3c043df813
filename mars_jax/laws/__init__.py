"""Law-C and Law-P: fits, balance, convergence rules. Stands alone."""
