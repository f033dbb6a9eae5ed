"""The time that training takes: how much of it waits for data, and what is done in it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds of training steps; evaluation and the writing of checkpoints are left out.

    Attributes:
        seconds: from the start of the run, earlier parts of a continued one included, to the last lap.
        tokens: trained on until now.

    A lap ends when the loss has been read, so that all work it counts is done, also on a device that lags behind.
    """

    def __init__(self, peak: float | None = None) -> None:
        """peak: operations a second of which the share is to be told."""
        self.seconds, self.tokens, self.peak = 0.0, 0, peak
        self.start()

    def start(self) -> None:
        """From here on; what came before, such as loading, does not count."""
        self._since, self._lap = time.perf_counter(), 0.0
        self._waited, self._flops, self._tokens = 0.0, 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, the step waits for its data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, the time is not training's."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._lap += time.perf_counter() - self._since
        try:
            yield
        finally:
            self._since = time.perf_counter()

    def count(self, tokens: int, flops: float) -> None:
        self.tokens += tokens
        self._tokens += tokens
        self._flops += flops

    def lap(self) -> dict[str, float]:
        """What was done since the lap before: tokens a second, and shares of the time and of the peak."""
        now = time.perf_counter()
        lap = max(self._lap + now - self._since, 1e-9)
        told = {"tokens_per_second": self._tokens / lap, "data_wait": min(1.0, self._waited / lap)}
        if self.peak is not None:
            told["mfu"] = self._flops / lap / self.peak
        self.seconds += lap
        self.start()
        return told
