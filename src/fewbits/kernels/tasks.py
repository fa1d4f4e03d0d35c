"""When packing is done: a kernel divides it into tasks, of which its caller decides who runs them."""

from __future__ import annotations

from collections.abc import Callable

Task = Callable[[], None]
Run = Callable[[Task], None]


def at_once(task: Task) -> None:
    task()
