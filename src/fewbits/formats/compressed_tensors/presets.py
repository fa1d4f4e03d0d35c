"""Presets of compressed-tensors: what a config group stands for that is a list of targets under such a name.

Their contents changed between versions; these are those of 0.20.
Source: compressed_tensors/quantization/quant_scheme.py.
"""

from __future__ import annotations

from typing import Any


def _int8_token(bits: int = 8) -> dict[str, Any]:
    return {"num_bits": bits, "strategy": "token", "dynamic": True}


def _fp(bits: int, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "float", **more}


def _group(bits: int, symmetric: bool = True) -> dict[str, Any]:
    return {"num_bits": bits, "strategy": "group", "group_size": 128, "symmetric": symmetric}


def _mx(bits: int, dynamic: bool = False) -> dict[str, Any]:
    return _fp(bits, strategy="group", group_size=32, dynamic=dynamic, scale_dtype="torch.uint8")


_NVFP4 = _fp(4, strategy="tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn")
_FP8_TOKEN = _fp(8, strategy="token", dynamic=True)

# Preset name → (weights, input_activations): a config group given as a list of targets under such a name.
PRESETS: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]] = {
    "UNQUANTIZED": (None, None),
    "W8A8": ({"num_bits": 8, "strategy": "channel"}, _int8_token()),
    "INT8": ({"num_bits": 8, "strategy": "channel"}, _int8_token()),
    **{f"W{bits}A16": (_group(bits), None) for bits in range(2, 9)},
    "W4A16_ASYM": (_group(4, symmetric=False), None),
    **{f"W{bits}A8": (_group(bits), _int8_token()) for bits in range(2, 8)},
    **{f"W{bits}A4": (_group(bits), _int8_token(4)) for bits in range(2, 5)},
    "W4AFP8": (_group(4), _FP8_TOKEN),
    "FP8": (_fp(8, strategy="tensor"), _fp(8, strategy="tensor")),
    "FP8_DYNAMIC": (_fp(8, strategy="channel"), _FP8_TOKEN),
    "FP8_BLOCK": (
        _fp(8, strategy="block", block_structure=[128, 128]),
        _fp(8, strategy="group", group_size=128, dynamic=True),
    ),
    "NVFP4A16": (_NVFP4, None),
    "NVFP4": (_NVFP4, {**_NVFP4, "dynamic": "local"}),
    "MXFP4A16": (_mx(4), None),
    "MXFP4": (_mx(4), _mx(4, dynamic=True)),
    "MXFP4XFP8": (_mx(4), _fp(8, strategy="group", group_size=128, dynamic=True)),
    "MXFP6A16": (_mx(6), None),
    "MXFP6A8": (_mx(6), _mx(8, dynamic=True)),
    "MXFP8A16": (_mx(8), None),
    "MXFP8": (_mx(8), _mx(8, dynamic=True)),
}
