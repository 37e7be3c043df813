"""A trainer that replays recorded curves: strategies are tried in seconds on lanes that ran once."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from mars_jax.errors import ConfigError
from mars_jax.lanes.lane import Ranks
from mars_jax.lanes.stopping import StoppingRule, replay
from mars_jax.laws.records import LaneRecord
from mars_jax.search.trainer import Configuration, Curve


class RecordedTrainer:
    """Replays final runs and probes that were recorded, and keeps account of what a strategy took of them.

    Attributes:
        trained: the curves that were asked for, as far as the stopping rules let them run, in that order.
        probed: the records of probes that were asked for.
    """

    def __init__(self, curves: Iterable[Curve], records: Sequence[LaneRecord] = ()) -> None:
        """Of final runs, each run to its end, and of probes."""
        self._curves = {curve.configuration.name: curve for curve in curves}
        self._records = records
        self.trained: list[Curve] = []
        self.probed: list[LaneRecord] = []

    def probe(self, configurations: Sequence[Ranks], sizes: Sequence[int]) -> list[LaneRecord]:
        """See `Trainer`."""
        found = [r for r in self._records if r.num_samples in sizes and r.ranks in configurations]
        self.probed += found
        return found

    def train(self, configurations: Sequence[Configuration], stopping: StoppingRule) -> list[Curve]:
        """See `Trainer`.

        Raises:
            ConfigError: a configuration that was not recorded.
        """
        missing = [c.name for c in configurations if c.name not in self._curves]
        if missing:
            raise ConfigError(
                f"no final run of {', '.join(missing)} was recorded; there are {', '.join(self._curves)}. Search a "
                "space of recorded configurations, or record more."
            )
        curves = [self._curves[configuration.name] for configuration in configurations]
        seen = replay([curve.points for curve in curves], stopping)
        found = [replace(curve, points=tuple(points)) for curve, points in zip(curves, seen, strict=True)]
        self.trained += found
        return found
