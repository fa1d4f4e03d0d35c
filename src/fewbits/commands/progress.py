"""The bar that shows while a model is loading, and what is said on stderr besides."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class LoadingBar:
    """Called with (bytes done, bytes in all); a bar on a terminal's stderr after `patience` seconds.

    With `counts` the numbers aren't bytes, but so many of what it names.
    """

    def __init__(self, label: str, patience: float = 2.0, counts: str = "") -> None:
        self._label = label
        self._counts = counts
        self._patience = patience
        self._begin = time.monotonic()
        self._bar: Any = None
        self._visible = sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        if not self._visible or time.monotonic() - self._begin < self._patience:
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                MofNCompleteColumn,
                Progress,
                ProgressColumn,
                TextColumn,
                TimeRemainingColumn,
            )

            amount: tuple[ProgressColumn, ...] = (DownloadColumn(),)
            if self._counts:
                amount = (MofNCompleteColumn(), TextColumn(self._counts))
            columns = (TextColumn("{task.description}"), BarColumn(), *amount, TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._bar.add_task(self._label, total=total)
        self._bar.update(self._bar.task_ids[0], completed=done)

    def __enter__(self) -> LoadingBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
