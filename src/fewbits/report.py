"""The plan as people and scripts read it: a table, a line, a JSON object. Nothing is computed here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import regex

from fewbits.draft_plan import DraftPlan
from fewbits.errors import FewbitsError, printable
from fewbits.plan import LoadPlan, Row
from fewbits.spec import WHOLE, ActSpec, WeightSpec

SCHEMA = 1
_encode = json.JSONEncoder(ensure_ascii=False).encode


def to_json(plan: LoadPlan, draft: DraftPlan | None = None) -> dict[str, Any]:
    """The object of `fewbits inspect --json`; keys may be added, never renamed."""
    result = _frame(plan, draft)
    result["modules"] = [
        {"name": row.name, **first, "tensors": list(row.tensors), **last} for row, first, last in _modules(plan.rows)
    ]
    return result


def write_json(plan: LoadPlan, stream: IO[str], draft: DraftPlan | None = None) -> None:
    """`to_json` as text. Of each module only names are encoded anew: 0.8 s for a million tensors, json.dump takes 7."""
    before, after = _encode(_frame(plan, draft)).split('"modules": []', 1)
    stream.write(f'{before}"modules": [')
    texts: dict[int, tuple[str, str]] = {}
    separator = ""
    for row, first, last in _modules(plan.rows):
        found = texts.get(id(first))
        if found is None:
            found = texts[id(first)] = (_inside(first), _inside(last))
        tensors = ", ".join(map(_encode, row.tensors))  # half the time that encoding the tuple takes
        stream.write(f'{separator}{{"name": {_encode(row.name)}, {found[0]}, "tensors": [{tensors}], {found[1]}}}')
        separator = ", "
    stream.write(f"]{after}\n")


def _frame(plan: LoadPlan, draft: DraftPlan | None = None) -> dict[str, Any]:
    """The whole object, without its modules; the drafter's stand behind them."""
    readable = plan.failure is None
    frame = {
        "schema": SCHEMA,
        "model": {
            "family": plan.family,
            "parameters": plan.parameters,
            "bytes": plan.nbytes,
            "format": plan.format.name if plan.format is not None else None,
        },
        "modules": [],
        "leftovers": {
            "tensors": plan.leftover_tensors,
            "config_keys": plan.config_keys,
            "patterns_without_match": plan.patterns_without_match,
        },
        "kv_cache": _kv_cache(plan),
        "warnings": [_notice_line(notice.code, notice.module, notice.text) for notice in plan.warnings],
        "errors": [_notice_line(notice.code, notice.module, notice.text) for notice in plan.errors],
        "memory": {
            "weights": plan.weight_bytes() if readable else None,
            "kv_per_token": plan.kv_bytes_per_token(),
        },
    }
    if draft is not None:
        beside = {"reads_behind_layers": list(draft.boundaries), "because": draft.why, "of_target": draft.of_target}
        frame["drafter"] = to_json(draft.plan) | beside
    return frame


def _modules(rows: Iterable[Row]) -> Iterator[tuple[Row, dict[str, Any], dict[str, Any]]]:
    """Each row, and what it says beside its names: before its tensors and after them. Rows that are alike share it."""
    alike: dict[tuple[object, ...], tuple[dict[str, Any], dict[str, Any]]] = {}
    for row in rows:
        key = (row.kind, row.shape, id(row.spec), row.dtype, row.decided_by, id(row.execution))
        found = alike.get(key)
        if found is None:
            weight, act = row.spec.weight, row.spec.act
            first = {
                "kind": row.kind,
                "shape": list(row.shape),
                "weight": _weight(weight, row.shape) if weight.quantized else None,
                "act": _act(act) if act is not None else None,
                "dtype": row.dtype,
            }
            last = {
                "decided_by": row.decided_by,
                "kernel": row.kernel.name if row.kernel is not None else None,
                "executed_as": row.executed_as,
                "reason": row.reason,
            }
            found = alike[key] = (first, last)
        yield row, *found


def _inside(fields: dict[str, Any]) -> str:
    """The members of an object, without its braces."""
    return _encode(fields)[1:-1]


def _notice_line(code: str, module: str, text: str) -> str:
    return f"{code}: {module}: {text}"


def _weight(spec: WeightSpec, shape: tuple[int, ...]) -> dict[str, Any]:
    result: dict[str, Any] = {
        "kind": spec.kind,
        "bits": spec.bits,
        "block": [size if size != WHOLE else shape[axis] for axis, size in enumerate(spec.block)],
        "scale_dtype": spec.scale_dtype,
        "zero_point": spec.zero_point != "none",
        "global_scale": spec.global_scale,
        "act_order": spec.act_order,
    }
    if spec.kind == "float":
        result |= {"exponent": spec.exponent, "mantissa": spec.mantissa}
    return result


def _act(spec: ActSpec) -> dict[str, Any]:
    result: dict[str, Any] = {
        "kind": spec.kind,
        "bits": spec.bits,
        "per": spec.per,
        "group_size": spec.group_size,
        "dynamic": spec.dynamic,
        "symmetric": spec.symmetric,
        "global_scale": spec.global_scale,
    }
    if spec.kind == "float":
        result |= {"exponent": spec.exponent, "mantissa": spec.mantissa}
    return result


def _kv_cache(plan: LoadPlan) -> list[dict[str, Any]] | None:
    scheme = plan.kv_cache
    if scheme is None:
        return None
    return [
        {
            "layer": layer,
            "kind": scheme.kind,
            "bits": scheme.bits,
            "per": "head" if scheme.per == "group" else scheme.per,
            "dynamic": scheme.dynamic,
        }
        for layer in sorted(plan.kv_scales)
    ]


