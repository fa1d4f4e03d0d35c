import pytest

from fewbits.engine.request import Request, SamplingParams
from fewbits.engine.scheduler import Scheduler

PAGE = 16


def request(prompt: int, limit: int = 4, sequence: int = 0) -> Request:
    return Request(sequence, list(range(prompt)), SamplingParams(), frozenset(), limit, None, 0.0)


def run(scheduler: Scheduler) -> list[tuple[int, int]]:
    """One step, as the runner would do it; what was computed, as (sequence, tokens)."""
    step = scheduler.next_step()
    for one, count in step:
        one.computed += count
        if one.pending == 0:
            one.output_ids.append(0)
    return [(one.sequence, count) for one, count in step]


def test_long_prompts_are_cut_to_the_budget_and_single_tokens_go_first() -> None:
    scheduler = Scheduler(10_000, PAGE, budget=100)
    for sequence, prompt in enumerate((30, 150, 60)):
        scheduler.add(request(prompt, sequence=sequence))
    assert run(scheduler) == [(0, 30), (1, 70)]
    assert run(scheduler) == [(0, 1), (1, 80), (2, 19)]
    assert run(scheduler) == [(0, 1), (1, 1), (2, 41)]
    assert run(scheduler) == [(0, 1), (1, 1), (2, 1)]


def test_pending_tokens_of_a_chunk_are_the_next_ones() -> None:
    one = request(5)
    one.output_ids = [50, 51]
    one.computed = 3
    assert (one.pending, one.next_ids(1), one.next_ids(3), one.next_ids(4)) == (
        4,
        [3],
        [3, 4, 50],
        [3, 4, 50, 51],
    )
    one.computed = 6
    assert one.next_ids(1) == [51]


def test_admission_waits_for_room_for_the_whole_request_in_order() -> None:
    scheduler = Scheduler(4 * PAGE, PAGE)
    first, second, third = (request(40, sequence=0), request(20, 20, sequence=1), request(1, 1, sequence=2))
    for one in (first, second, third):
        scheduler.add(one)
    assert run(scheduler) == [(0, 40)]  # three pages; the second needs three more, the third waits behind it
    scheduler.remove(first)
    assert sorted(run(scheduler)) == [(1, 20), (2, 1)]
    scheduler.remove(second)
    scheduler.remove(third)
    assert run(scheduler) == []
    scheduler.add(request(40, 24, sequence=3))  # all four pages are back
    assert run(scheduler) == [(3, 40)]


def test_no_more_than_the_limit_run_at_once() -> None:
    scheduler = Scheduler(10_000, PAGE, max_running=2)
    for sequence in range(3):
        scheduler.add(request(2, sequence=sequence))
    assert [sequence for sequence, _ in run(scheduler)] == [0, 1]
    scheduler.remove(scheduler.running[0])
    assert {sequence for sequence, _ in run(scheduler)} == {1, 2}


def test_removing_a_waiting_or_unknown_request() -> None:
    scheduler = Scheduler(10_000, PAGE, max_running=1)
    running, waiting = request(1, sequence=0), request(1, sequence=1)
    scheduler.add(running)
    scheduler.add(waiting)
    scheduler.next_step()
    scheduler.remove(waiting)
    scheduler.remove(waiting)
    scheduler.remove(running)
    assert scheduler.next_step() == []


def ended(tokens: list[int], **wish: object) -> Request:
    params = SamplingParams(**wish)
    one = Request(0, [9], params, frozenset({2}), params.max_tokens, None, 0.0)
    for now, token in enumerate(tokens, 1):
        assert not one.done
        one.accept(token, float(now))
    return one


@pytest.mark.parametrize(
    ("tokens", "wish", "reason", "kept"),
    [
        ([5, 2], {}, "stop", [5]),
        ([5, 6], {"max_tokens": 2}, "length", [5, 6]),
        ([5, 2], {"max_tokens": 2}, "stop", [5]),
        ([2, 5, 2], {"min_tokens": 2}, "stop", [2, 5]),
    ],
)
def test_how_a_request_ends(tokens: list[int], wish: dict[str, int], reason: str, kept: list[int]) -> None:
    one = ended(tokens, **wish)
    assert one.done
    result = one.result()
    assert (result.finish_reason, result.token_ids, result.generated_tokens) == (reason, kept, len(kept))


def test_rates_count_passes_not_kept_tokens() -> None:
    one = ended([5, 6, 2])
    one.started_at = 0.5
    result = one.result()
    assert result.prefill_tokens_per_s == 1 / 0.5
    assert result.decode_tokens_per_s == 2 / 2.0  # two passes after the first, the last gave the end token
    assert ended([2]).result().decode_tokens_per_s is None


def test_a_result_is_also_a_mapping() -> None:
    result = ended([5, 2]).result()
    assert result["token_ids"] == result.token_ids == dict(result)["token_ids"]
    with pytest.raises(KeyError):
        result["tokens"]
