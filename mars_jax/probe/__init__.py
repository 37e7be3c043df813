"""The probe engine: the plan of lanes, the compiled chunk, and the loop that drives it."""
