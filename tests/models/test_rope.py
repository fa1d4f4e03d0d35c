"""Rotary frequencies: worked numbers of published models, and what is refused."""

from __future__ import annotations

import pytest

from fewbits.checkpoint.config import Config
from fewbits.errors import CheckpointError, PlanError
from fewbits.models.rope import rope


def of(head_dim, layer_type="full_attention", **keys):
    return rope(Config(keys, "config.json"), head_dim, layer_type)


def llama3(theta, factor, low=1.0, high=4.0, original=8192):
    return {
        "rope_theta": theta,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        },
    }


@pytest.mark.parametrize(
    "head_dim, config, expected",
    [
        (
            128,
            llama3(500000.0, 8.0),
            {
                28: 3.211446e-3,
                29: 2.166571e-3,
                30: 1.371894e-3,
                32: 5.248462e-4,
                34: 1.785078e-4,
                35: 9.556212e-5,
                63: 3.068926e-7,
            },
        ),
        (64, llama3(500000.0, 32.0), {15: 1.290548e-3, 17: 9.708288e-5, 18: 1.946164e-5}),
        (
            128,
            llama3(5e6, 2.0, 1.0, 32.0, 131072) | {"partial_rotary_factor": 0.5},
            {10: 8.064397e-3, 16: 2.836864e-4, 18: 9.230576e-5, 20: 3.289137e-5, 21: 2.008033e-5, 31: 1.619358e-7},
        ),
    ],
    ids=["llama-3.1", "llama-3.2-1b", "step-3.5"],
)
def test_llama3(head_dim, config, expected):
    found = of(head_dim, **config)
    for i, frequency in expected.items():
        assert found.inv_freq[i] == pytest.approx(frequency, rel=1e-6), i
    assert found.factor == 1 and not found.interleaved


def yarn(**keys):
    return {"rope_type": "yarn", **keys}


def test_yarn_of_gpt_oss():
    settings = yarn(factor=32.0, original_max_position_embeddings=4096, truncate=False, beta_fast=32.0, beta_slow=1.0)
    found = of(64, rope_theta=150000, rope_scaling=settings)
    expected = {8: 0.0508133, 9: 0.0317057, 12: 0.00679496, 17: 1.293187e-4, 18: 3.830881e-5}
    for i, frequency in expected.items():
        assert found.inv_freq[i] == pytest.approx(frequency, rel=2e-6), i
    assert found.factor == pytest.approx(1.346574, rel=1e-6)


def test_yarn_of_deepseek():
    settings = yarn(factor=40, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0)
    found = of(64, rope_theta=10000.0, rope_scaling=settings)
    for i, frequency in {11: 0.0390069, 16: 0.0055, 23: 3.33380e-5}.items():
        assert found.inv_freq[i] == pytest.approx(frequency, rel=2e-6), i
    assert found.factor == 1


def test_yarn_of_qwen():
    settings = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    found = of(128, rope_theta=1e6, rope_scaling=settings)
    plain = of(128, rope_theta=1e6)
    assert found.factor == pytest.approx(1.138629, rel=1e-6)
    assert found.inv_freq[:24] == plain.inv_freq[:24] and found.inv_freq[24] < plain.inv_freq[24]
    assert found.inv_freq[39] > plain.inv_freq[39] / 4
    assert found.inv_freq[40:] == tuple(frequency / 4 for frequency in plain.inv_freq[40:])


def test_yarn_without_a_factor_takes_the_ratio_of_lengths():
    settings = yarn(factor=None, original_max_position_embeddings=8192)
    found = of(128, rope_theta=1e6, max_position_embeddings=32768, rope_scaling=settings)
    explicit = of(128, rope_theta=1e6, rope_scaling=settings | {"factor": 4.0})
    assert found == explicit
    given = of(128, rope_theta=1e6, rope_scaling=settings | {"factor": 4.0, "attention_factor": 1.5})
    assert given.factor == 1.5


def test_plain_and_linear():
    assert of(4).inv_freq == (1.0, 0.01)
    assert of(4, rope_theta=100).inv_freq == (1.0, 0.1)
    assert of(4, rope_scaling={"rope_type": "linear", "factor": 4.0}).inv_freq == (0.25, 0.0025)
    assert of(4, rope_scaling=None).inv_freq == (1.0, 0.01)


def test_rope_parameters_go_before_the_old_keys():
    new = {"rope_type": "default", "rope_theta": 100.0}
    assert of(4, rope_theta=16, rope_parameters=new).inv_freq == (1.0, 0.1)
    assert of(4, rope_theta=16, rope_parameters={"rope_type": "default"}).inv_freq == (1.0, 0.25)
    by_type = {"full_attention": new, "sliding_attention": new | {"rope_theta": 16.0, "partial_rotary_factor": 0.5}}
    assert of(4, rope_parameters=by_type).inv_freq == (1.0, 0.1)
    assert of(4, "sliding_attention", rope_parameters=by_type).inv_freq == (1.0,)
    assert of(8, "sliding_attention", rope_parameters=by_type).inv_freq == (1.0, 0.25)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "su", "mrope", "ntk", ""])
def test_an_unknown_type_is_refused(kind):
    with pytest.raises(PlanError) as caught:
        of(64, rope_scaling={"type": kind, "factor": 2.0})
    assert caught.value.code == "rope-unsupported" and repr(kind) in caught.value.what
    assert caught.value.source == "config.json, rope_scaling.type" and "yarn" in caught.value.hint


@pytest.mark.parametrize(
    "config, code",
    [
        ({"rope_theta": 0}, "rope-unsupported"),
        ({"rope_theta": 1e300}, "rope-unsupported"),
        ({"partial_rotary_factor": 0.3}, "rope-unsupported"),
        ({"partial_rotary_factor": 1.5}, "rope-unsupported"),
        ({"partial_rotary_factor": 0.0}, "rope-unsupported"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "config-unsupported"),
        ({"rope_scaling": yarn(factor=4.0)}, "config-unsupported"),
        (llama3(1e4, 8.0, low=4.0), "config-unsupported"),
        (llama3(1e4, -8.0), "config-unsupported"),
    ],
)
def test_numbers_that_make_no_rotation(config, code):
    with pytest.raises(PlanError) as caught:
        of(10, **config)
    assert caught.value.code == code


def test_missing_numbers_are_named():
    with pytest.raises(CheckpointError, match="low_freq_factor is missing"):
        of(64, rope_scaling={"rope_type": "llama3", "factor": 8.0})
    with pytest.raises(CheckpointError, match="factor is missing"):
        of(64, rope_scaling={"rope_type": "linear"})
