"""Measures the seconds of a step or of an image, from the first of them."""

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
    """

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._began = clock()
        self._calls = 0
        self._first: tuple[int, float] | None = None
        self._is_done = False
        self.start_seconds = 0.0

    def pause(self, seconds: float) -> None:
        """Takes out seconds that were spent on something else since the last update."""
        if self._first is not None:
            count, began = self._first
            self._first = count, began + seconds

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
        if self._first is None:
            if self._calls == WARM_UP_CALLS:
                self._first = count, now
            return None
        first, began = self._first
        enough = self._calls - WARM_UP_CALLS >= MEASURED_CALLS or now - began >= MEASURED_SECONDS
        return (now - began) / (count - first) if enough or is_last else None

    def stop(self) -> None:
        """Ends the measurement: `update` returns None from now on."""
        self._is_done = True