def gigabytes(count: float) -> str:
    """Bytes for people: decimal units, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5 or unit == "GB":
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    raise AssertionError("the last unit takes every size")


def summary(plan: LoadPlan) -> str:
    """One line: family, format, size, and how the modules are stored."""
    specs: dict[str, int] = {}
    for row in plan.rows:
        if row.kind in ("linear", "head", "expert", "router") and row.stored:
            specs[str(row.spec)] = specs.get(str(row.spec), 0) + 1
    stored = ", ".join(f"{count} x {spec}" for spec, count in specs.items())
    name = plan.format.name if plan.format is not None and plan.format.name else "not quantized"
    size = f"{plan.parameters:,} parameters in {gigabytes(plan.nbytes)}" if plan.parameters and plan.nbytes else ""
    return printable(f"{plan.family or 'unknown family'}, {name}, {size}: {stored}")


def drafter(found: DraftPlan) -> str:
    """One line: the drafter's summary, which states of the target it reads, and what of the target it takes over."""
    return printable("; ".join((f"drafter: {summary(found.plan)}", *_beside_target(found))))


def _beside_target(found: DraftPlan) -> Iterator[str]:
    if found.boundaries:
        yield f"reads the states behind layers {', '.join(map(str, found.boundaries))} ({found.why})"
    for part, why in found.of_target.items():
        yield f"its {part} is the model's ({why})"


def print_draft(found: DraftPlan, stream: IO[str]) -> None:
    """A drafter's table, and what it has to do with its target."""
    print_table(found.plan, stream)
    lines = list(_beside_target(found))
    if lines:
        stream.write("\nbeside its target:\n" + "".join(f"  {printable(line)}\n" for line in lines))


@dataclass(slots=True)
class _Lines:
    """Rows of the table that differ only in the numbers of their names."""

    row: Row
    numbers: list[tuple[int, ...]] = field(default_factory=list)


_NUMBER = regex.compile(r"\d+")


def _folded(rows: Iterable[Row]) -> Iterator[tuple[str, int, Row]]:
    """(name with the numbers that vary as ranges, how many, one of them)."""
    groups: dict[tuple[object, ...], _Lines] = {}
    for row in rows:
        pattern = _NUMBER.sub("#", row.name)
        decided = _NUMBER.sub("#", row.decided_by) if "target" not in row.decided_by else row.decided_by
        key = (pattern, row.shape, row.spec, row.executed_as, row.kernel, row.reason, decided)
        group = groups.setdefault(key, _Lines(row))
        group.numbers.append(tuple(int(number) for number in _NUMBER.findall(row.name)))
    for group in groups.values():
        columns = [sorted(set(column)) for column in zip(*group.numbers, strict=True)]
        ranges = [_ranges(column) for column in columns]
        parts = _NUMBER.split(group.row.name)
        name = "".join(text + number for text, number in zip(parts, [*ranges, ""], strict=True))
        yield name, len(group.numbers), group.row


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] → {0-2,5}; a single number stays bare."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in parts]
    return texts[0] if len(numbers) == 1 else "{" + ",".join(texts) + "}"


def print_table(plan: LoadPlan, stream: IO[str]) -> None:
    """The plan for people: modules that differ only in their numbers folded into one line."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=stream, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 200
    if plan.rows:
        console.print(summary(plan))
        console.print()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("module", "count", "shape", "stored as", "runs as", "decided by"):
        table.add_column(title, justify="right" if title == "count" else "left", overflow="fold")
    styles = {
        "native": "",
        "reference": "yellow",
        "dequantized": "yellow",
        "refused": "red",
        "not_run": "dim",
    }
    lines = list(_folded(plan.rows))
    for name, count, row in lines:
        how = row.kernel.name if row.kernel is not None else row.executed_as
        shape = "x".join(str(size) for size in row.shape)
        cells = (name, str(count), shape, row.stored_as or "-", how, row.decided_by)
        table.add_row(*(Text(printable(cell)) for cell in cells), style=styles[row.executed_as])
    console.print(table)
    reasons: dict[str, str] = {}
    for _, _, row in lines:
        if row.executed_as in ("reference", "dequantized", "not_run") and row.reason:
            what = row.spec if row.stored and row.spec.weight.bits else row.name
            reasons.setdefault(f"{row.executed_as}: {what}", row.reason)
    _print_rest(plan, reasons, console, Text)


def _print_rest(plan: LoadPlan, reasons: dict[str, str], console: Any, text: Any) -> None:
    blocks = (
        ("why not native", [f"{what}: {why}" for what, why in reasons.items()], ""),
        ("tensors that belong to no module", plan.leftover_tensors, ""),
        ("config keys that nothing reads", plan.config_keys, ""),
        ("warnings", [str(notice) for notice in plan.warnings], "yellow"),
        ("errors", [str(notice) for notice in plan.errors], "red"),
    )
    for title, lines, style in blocks:
        if lines:
            console.print()
            console.print(text(f"{title}:", style="bold"))
            for line in lines[:20]:
                console.print(text(f"  {printable(line)}", style=style))
            if len(lines) > 20:
                console.print(text(f"  … and {len(lines) - 20} more (--json lists them all)"))
    if plan.failure is None:
        per_token = plan.kv_bytes_per_token()
        cache = f", {gigabytes(per_token)} of KV cache a token" if per_token else ""
        console.print()
        console.print(text(f"memory: {gigabytes(plan.weight_bytes())} of weights{cache}"))


def failure_text(error: FewbitsError) -> str:
    return f"error: {error}"
