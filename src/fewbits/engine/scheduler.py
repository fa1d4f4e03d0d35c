"""Which tokens are computed in the next step.

There are no phases. Each request has tokens that are known and tokens that are computed; a step takes the
difference of the running ones under a budget, then lets waiting ones in. A long prompt is a difference that
is cut to the budget and goes on in the next step:

    step            1              2              3
    A (running)     1 token        1              1
    B (prompt 3000) 2047           953 → token    1

A request is admitted when the cache can hold all it may ever need, so nothing running is ever thrown out.
"""

from __future__ import annotations

from collections import deque

from fewbits.engine.request import Request

TOKEN_BUDGET = 2048  # tokens of a step: products are at their best rate well before
MAX_RUNNING = 64


class Scheduler:
    """Waiting and running requests, first come first served, in a cache of `cache_tokens` entries."""

    def __init__(
        self, cache_tokens: int, page_size: int, budget: int = TOKEN_BUDGET, max_running: int = MAX_RUNNING
    ) -> None:
        self.budget = budget
        self.max_running = max_running
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._page_size = page_size
        self._free_pages = cache_tokens // page_size

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def next_step(self) -> list[tuple[Request, int]]:
        """Requests and how many of their pending and draft tokens to compute now. Empty when there is nothing to do."""
        self._admit()
        step = []
        left = self.budget
        # Requests with one token wait for it; long prompts can take what is left. Both keep their order.
        for request in sorted(self.running, key=lambda request: request.pending > 1):
            count = min(request.pending + len(request.draft_ids), left)
            if count:
                step.append((request, count))
                left -= count
        return step

    def remove(self, request: Request) -> None:
        """Takes out a request that is finished or no longer wanted; one that isn't here is no error."""
        if request in self.running:
            self.running.remove(request)
            self._free_pages += self._pages(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_running:
            pages = self._pages(self.waiting[0])
            if pages > self._free_pages:
                break
            self._free_pages -= pages
            self.running.append(self.waiting.popleft())

    def _pages(self, request: Request) -> int:
        return -(-(len(request.prompt_ids) + request.length_limit) // self._page_size)
