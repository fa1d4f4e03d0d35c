"""How many tokens are drafted: as many as pay, by what was accepted and how long passes took. Time is simulated."""

from __future__ import annotations

import random

import pytest

from fewbits.engine.speculative.lengths import MOST, Acceptance, Adaptive, Fixed, Times, Whole


def pass_seconds(tokens: int) -> float:
    """Of a model that memory bounds: each further token costs an eighth of the first."""
    return 1 + 0.125 * (tokens - 1)


def simulate(
    rates: list[float],
    passes: int = 3000,
    drafting: float = 0.05,
    request: int | None = None,
    bad: tuple[int, int] = (0, 1),
    prompt: float = 0.0,
    kind: type[Adaptive | Whole] = Adaptive,
    paces: tuple[float, ...] = (1.0,),
) -> tuple[float, float]:
    """Tokens a second of several sequences whose draft tokens are accepted at these rates, over those of plain
    decoding, of all passes and of the last third. A new request comes after so many passes, and its first draft takes
    `prompt` seconds more; of `bad` (count, period) passes none accepts anything. All takes so many times as long in
    stretches of 400 passes, the `paces` in turn; speeds are beside those of plain decoding at these. With `Whole` the
    proposer ends six of ten drafts before their first wrong token, if it isn't the first at all.
    """
    lengths, source = kind(), random.Random(0)
    tokens = seconds = late_tokens = late_seconds = unread = 0.0
    for number in range(passes):
        if request is not None and number % request == 0:
            lengths.wake()
            unread = prompt
            for sequence in range(len(rates)):
                lengths.forget(sequence)
        good = number % bad[1] >= bad[0]
        counts = lengths.choose(dict.fromkeys(range(len(rates)), 100))
        assert set(counts) == set(range(len(rates))) and max(counts.values()) <= MOST
        gained = 0
        for sequence, count in list(counts.items()):
            accepted = 0
            while good and accepted < count and source.random() < rates[sequence]:
                accepted += 1
            if kind is Whole and count and source.random() < 0.6:
                counts[sequence] = count = max(accepted, 1)
            if count:
                lengths.accepted(sequence, count, accepted)
            gained += 1 + accepted
        size, longest = sum(counts.values()) + len(rates), max(counts.values())
        taken, drafted = pass_seconds(size) * source.uniform(0.95, 1.05), drafting * longest
        if longest:
            drafted, unread = drafted + unread, 0.0
        pace = paces[number // 400 % len(paces)]
        lengths.timed(size, longest, taken * pace, drafted * pace)
        tokens, seconds = tokens + gained, seconds + taken + drafted
        if number >= passes * 2 // 3:
            late_tokens, late_seconds = late_tokens + gained, late_seconds + taken + drafted
    plain = len(rates) / pass_seconds(len(rates))
    return tokens / seconds / plain, late_tokens / late_seconds / plain


both = pytest.mark.parametrize("kind", [Adaptive, Whole])


@both
@pytest.mark.parametrize("rate", [0.0, 0.05, 0.1, 0.2])
def test_what_is_never_guessed_costs_next_to_nothing(rate: float, kind: type[Adaptive | Whole]) -> None:
    overall, late = simulate([rate], kind=kind)
    assert overall > 0.97 and late > 0.98


@both
def test_what_is_never_guessed_costs_next_to_nothing_however_many_requests_hope_for_more(
    kind: type[Adaptive | Whole],
) -> None:
    """A guess that costs a quarter of a pass, as on the example, and requests of 300 passes."""
    overall, late = simulate([0.0], drafting=0.26, request=300, kind=kind)
    assert overall > 0.99 and late > 0.99


@both
@pytest.mark.parametrize("rate", [0.0, 0.2, 0.8])
def test_a_machine_may_change_its_pace(rate: float, kind: type[Adaptive | Whole]) -> None:
    """What was seen at one is as good at another: where it was forgotten, or taken for what it is at the other,
    drafting rested though it paid.
    """
    steady, _ = simulate([rate], passes=6000, kind=kind)
    changing, _ = simulate([rate], passes=6000, kind=kind, paces=(1.0, 1.7, 0.8))
    assert changing > 0.97 * steady


@both
@pytest.mark.parametrize("length", [10, 20, 64])
def test_short_requests_are_not_each_a_reason_to_try_again(length: int, kind: type[Adaptive | Whole]) -> None:
    """Where each was, two trials of ten passes took 7 % of the time."""
    for rate in (0.0, 0.3):
        overall, late = simulate([rate], drafting=0.26, request=length, kind=kind)
        assert min(overall, late) > (0.98 if kind is Adaptive else 0.97)


@both
@pytest.mark.parametrize(("rate", "least"), [(0.0, 0.97), (0.3, 0.96), (0.6, 0.96), (0.8, 1.1)])
def test_prompts_that_the_drafter_takes_in_count(rate: float, least: float, kind: type[Adaptive | Whole]) -> None:
    """A request's first draft takes its prompt in, here the time of four passes: where every request hoped for more,
    that took 7 % of what is never guessed.
    """
    overall, late = simulate([rate], drafting=0.4, request=64, prompt=4.0, kind=kind)
    assert overall > least and late > least


@both
def test_a_bad_stretch_does_not_end_drafting_for_long(kind: type[Adaptive | Whole]) -> None:
    """Where two bad guesses end it for 32 passes, 0.04 are gained."""
    overall, _ = simulate([0.8], drafting=0.26, bad=(10, 50), kind=kind)
    assert overall > 1.1


@pytest.mark.parametrize(("rate", "gain"), [(0.5, 1.296), (0.8, 1.977), (0.95, 3.08)])
def test_what_is_guessed_well_is_drafted_as_far_as_pays(rate: float, gain: float) -> None:
    """Nearly all that is gained by the best number of draft tokens, which are 2, 4 and 8 for these rates."""
    best = max(
        sum(rate**i for i in range(k + 1)) / (pass_seconds(1 + k) + 0.05 * k) * pass_seconds(1) for k in range(MOST + 1)
    )
    overall, late = simulate([rate])
    assert best == pytest.approx(gain, rel=1e-3)
    assert overall > 0.95 * best and 0.95 * best < late < 1.05 * best


def test_sequences_get_what_suits_each() -> None:
    lengths = Adaptive()
    lengths.choose({0: 9, 1: 9})
    lengths.timed(2, 0, pass_seconds(2), 0.0)
    for _ in range(30):
        lengths.accepted(0, 4, 4)
        lengths.accepted(1, 4, 0)
        lengths.timed(10, 4, pass_seconds(10), 0.2)
    lengths.timed(18, 8, pass_seconds(18), 0.4)  # what wasn't seen is taken for cheap, and tried
    counts = lengths.choose({0: 9, 1: 9})
    assert counts[0] >= 4 and counts[1] == 0
    assert lengths.choose({0: 2, 1: 9}) == {0: 2, 1: 0}
    lengths.forget(1)  # another sequence of that number is as all were
    assert lengths.choose({0: 9, 1: 9})[1] > 0


def test_a_proposer_that_ends_its_drafts_is_asked_for_as_many_while_it_pays() -> None:
    """Where guesses are right in turns for long and not at all, both halves are drafted: together they pay."""
    overall, late = simulate([0.9], drafting=0.1, bad=(20, 40), kind=Whole)
    assert overall > 1.2 and late > 1.2
    lengths = Whole()
    lengths.choose({0: 9, 1: 9})
    lengths.timed(2, 0, 1.0, 0.0)
    for _ in range(2):
        assert lengths.choose({0: 9, 1: 1}) == {0: 2, 1: 1}
        lengths.accepted(0, 2, 2)
        lengths.timed(5, 2, 1.3, 0.1)
    assert lengths.choose({0: 9, 1: 4}) == {0: 6, 1: 4}
    bad = 0
    while any(lengths.choose({0: 9, 1: 9}).values()):
        bad += 1
        lengths.accepted(0, 1, 0)
        lengths.timed(4, 1, 1.3, 0.1)
    assert 3 <= bad <= 6 and lengths.resting


@both
def test_the_end_of_a_request_is_no_reason_to_rest(kind: type[Adaptive | Whole]) -> None:
    """Nothing can be drafted for its last token. Every answer ended with a rest, as if drafting hadn't paid."""
    lengths = kind()
    lengths.choose({0: 9})
    lengths.timed(1, 0, 1.0, 0.0)
    for _ in range(10):
        count = lengths.choose({0: 9})[0]
        lengths.accepted(0, count, count)
        lengths.timed(1 + count, count, pass_seconds(1 + count), 0.01)
    assert count and lengths.choose({0: 0}) == {0: 0}
    assert not lengths.resting and lengths.choose({0: 9})[0] == count


def test_drafts_end_where_the_request_does() -> None:
    for lengths in (Fixed(4), Adaptive()):
        lengths.choose({0: 100})
        lengths.timed(1, 0, 1.0, 0.0)
        assert lengths.choose({0: 0}) == {0: 0}
        assert lengths.choose({0: 2})[0] <= 2
    assert Fixed(4).choose({0: 100, 1: 3}) == {0: 4, 1: 3}


def test_acceptance_is_that_of_a_position_when_it_is_reached() -> None:
    acceptance = Acceptance()
    for _ in range(200):
        acceptance.add(drafted=3, accepted=1)
    first, second, third, *more = acceptance.rates(8)
    assert first > 0.9 and second < 0.1
    assert third == second and set(more) == {second}  # never reached, so as the one before
    assert Acceptance(acceptance).rates(2) == [first, second]  # what is true of all is expected of each


def test_what_was_bad_once_and_is_not_tried_is_tried_again() -> None:
    acceptance = Acceptance()
    for _ in range(40):
        acceptance.add(drafted=2, accepted=1)
    assert acceptance.rates(2)[1] < 0.1
    for _ in range(80):
        acceptance.add(drafted=1, accepted=1)
    assert acceptance.rates(2)[1] > 0.8


def test_times_between_sizes_lie_between() -> None:
    times = Times()
    assert times.at(3) == 0.0 and 3 not in times
    for seconds in (1.0, 1.2, 9.0, 1.1, 1.0):  # one was disturbed
        times.add(2, seconds)
    times.add(6, 2.1)
    assert times.at(2) == times.at(1) == 1.1
    assert times.at(4) == pytest.approx(1.6)
    assert times.at(6) == times.at(60) == 2.1
