"""The least record of a lane, for tests of what counts lanes."""

LANE = {
    **{"lane": "vision1-D8-s0", "ranks": {"vision": 1}, "num_samples": 8, "steps": 4, "convergence_steps": {}},
    **{"censored": {}, "best_loss": 1.0, "status": "horizon"},
}
