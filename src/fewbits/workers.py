"""Threads that read and pack while the next module is being decoded."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from threading import BoundedSemaphore
from types import TracebackType

from fewbits.kernels.tasks import Task

_WAITING = 4  # tasks for each thread: a task holds what its module's small tensors and expanded arrays take


class Workers:
    """`workers(task)` has one of `threads` threads run a task, and waits while too many are waiting already.

    The end of the `with` block waits for all. Of the tasks that raise, the first that was given has its error raised,
    before any error of the block itself: the same one for any number of threads. No task begins after one has failed.
    """

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads)
        self._room = BoundedSemaphore(threads * (1 + _WAITING))
        self._given: list[Future[None]] = []
        self._failed = False

    def __call__(self, task: Task) -> None:
        self._room.acquire()
        if self._failed:
            self._room.release()
            self.finish()
        self._given.append(self._pool.submit(self._run, task))

    def _run(self, task: Task) -> None:
        try:
            if not self._failed:
                task()
        except BaseException:
            self._failed = True
            raise
        finally:
            self._room.release()

    def finish(self) -> None:
        self._pool.shutdown()
        for future in self._given:
            future.result()

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()
