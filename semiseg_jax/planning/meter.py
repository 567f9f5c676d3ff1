"""Measures the seconds of a step or of an image, from the first of them."""

import itertools
import statistics
from collections.abc import Callable

# A rate is measured over so many steps or batches, or over so many seconds.
MEASURED_CALLS = 10
MEASURED_SECONDS = 20.0
# Steps or batches that are not measured at the beginning of a part: the program is compiled in the
# first, and the next finds a batch that the input pipeline had made meanwhile.
WARM_UP_CALLS = 2


class Meter:
    """Measures the seconds of the first steps, or of the first images, of a part of a run.

    Attributes:
        start_seconds: from the beginning of the part to its first result.

    Args:
        clock: returns seconds.
        takes_median: the median of the calls is returned instead of their mean. For images of
            several sizes, whose programs are compiled when the first image of a size comes.
    """

    def __init__(self, clock: Callable[[], float], takes_median: bool = False):
        self._clock = clock
        self._takes_median = takes_median
        self._began = clock()
        self._calls = 0
        # (count, time) of the calls after the warm-up.
        self._times: list[tuple[int, float]] = []
        self._is_done = False
        self.start_seconds = 0.0

    def pause(self, seconds: float) -> None:
        """Takes out seconds that were spent on something else since the last update."""
        self._times = [(count, time + seconds) for count, time in self._times]

    def update(self, count: int, is_last: bool = False) -> float | None:
        """Returns the seconds of each step or image, as soon as enough of them were measured.

        Args:
            count: how many there have been.
            is_last: nothing follows, so that less is enough.
        """
        now = self._clock()
        self._calls += 1
        if self._calls == 1:
            self.start_seconds = now - self._began
        if self._is_done:
            return None
        if self._calls < WARM_UP_CALLS:
            return None
        self._times.append((count, now))
        (first, began), num_measured = self._times[0], len(self._times) - 1
        enough = num_measured >= MEASURED_CALLS or now - began >= MEASURED_SECONDS
        if num_measured == 0 or not (enough or is_last):
            return None
        if not self._takes_median:
            return (now - began) / (count - first)
        pairs = itertools.pairwise(self._times)
        return statistics.median((b[1] - a[1]) / (b[0] - a[0]) for a, b in pairs)

    def stop(self) -> None:
        """Ends the measurement: `update` returns None from now on."""
        self._is_done = True
