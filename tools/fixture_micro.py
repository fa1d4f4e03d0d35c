"""The smallest fixtures: storage and activation schemes that no larger one has, a layer of 32 columns each.

Their decoded weights are kept as digests alone.
"""

from __future__ import annotations

from dataclasses import replace

from fixture_models import LLAMA_MICRO
from fixture_table import (
    ASYM_16,
    HEAD,
    INT8_CHANNEL,
    INT8_TOKEN,
    Fixture,
    Recipe,
    every_width,
    fp8,
    integer,
    one,
)

INT8_ASYM_CHANNEL = integer(8, "channel", symmetric=False)
_ROWS = (
    Fixture("micro-w8a8-asym-channel-head", "asymmetric int8 weights", LLAMA_MICRO, one(INT8_ASYM_CHANNEL, INT8_TOKEN)),
    Fixture(
        "micro-w8a8-asym-g16",
        "asymmetric int8 weights in groups; head ignored",
        LLAMA_MICRO,
        one(integer(8, symmetric=False, group_size=16), INT8_TOKEN, ignore=HEAD),
    ),
    Fixture(
        "micro-w8a8-tensor-dynamic-head",
        "dynamic inputs, one scale a tensor",
        LLAMA_MICRO,
        one(integer(8, "tensor"), integer(8, "tensor", dynamic=True)),
    ),
    Fixture(
        "micro-w8a16-sym-channel-naive",
        "weight-only integers forced to naive-quantized; head ignored",
        LLAMA_MICRO,
        one(INT8_CHANNEL, ignore=HEAD, storage="naive-quantized"),
    ),
    Fixture(
        "micro-wna16-every-width-sym-channel-head",
        "2 to 8 bits, a scale a row; head 6 bits",
        LLAMA_MICRO,
        every_width(True, None, 6),
    ),
    Fixture(
        "micro-wna16-every-width-asym-channel-head",
        "2 to 8 bits, a scale and a zero point a row; head 7 bits",
        LLAMA_MICRO,
        every_width(False, None, 7),
    ),
    Fixture("micro-w4a16-sym-g8-head", "group 8", LLAMA_MICRO, one(integer(4, group_size=8))),
    Fixture(
        "micro-w4a16-asym-g64",
        "group 64; head ignored",
        LLAMA_MICRO.but(hidden_size=64, intermediate_size=64, num_attention_heads=4),
        one(integer(4, symmetric=False, group_size=64), ignore=HEAD),
    ),
    Fixture(
        "micro-w4a16-asym-actorder-static",
        "actorder weight: plain groups on disk; head ignored",
        LLAMA_MICRO,
        one(integer(4, symmetric=False, group_size=16, actorder="weight"), ignore=HEAD),
    ),
    Fixture(
        "micro-fp8-tensor-dynamic-head",
        "dynamic inputs, one scale a tensor",
        LLAMA_MICRO,
        one(fp8("tensor"), fp8("tensor", dynamic=True)),
    ),
    Fixture(
        "micro-fp8-g16-head",
        "groups with float scales, for weights and inputs",
        LLAMA_MICRO,
        one(fp8("group", group_size=16), fp8("group", group_size=16, dynamic=True)),
    ),
    Fixture("micro-nvfp4-head", "preset NVFP4; head quantized", LLAMA_MICRO, Recipe(preset="NVFP4", calibrate=True)),
    Fixture("micro-mxfp4-head", "preset MXFP4; head quantized", LLAMA_MICRO, Recipe(preset="MXFP4")),
    Fixture("micro-mxfp8-head", "preset MXFP8; head quantized", LLAMA_MICRO, Recipe(preset="MXFP8")),
    Fixture(
        "micro-mxfp6a16-head",
        "preset MXFP6A16; head quantized",
        LLAMA_MICRO,
        Recipe(preset="MXFP6A16"),
        library="0.20.0",
    ),
    Fixture(
        "micro-mxfp6a8",
        "preset MXFP6A8: MXFP8 inputs; head ignored",
        LLAMA_MICRO,
        Recipe(preset="MXFP6A8", ignore=HEAD),
        library="0.20.0",
    ),
    Fixture(
        "micro-rotated-offline",
        "SpinQuant R1 and R2: rotations that are in the weights; head ignored",
        LLAMA_MICRO,
        replace(one(ASYM_16, ignore=HEAD), rotations=("R1", "R2")),
    ),
    Fixture(
        "micro-rotated-online",
        "SpinQuant R4: a rotation of down_proj's input at run time",
        LLAMA_MICRO,
        replace(one(ASYM_16, ignore=HEAD), rotations=("R1", "R2", "R4")),
        refused="transform-online",
    ),
)

MICRO = tuple(replace(row, numbers=False) for row in _ROWS)
