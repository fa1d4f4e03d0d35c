import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewbits.engine.request import Request, SamplingParams
from fewbits.engine.sampler import adjust, distribution, pick, sample
from fewbits.errors import CheckpointError, UsageError

LOGITS = np.array([2, 1, -1], np.float32)


def request(output: tuple[int, ...] = (), prompt: tuple[int, ...] = (0,), **wish: object) -> Request:
    made = Request(0, list(prompt), SamplingParams(**wish), frozenset(), 100, None, 0.0)
    made.output_ids = list(output)
    return made


def sampled(logits: np.ndarray, asked: Request) -> int:
    return sample(logits, int(logits.argmax()), asked)


def log(p: list[float]) -> np.ndarray:
    return np.log(np.array(p, np.float64)).astype(np.float32)


@pytest.mark.parametrize(
    ("temperature", "expected"), [(1.0, [0.7054, 0.2595, 0.0351]), (0.5, [0.8789, 0.1189, 0.0022])]
)
def test_temperature(temperature: float, expected: list[float]) -> None:
    p = distribution(LOGITS, SamplingParams(temperature=temperature))
    np.testing.assert_allclose(p, expected, atol=5e-5)


def test_temperature_comes_before_min_p() -> None:
    warm = distribution(LOGITS, SamplingParams(temperature=1.0, min_p=0.15))
    cool = distribution(LOGITS, SamplingParams(temperature=0.5, min_p=0.15))
    assert np.count_nonzero(warm) == 2
    assert np.count_nonzero(cool) == 1
    np.testing.assert_allclose(warm[:2], np.array([0.7054, 0.2595]) / 0.9649, atol=1e-4)


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 1), (0.79, 2), (0.8, 2), (0.81, 3), (0.96, 4), (1e-9, 1)])
def test_top_p_at_its_border(top_p: float, kept: int) -> None:
    p = distribution(log([0.15, 0.5, 0.05, 0.3]), SamplingParams(temperature=1.0, top_p=top_p))
    assert set(np.flatnonzero(p)) == set([1, 3, 0, 2][:kept])
    assert p.sum() == pytest.approx(1.0, abs=1e-12)


def test_top_p_counts_what_top_k_left() -> None:
    # Of [.5, .3] renormalised, .5 alone is .625 and enough for .6; of all four it isn't.
    logits = log([0.5, 0.3, 0.15, 0.05])
    both = distribution(logits, SamplingParams(temperature=1.0, top_k=2, top_p=0.6))
    alone = distribution(logits, SamplingParams(temperature=1.0, top_p=0.6))
    assert (np.count_nonzero(both), np.count_nonzero(alone)) == (1, 2)


def test_top_k_keeps_all_that_equal_the_last() -> None:
    p = distribution(np.array([1, 3, 2, 2, 0], np.float32), SamplingParams(temperature=1.0, top_k=2))
    assert set(np.flatnonzero(p)) == {1, 2, 3}


def test_penalties_by_hand() -> None:
    logits = np.array([2.0, -2.0, 1.0, 4.0, 0.5], np.float32)
    wish = SamplingParams(repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25)
    # 0 is in the prompt; 1 was generated once, 3 twice: divided or multiplied by 2, then less 0.5 n, less 0.25.
    got = adjust(logits, wish, prompt_ids=[0, 0], output_ids=[1, 3, 3])
    np.testing.assert_array_equal(got, np.array([1.0, -4.75, 1.0, 0.75, 0.5], np.float32))
    np.testing.assert_array_equal(logits, np.array([2.0, -2.0, 1.0, 4.0, 0.5], np.float32))


def test_minimum_length_and_bias() -> None:
    wish = SamplingParams(min_tokens=2, logit_bias={1: 5.0})
    early = adjust(LOGITS, wish, [0], [7], end_ids={0, 99})
    late = adjust(LOGITS, wish, [0], [7, 7], end_ids={0, 99})
    np.testing.assert_array_equal(early, np.array([-np.inf, 6, -1], np.float32))
    np.testing.assert_array_equal(late, np.array([2, 6, -1], np.float32))
    with pytest.raises(UsageError, match="token 3"):
        adjust(LOGITS, SamplingParams(logit_bias={3: 1.0}), [0], [])


def test_greedy_takes_the_lowest_of_equal_tokens() -> None:
    assert sampled(np.array([0, 7, 7], np.float32), request()) == 1
    assert sampled(np.array([0, 7, 7], np.float32), request(temperature=1e-6)) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers(bad: float) -> None:
    with pytest.raises(CheckpointError) as caught:
        sampled(np.array([1, bad, 2], np.float32), request())
    assert caught.value.code == "logits-not-finite"


DRAWS = 20_000
CRITICAL = 33.72  # chi-square of 9 degrees of freedom is above it once in 10,000 times


