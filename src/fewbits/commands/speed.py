"""How fast a request was, and how near to what the memory allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewbits.commands.progress import say
from fewbits.engine import limits
from fewbits.engine.llm import LLM
from fewbits.engine.request import Result


def report(llm: LLM, result: Result) -> None:
    """One line on stderr."""
    parts = [f"prompt: {result.prompt_tokens} tokens" + _rate(result.prefill_tokens_per_s)]
    parts.append(f"answer: {result.generated_tokens} tokens" + _rate(result.decode_tokens_per_s))
    if result.decode_tokens_per_s is not None:
        entries = result.prompt_tokens + result.generated_tokens // 2
        parts.append(_share(llm.bytes_per_token(entries), result.decode_tokens_per_s))
    say("; ".join(part for part in parts if part))
    if result.speculation is not None:
        say(_speculation(result.speculation))


def _speculation(found: Mapping[str, Any]) -> str:
    if not found["drafted"]:
        return "drafted: nothing"
    shares = " ".join(f"{share:.0%}" for share in found["per_position"])
    return (
        f"drafted: {found['drafted']} tokens, {found['acceptance']:.0%} accepted (by position: {shares});"
        f" {found['mean_tokens_per_pass']:.2f} tokens a pass"
    )


def _rate(tokens_per_s: float | None) -> str:
    return "" if tokens_per_s is None else f", {tokens_per_s:.4g} tokens/s"


def _share(bytes_per_token: int, tokens_per_s: float) -> str:
    cache = limits.last_level_cache()
    if cache is not None and bytes_per_token < cache:
        return f"in cache ({bytes_per_token / 1e6:.1f} MB a token)"
    rate = limits.ReadMeter().rate()
    if rate is None:
        return ""
    share = bytes_per_token * tokens_per_s / rate
    return f"{share:.0%} of the memory limit ({bytes_per_token / 1e6:.1f} MB a token, {rate / 1e9:.1f} GB/s)"
