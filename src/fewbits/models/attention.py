"""A layer's attention, of grouped queries or of latents: its configuration, the modules it needs, the block itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fewbits.kernels.batch import CacheDtype, CacheLayer
from fewbits.kernels.ops import AttentionSpec, Ops
from fewbits.kernels.rope import Rope
from fewbits.models.needs import Bias, Need
from fewbits.nn.attention import Attention
from fewbits.nn.latent_attention import LatentAttention
from fewbits.spec import HeadRows


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """`window` 0 sees everything. `qk_norm`: RMS norms of each query and key head before the rotation. `head_gate`: a
    module g_proj [heads, H], whose sigmoids multiply what the heads give. `sinks`: a logit of each head that takes part
    in its softmax.
    """

    stored_scales: ClassVar[bool] = True  # whether a checkpoint's scales of its KV cache are of what this cache holds

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    window: int = 0
    qkv_bias: Bias = "no"
    output_bias: Bias = "no"
    qk_norm: bool = False
    head_gate: bool = False
    sinks: bool = False

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.head_dim)

    def modules(self, name: str, inputs: int, hidden: int) -> Iterator[Need]:
        """What it is made of, from `inputs` numbers a token to `hidden`."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield Need(f"{name}.q_proj", "linear", (queries, inputs), bias=self.qkv_bias)
        yield Need(f"{name}.k_proj", "linear", (keys, inputs), bias=self.qkv_bias)
        yield Need(f"{name}.v_proj", "linear", (keys, inputs), bias=self.qkv_bias)
        if self.head_gate:
            yield Need(f"{name}.g_proj", "linear", (self.heads, inputs))
        if self.qk_norm:
            yield Need(f"{name}.q_norm", "norm", (self.head_dim,))
            yield Need(f"{name}.k_norm", "norm", (self.head_dim,))
        if self.sinks:
            yield Need(f"{name}.sinks", "other", (self.heads,))
        yield Need(f"{name}.o_proj", "linear", (hidden, queries), bias=self.output_bias)

    def make(self, name: str, norm: tuple[float, float], params: Mapping[str, Any], ops: Ops) -> Attention:
        q_norm, k_norm = (params[f"{name}.{one}_norm"] if self.qk_norm else None for one in "qk")
        sizes = (self.heads, self.kv_heads, self.head_dim)
        sinks = params[f"{name}.sinks"] if self.sinks else None
        spec = AttentionSpec(*sizes, self.rope, self.scale, self.window, q_norm, k_norm, *norm, sinks)
        q, k, v, output = (params[f"{name}.{part}_proj"] for part in "qkvo")
        gate = params[f"{name}.g_proj"] if self.head_gate else None
        return Attention(spec, q, k, v, output, gate, ops)

    def cache_layer(self, dtype: CacheDtype) -> CacheLayer:
        return CacheLayer(self.kv_heads, self.head_dim, dtype, self.window)

    @property
    def macs(self) -> int:
        """Multiply-adds of a token with an entry that it sees."""
        return 2 * self.heads * self.head_dim


@dataclass(frozen=True, slots=True)
class LatentConfig:
    """Keys and values of all heads come from one latent of `kv_rank` numbers a token, and a rotated part of `rope_dim`
    that the keys share; queries from a latent of `q_rank`, or straight from x where it is 0.

    A key has `plain_dim` numbers of its own and behind them the shared ones; it is never made, nor is a value: the
    cache keeps latents and rotated parts, as one key of one head. `bias` is that of the products that make latents and
    of the output. The latents' norms have an epsilon of their own.
    """

    stored_scales: ClassVar[bool] = (
        False  # of latents or of heads' keys and values: writers differ, and no file says it
    )
    kv_heads: ClassVar[int] = 1
    window: ClassVar[int] = 0

    heads: int
    plain_dim: int
    rope_dim: int
    value_dim: int
    kv_rank: int
    q_rank: int
    rope: Rope
    scale: float
    bias: Bias = "no"
    norm_eps: float = 1e-6

    @property
    def macs(self) -> int:
        """Multiply-adds of a token with an entry that it sees."""
        return self.heads * (2 * self.kv_rank + self.rope_dim)

    def modules(self, name: str, inputs: int, hidden: int) -> Iterator[Need]:
        """What it is made of, from `inputs` numbers a token to `hidden`."""
        rows = HeadRows(self.plain_dim, self.value_dim)
        queries, keys_values = self.heads * (self.plain_dim + self.rope_dim), self.heads * sum(rows)
        if self.q_rank:
            yield Need(f"{name}.q_a_proj", "linear", (self.q_rank, inputs), bias=self.bias)
        else:
            yield Need(f"{name}.q_proj", "linear", (queries, inputs))
        yield Need(f"{name}.kv_a_proj_with_mqa", "linear", (self.kv_rank + self.rope_dim, inputs), bias=self.bias)
        if self.q_rank:
            yield Need(f"{name}.q_a_layernorm", "norm", (self.q_rank,))
            yield Need(f"{name}.q_b_proj", "linear", (queries, self.q_rank))
        yield Need(f"{name}.kv_a_layernorm", "norm", (self.kv_rank,))
        yield Need(f"{name}.kv_b_proj", "linear", (keys_values, self.kv_rank), heads=rows)
        yield Need(f"{name}.o_proj", "linear", (hidden, self.heads * self.value_dim), bias=self.bias)

    def make(self, name: str, norm: tuple[float, float], params: Mapping[str, Any], ops: Ops) -> LatentAttention:
        def param(module: str) -> Any:
            return params[f"{name}.{module}"]

        def normed(module: str) -> Any:
            return ops.norm(param(module), self.norm_eps, 0.0)

        width = self.kv_rank + self.rope_dim
        spec = AttentionSpec(self.heads, 1, width, self.rope, self.scale, value_dim=self.kv_rank)
        return LatentAttention(
            spec,
            param("q_a_proj" if self.q_rank else "q_proj"),
            (normed("q_a_layernorm"), param("q_b_proj")) if self.q_rank else None,
            param("kv_a_proj_with_mqa"),
            (normed("kv_a_layernorm"), param("kv_b_proj")),
            param("o_proj"),
            ops,
        )

    def cache_layer(self, dtype: CacheDtype) -> CacheLayer:
        width = self.kv_rank + self.rope_dim
        return CacheLayer(1, width, dtype, kind="latent", value_width=self.kv_rank)


AnyAttention = AttentionConfig | LatentConfig
