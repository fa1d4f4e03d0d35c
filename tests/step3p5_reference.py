"""Step-3.5-Flash in NumPy float64, straight from what is known of the model: no part of fewbits is used.

Token by token and head by head, to be read beside the facts, and slow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def norm(x: Array, weight: Array, eps: float) -> Array:
    """Weights are stored less one."""
    return x / np.sqrt(np.mean(x * x) + eps) * (1 + weight)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def gated(x: Array, gate: Array, up: Array, down: Array, limit: float) -> Array:
    """The gate is bounded behind its activation, from above alone."""
    g = gate @ x
    a, b = g * sigmoid(g), up @ x
    if limit:
        a, b = np.minimum(a, limit), np.clip(b, -limit, limit)
    return down @ (a * b)


def frequencies(config: Mapping[str, Any], layer: int) -> Array:
    """Of the first `partial_rotary_factors[layer]` of the channels; scaled in the listed types of layers only."""
    rotary = int(config["head_dim"] * config["partial_rotary_factors"][layer])
    inv = np.array([config["rope_theta"][layer] ** (-2 * i / rotary) for i in range(rotary // 2)])
    scaling = config["rope_scaling"]
    if config["layer_types"][layer] not in config["yarn_only_types"]:
        return inv
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    for i, one in enumerate(inv):
        wavelength = 2 * math.pi / one
        if wavelength > original / low:
            inv[i] = one / factor
        elif wavelength >= original / high:
            s = (original / wavelength - low) / (high - low)
            inv[i] = (1 - s) * one / factor + s * one
    return inv


def rotated(head: Array, position: int, inv: Array) -> Array:
    """Channel i goes with channel i + half; those behind pass through."""
    half = len(inv)
    cos, sin = np.cos(position * inv), np.sin(position * inv)
    first, second = head[:half], head[half : 2 * half]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, head[2 * half :]])


class Step:
    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        self.config = config
        self.tensors = {name: np.asarray(tensor).astype(np.float64) for name, tensor in tensors.items()}

    def logits(self, ids: list[int]) -> Array:
        """Of every token, [T, vocabulary]."""
        w, eps = self.tensors, self.config["rms_norm_eps"]
        return np.stack([w["lm_head.weight"] @ norm(t, w["model.norm.weight"], eps) for t in self.states(ids)])

    def states(self, ids: list[int]) -> Array:
        """Behind the last layer, before the last norm, [T, hidden]."""
        x = self.tensors["model.embed_tokens.weight"][ids]
        for layer in range(self.config["num_hidden_layers"]):
            x = self._block(layer, x)
        return x

    def drafts(self, ids: list[int]) -> list[int]:
        """What the MTP modules guess behind the tokens, of which the last one has no state yet; all from the start."""
        w, eps = self.tensors, self.config["rms_norm_eps"]
        tokens, state = list(ids), self.states(ids[:-1])
        for module in range(1, self.config["num_nextn_predict_layers"] + 1):
            layer = self.config["num_hidden_layers"] + module - 1
            name = f"model.layers.{layer}"
            embedded = w["model.embed_tokens.weight"][tokens[module : module + len(state)]]
            u = [
                w[f"{name}.eh_proj.weight"]
                @ np.concatenate([norm(e, w[f"{name}.enorm.weight"], eps), norm(h, w[f"{name}.hnorm.weight"], eps)])
                for e, h in zip(embedded, state, strict=True)
            ]
            state = self._block(layer, np.stack(u))
            head = f"{name}.transformer.shared_head"
            logits = w[f"{head}.output.weight"] @ norm(state[-1], w[f"{head}.norm.weight"], eps)
            tokens.append(int(logits.argmax()))
        return tokens[len(ids) :]

    def _block(self, layer: int, x: Array) -> Array:
        w, eps, name = self.tensors, self.config["rms_norm_eps"], f"model.layers.{layer}"
        x = x + self._attention(layer, np.stack([norm(t, w[f"{name}.input_layernorm.weight"], eps) for t in x]))
        post = w[f"{name}.post_attention_layernorm.weight"]
        return x + np.stack([self._feed_forward(layer, norm(t, post, eps)) for t in x])

    def _attention(self, layer: int, x: Array) -> Array:
        config, w, name = self.config, self.tensors, f"model.layers.{layer}.self_attn"
        D, eps, inv = config["head_dim"], config["rms_norm_eps"], frequencies(config, layer)
        slides = config["layer_types"][layer] == "sliding_attention"
        owner = config["attention_other_setting"] if slides else config
        heads, groups = owner["num_attention_heads"], owner["num_attention_groups"]

        def per_head(part: str, count: int) -> Array:
            y = (x @ w[f"{name}.{part}_proj.weight"].T).reshape(len(x), count, D)
            if part != "v":
                weight = w[f"{name}.{part}_norm.weight"]
                for t in range(len(x)):
                    for h in range(count):
                        y[t, h] = rotated(norm(y[t, h], weight, eps), t, inv)
            return y

        q, k, v = per_head("q", heads), per_head("k", groups), per_head("v", groups)
        gates = sigmoid(x @ w[f"{name}.g_proj.weight"].T)
        out = np.zeros((len(x), heads, D))
        for t in range(len(x)):
            first = max(0, t - config["sliding_window"] + 1) if slides else 0
            for h in range(heads):
                group = h // (heads // groups)
                scores = k[first : t + 1, group] @ q[t, h] * D**-0.5
                p = np.exp(scores - scores.max())
                out[t, h] = p / p.sum() @ v[first : t + 1, group] * gates[t, h]
        return out.reshape(len(x), -1) @ w[f"{name}.o_proj.weight"].T

    def _feed_forward(self, layer: int, x: Array) -> Array:
        config, w, name = self.config, self.tensors, f"model.layers.{layer}"

        def of(block: str) -> list[Array]:
            return [w[f"{name}.{block}.{part}_proj.weight"] for part in ("gate", "up", "down")]

        limit_shared = config["swiglu_limits_shared"][layer]
        if str(layer) not in config["moe_layers_enum"].split(","):
            return gated(x, *of("mlp"), limit_shared)
        scores = sigmoid(w[f"{name}.moe.gate.weight"] @ x)
        biased = scores + w[f"{name}.moe.router_bias"]
        chosen = sorted(range(len(scores)), key=lambda e: -biased[e])[: config["moe_top_k"]]
        weights = scores[chosen] / (scores[chosen].sum() + 1e-20) * config["moe_router_scaling_factor"]
        y = gated(x, *of("share_expert"), limit_shared)
        for e, weight in zip(chosen, weights, strict=True):
            gate, up, down = (stack[e] for stack in of("moe"))
            y = y + weight * gated(x, gate, up, down, config["swiglu_limits"][layer])
        return y
