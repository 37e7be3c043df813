"""A Law-P that tests plant: losses whose exponents are known."""

ALPHA, BETA = {"vision": 0.1, "llm": 0.25}, 0.45
PLANTED_RANKS = [(4, 4), (4, 64), (64, 4), (64, 64), (16, 16), (8, 32)]


def planted_loss(vision, llm, samples, over_fit=0.0):
    power = 30.0 * vision ** -ALPHA["vision"] * llm ** -ALPHA["llm"] * samples**-BETA + 0.8
    return power + over_fit * (vision / 16) ** 0.3 * (llm / 16) ** 0.8 * (samples / 1024) ** 1.2