def chi_square(wish: dict[str, float], expected: np.ndarray, logits: np.ndarray) -> float:
    asked = request(seed=20, **wish)
    counts = np.bincount([sampled(logits, asked) for _ in range(DRAWS)], minlength=len(logits))
    assert not counts[expected == 0].any()
    possible = expected > 0
    return float((((counts - DRAWS * expected) ** 2)[possible] / (DRAWS * expected[possible])).sum())


def test_samples_follow_the_distribution() -> None:
    logits = np.random.default_rng(3).normal(size=14).astype(np.float32)
    wish = {"temperature": 0.8, "top_k": 10}
    p = np.exp(logits.astype(np.float64) / 0.8)
    p[np.argsort(p)[:4]] = 0
    p /= p.sum()
    assert chi_square(wish, p, logits) < CRITICAL
    # The test sees a temperature that is off by a tenth.
    assert chi_square(wish | {"temperature": 0.88}, p, logits) > CRITICAL


def test_one_number_per_token_and_the_same_ones_for_a_seed() -> None:
    logits = np.zeros(1000, np.float32)
    first, again, other = (request(temperature=1.0, seed=seed) for seed in (5, 5, 6))
    tokens = [sampled(logits, first) for _ in range(20)]
    assert tokens == [sampled(logits, again) for _ in range(20)]
    assert tokens != [sampled(logits, other) for _ in range(20)]
    uniform = np.random.Generator(np.random.Philox(5)).random(20)
    assert tokens == [pick(distribution(logits, first.params), one) for one in uniform]


finite = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40)


@given(finite, st.floats(0.05, 5), st.integers(0, 45), st.floats(0.01, 1), st.floats(0, 1))
def test_what_is_kept_is_a_distribution_over_the_best(
    values: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = np.array(values, np.float32)
    wish = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    p = distribution(logits, wish)
    assert p.sum() == pytest.approx(1.0, abs=1e-9)
    assert (p >= 0).all()
    best = logits.argmax()
    assert p[best] == p.max() > 0
    # Nothing that went was more probable than something that stayed.
    assert p[p > 0].size == p.size or logits[p == 0].max() <= logits[p > 0].min()


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=40), st.floats(0.01, 0.999))
def test_top_p_is_what_its_definition_says(weights: list[float], top_p: float) -> None:
    logits = np.log(np.array(weights)).astype(np.float32)
    full = distribution(logits, SamplingParams(temperature=1.0))
    share, gone = 0.0, []
    for token in sorted(range(len(full)), key=lambda token: (full[token], -token)):
        share += full[token]
        if abs(share - (1 - top_p)) < 1e-6:
            return  # a tie: rounding may decide
        if share <= 1 - top_p:
            gone.append(token)
    p = distribution(logits, SamplingParams(temperature=1.0, top_p=top_p))
    assert set(np.flatnonzero(p == 0)) == set(gone)


@given(st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=1, max_size=9).filter(any), st.floats(0, 1))
def test_pick_never_takes_what_has_no_probability(p: list[float], uniform: float) -> None:
    assert p[pick(np.array(p) / sum(p), min(uniform, np.nextafter(1.0, 0.0)))] > 0


@pytest.mark.parametrize(
    "wish",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -2},
        {"max_tokens": -1},
        {"seed": -1},
        {"presence_penalty": 3.0},
        {"repetition_penalty": 0.0},
        {"stop": ("a", "")},
    ],
)
def test_parameters_out_of_range(wish: dict[str, object]) -> None:
    with pytest.raises(UsageError) as caught:
        SamplingParams(**wish)
    assert caught.value.code == "sampling-range"


@pytest.mark.parametrize("size", [255, 256, 5000, 128256])
@pytest.mark.parametrize("top_k", [1, 2, 40, 400])
def test_top_k_of_many(size: int, top_k: int) -> None:
    logits = np.random.default_rng(size).normal(0, 2, size).astype(np.float32).round(1)  # with ties at the border
    kept = np.flatnonzero(distribution(logits, SamplingParams(temperature=1.0, top_k=top_k)))
    expected = np.flatnonzero(logits >= np.sort(logits)[-min(top_k, size)])
    np.testing.assert_array_equal(kept, expected)


def test_top_p_that_vanishes_keeps_the_first_of_equals() -> None:
    p = distribution(np.zeros(4, np.float32), SamplingParams(temperature=1.0, top_p=1e-20))
    np.testing.assert_array_equal(p, [1, 0, 0, 0])


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.7}, {"top_k": 5, "top_p": 0.9, "min_p": 0.01}])
def test_a_sample_is_picked_from_the_distribution(options: dict[str, float]) -> None:
    logits = np.random.default_rng(3).normal(0, 1, 50).astype(np.float32)
    wish = {"temperature": 1.0, "seed": 5} | options
    drawn = np.random.Generator(np.random.Philox(5)).random(40)
    p = distribution(logits, SamplingParams(**wish))
    asked = request(**wish)
    assert [sampled(logits, asked) for _ in drawn] == [pick(p, uniform) for uniform in drawn]
