"""What speculation gains: passes over several tokens, and decoding with a drafter, beside the machine's limits.

    python tools/make_synthetic.py --out MODELS w4a16 w8a8 bf16 --head
    python tools/make_synthetic.py --out MODELS w8a8 --drafter
    python bench/speculation.py passes MODELS/w4a16-head MODELS/w8a8-head
    python bench/speculation.py decode MODELS/w4a16-head --draft MODELS/w8a8-drafter --acceptance 0.7,0.5,0.4,0.3
    python bench/speculation.py example --draft-tokens 4
    python bench/speculation.py trees

Rows of results/speculation_passes.csv and speculation_decode.csv are replaced; tools/generate_docs.py shows them.

`passes`: one sequence with 64 tokens in the cache, 1 + k tokens at once, k = 0 … 8, logits and sampling of all. The
limit is the larger of two times, bytes over the measured reading rate and multiplications over the dot's peak. Where
memory is now fast and now slow, `--reads 50,70` counts passes during which it read so many GB/s.

`decode`: a drafter of the true shape and weights of no meaning drafts k tokens, and does all its work; what it proposes
is then replaced by tokens that are accepted at the given rates (of each position, of all rounds). Beside it stands what
the limits of the passes allow: tokens a pass over the limits of target and drafter, against the limit of a plain step.

`trees`: what a draft token is worth in tokens a pass, as the next of the chain or as a second guess beside one of it;
and the tokens a pass of the best trees of so many rows, beside the chain's.

`example`: greedy answers to 64 prompts of held-out code, with and without the drafter, in turns.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))

from heldout import texts  # noqa: E402
from processor import processor  # noqa: E402
from svg import GRID, document, text, ticks  # noqa: E402

from fewbits.bench.cost import Cost, Rates, Span, pass_cost  # noqa: E402
from fewbits.bench.passes import CONTEXT, Case, Passes, decode, verify  # noqa: E402
from fewbits.engine import limits  # noqa: E402
from fewbits.engine.llm import LLM  # noqa: E402
from fewbits.engine.request import Request, SamplingParams  # noqa: E402
from fewbits.engine.speculative.driver import Driver  # noqa: E402
from fewbits.engine.speculative.eagle import Eagle  # noqa: E402
from fewbits.engine.speculative.lengths import Fixed  # noqa: E402
from fewbits.kernels.cpu.ops import CpuOps  # noqa: E402
from fewbits.load_drafter import LoadedDrafter, load_drafter  # noqa: E402

RESULTS = Path(__file__).parent / "results"
EXAMPLE = ROOT / "examples" / "stdlib-lm" / "w4a16-asym"
MOST = 8  # draft tokens
PATIENCE = 600  # seconds until memory reads what was asked for
RANKS = 4  # guesses of one step that are looked at
PASSES, DECODE = RESULTS / "speculation_passes.csv", RESULTS / "speculation_decode.csv"
KEY = ("processor", "model", "draft", "draft_tokens")
COLOURS = ("#0969da", "#1a7f37", "#bf8700", "#cf222e", "#8250df")


def dot(rates: Rates) -> Any:
    return "bf16" if "bf16" in rates.dots else "f32"


# ---- passes


def timed(one: Passes, meter: limits.ReadMeter, reads: tuple[float, float] | None) -> tuple[Rates, float]:
    """Rates and seconds of a pass; with `reads`, of one before and after which memory reads so many GB/s."""

    def within(rate: float | None) -> bool:
        return reads is None or (rate is not None and reads[0] <= rate / 1e9 <= reads[1])

    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        rates = Rates(meter.rate(), limits.dot_rates())
        if within(rates.read):
            seconds = one.seconds()
            if within(meter.rate()):
                return rates, seconds
    raise SystemExit(f"memory didn't read what --reads says in {PATIENCE / 60:g} minutes")


def bounds(argument: str) -> tuple[float, float]:
    low, high = map(float, argument.split(","))
    return low, high


def passes(arguments: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    name = processor()
    if arguments.reads:
        name += ", memory at {:g} to {:g} GB/s".format(*arguments.reads)
    for folder in arguments.models:
        llm = LLM(folder)
        meter = limits.ReadMeter()
        cases: list[Case] = [decode(1), *(verify(1 + k) for k in range(1, MOST + 1))]
        its = [Passes(llm, case) for case in cases]
        times: list[list[float]] = [[] for _ in cases]
        shares: list[list[float]] = [[] for _ in cases]
        found: list[list[float]] = [[] for _ in cases]
        for _ in range(arguments.repeats):
            for index, (case, one) in enumerate(zip(cases, its, strict=True)):
                rates, seconds = timed(one, meter, arguments.reads)
                limit = pass_cost(llm.plan, llm._loaded.cache_layers, case.spans, dot(rates)).limit(rates)
                times[index].append(seconds)
                if limit is not None:
                    shares[index].append(limit / seconds)
                    found[index].append(limit)
        for case, seconds_, share, limit_ in zip(cases, times, shares, found, strict=True):
            row = {
                "processor": name,
                "model": folder.name,
                "tokens": case.tokens,
                "milliseconds": round(1e3 * statistics.median(seconds_), 3),
                "limit": round(1e3 * statistics.median(limit_), 3),
                "share": round(statistics.median(share), 3),
            }
            rows.append(row)
            print(
                "{model:<16}{tokens:>3} tokens {milliseconds:>9.3f} ms, limit {limit:>9.3f}, {share:.0%}".format(**row)
            )
    store(PASSES, rows, ("processor", "model", "tokens"))


def stored(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def store(path: Path, rows: Sequence[Mapping[str, Any]], key: Sequence[str]) -> None:
    """Put rows into a CSV, in the place of those with the same key."""
    merged = {tuple(row[name] for name in key): row for row in stored(path)}
    merged |= {tuple(str(row[name]) for name in key): {name: str(row[name]) for name in row} for row in rows}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged.values())


def by_processor(path: Path) -> dict[str, list[dict[str, str]]]:
    found: dict[str, list[dict[str, str]]] = {}
    for row in stored(path):
        found.setdefault(row["processor"], []).append(row)
    return found


def tables() -> str:
    """What was measured, for bench/README.md."""
    lines: list[str] = []
    for name, passes_ in by_processor(PASSES).items():
        models = list(dict.fromkeys(row["model"] for row in passes_))
        lines += ["", f"{name}:", "", f"| tokens | {' | '.join(models)} |", f"|--:|{'--:|' * len(models)}"]
        for tokens in range(1, MOST + 2):
            found = {row["model"]: row for row in passes_ if int(row["tokens"]) == tokens}
            cells = [f"{float(found[one]['milliseconds']):.1f} ms, {float(found[one]['share']):.0%}" for one in models]
            lines.append(f"| {tokens} | {' | '.join(cells)} |")
    for name, decoded in by_processor(DECODE).items():
        lines += [
            "",
            f"{name}:",
            "",
            "| Target | Drafter | k | tokens a pass | plain tokens/s | tokens/s | speed-up | of what limits allow |",
            "|---|---|--:|--:|--:|--:|--:|--:|",
        ]
        for row in decoded:
            share = f"{float(row['share_of_allowed']):.0%}" if row["share_of_allowed"] else "in cache"
            lines.append(
                f"| {row['model']} | {row['draft']} | {row['draft_tokens']} | {row['mean_tokens_per_pass']} |"
                f" {row['plain_tokens_per_s']} | {row['tokens_per_s']} | {row['speed_up']} | {share} |"
            )
    return "\n".join(lines[1:])


WIDTH, HEIGHT, LEFT, RIGHT, TOP = 640, 380, 60, 130, 60  # of a processor's part of the plot


def picture() -> str:
    """Milliseconds of a pass by its tokens, a line for each model, and dashed its limit; a part for each processor."""
    parts = by_processor(PASSES)
    lines = [text(f"{LEFT}", 22, "A pass over 1 + k tokens, in ms; dashed: what memory and dot product allow", "start")]
    for index, (name, rows) in enumerate(parts.items()):
        lines += part(name, rows, 22 + index * HEIGHT)
    return document(WIDTH, 22 + HEIGHT * len(parts), "Passes over several tokens", lines)


def part(name: str, rows: Sequence[Mapping[str, Any]], above: int) -> list[str]:
    top, bottom = above + TOP, above + HEIGHT - 50
    marks = ticks(0, max(float(row["milliseconds"]) for row in rows))

    def x(tokens: int) -> float:
        return LEFT + (tokens - 1) * (WIDTH - LEFT - RIGHT) / MOST

    def y(milliseconds: float) -> float:
        return bottom - milliseconds * (bottom - top) / marks[-1]

    lines = [text(f"{LEFT}", above + 30, name, "start")]
    for mark in marks:
        lines.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(mark):g}" y2="{y(mark):g}" stroke="{GRID}"/>')
        lines.append(text(f"{LEFT - 8}", y(mark) + 4, f"{mark:g}", "end"))
    lines += [text(f"{x(tokens):g}", bottom + 20, str(tokens), "middle") for tokens in range(1, MOST + 2)]
    groups = itertools.groupby(rows, key=lambda row: row["model"])
    for (model, group), colour in zip(groups, itertools.cycle(COLOURS), strict=False):
        points = list(group)
        for key, dash in (("milliseconds", ""), ("limit", ' stroke-dasharray="4 3"')):
            path = " ".join(f"{x(int(row['tokens'])):g},{y(float(row[key])):.1f}" for row in points)
            lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        last = points[-1]
        lines.append(text(f"{x(int(last['tokens'])) + 8:g}", y(float(last["milliseconds"])) + 4, str(model), "start"))
    return lines


# ---- decoding


class Replaced(Eagle):
    """Does all of a drafter's work; its guesses are replaced by the next tokens of the `answer`, or others than
    these.
    """

    def __init__(self, loaded: LoadedDrafter, max_pages: int, answer: Sequence[int], rates: Sequence[float]) -> None:
        super().__init__(loaded, max_pages)
        self._answer, self._random = answer, random.Random(0)
        # Of each position, given those before it.
        self._rates = [later / earlier for earlier, later in zip((1.0, *rates), rates, strict=False)]

    def propose(self, wanted: Mapping[int, tuple[Request, int]]) -> None:
        super().propose(wanted)
        for request, _ in wanted.values():
            place, count = len(request.output_ids), len(request.draft_ids)
            draft = list(self._answer[place : place + count])
            right = [self._random.random() < rate for rate in self._rates[: len(draft)]]
            first = next((index for index, one in enumerate(right) if not one), len(draft))
            request.draft_ids = [token if index < first else token ^ 1 for index, token in enumerate(draft)]


def allowed(llm: LLM, drafter: LoadedDrafter, k: int, per_pass: float, rates: Rates) -> float:
    """The speed-up that the limits of the passes allow: tokens a second with k draft tokens over those without."""
    target = llm.plan
    layers = llm._loaded.cache_layers
    plain = _limit(pass_cost(target, layers, [Span(1, CONTEXT)], dot(rates)), rates)
    verifying = _limit(pass_cost(target, layers, [Span(1 + k, CONTEXT + k, 1 + k)], dot(rates)), rates)
    of_drafter = drafter.planned.plan
    without_fc = replace(of_drafter, rows=[row for row in of_drafter.rows if row.name != "fc"])
    kept = drafter.cache_layers
    first = _limit(pass_cost(of_drafter, kept, [Span(round(per_pass), CONTEXT)], dot(rates)), rates)
    further = _limit(pass_cost(without_fc, kept, [Span(1, CONTEXT)], dot(rates)), rates)
    return per_pass / (verifying + first + (k - 1) * further) * plain


def _limit(cost: Cost, rates: Rates) -> float:
    limit = cost.limit(rates)
    assert limit is not None, "the machine's reading rate isn't known"
    return limit


def decoding(arguments: argparse.Namespace) -> None:
    acceptance = [float(part) for part in arguments.acceptance.split(",")]
    k = len(acceptance)
    llm = LLM(arguments.model, draft=arguments.draft, draft_tokens=k)
    driver, drafter = llm._driver, llm.drafter
    assert driver is not None and drafter is not None
    prompt = [random.Random(0).randrange(llm.vocabulary) for _ in range(CONTEXT)]
    params = SamplingParams(max_tokens=arguments.tokens, ignore_eos=True)
    llm._driver = None
    answer = llm.generate([prompt], params)[0].token_ids
    meter = limits.ReadMeter()
    plain, speculative, shares, gains = [], [], [], []
    for _ in range(arguments.repeats):
        rates = Rates(meter.rate(), limits.dot_rates())
        llm._driver = None
        plain.append(llm.generate([prompt], params)[0].decode_tokens_per_s or 0.0)
        llm._driver = Driver(Replaced(drafter, llm._cache.max_pages, answer, acceptance), Fixed(k))
        result = llm.generate([prompt], params)[0]
        assert result.token_ids == answer and result.speculation is not None
        speculative.append(result.decode_tokens_per_s or 0.0)
        gains.append(speculative[-1] / plain[-1])
        per_pass = result.speculation["mean_tokens_per_pass"]
        shares.append(gains[-1] / allowed(llm, drafter, k, per_pass, rates))
    found = {
        "processor": processor(),
        "model": arguments.model.name,
        "draft": arguments.draft.name,
        "draft_tokens": k,
        "mean_tokens_per_pass": round(per_pass, 3),
        "plain_tokens_per_s": round(statistics.median(plain), 2),
        "tokens_per_s": round(statistics.median(speculative), 2),
        "speed_up": round(statistics.median(gains), 3),
        "share_of_allowed": round(statistics.median(shares), 3),
    }
    print(json.dumps(found))
    store(DECODE, [found], KEY)


# ---- the example


def held_out(llm: LLM, seed: int = 0) -> list[list[int]]:
    """64 prompts of 32 tokens."""
    source = random.Random(seed)
    ids = [token for one in texts() for token in llm.encode(one)]
    return [ids[start : start + 32] for start in (source.randrange(len(ids) - 32) for _ in range(64))]


def example(arguments: argparse.Namespace) -> None:
    plain = LLM(EXAMPLE)
    drafted = LLM(EXAMPLE, draft=arguments.draft, draft_tokens=arguments.draft_tokens)
    params = SamplingParams(max_tokens=arguments.tokens, temperature=arguments.temperature, ignore_eos=True)
    gains, rates = [], []
    for prompt in held_out(plain, arguments.seed):
        [one], [other] = plain.generate([prompt], params), drafted.generate([prompt], params)
        assert one.token_ids == other.token_ids
        assert one.decode_tokens_per_s and other.decode_tokens_per_s
        gains.append(other.decode_tokens_per_s / one.decode_tokens_per_s)
        rates.append((one.decode_tokens_per_s, other.decode_tokens_per_s))
    assert drafted._driver is not None
    summary = drafted._driver.total.summary()
    name = EXAMPLE.name if not arguments.temperature else f"{EXAMPLE.name}, temperature {arguments.temperature:g}"
    found = {
        "processor": processor(),
        "model": f"the example ({name})",
        "draft": Path(arguments.draft).name,
        "draft_tokens": arguments.draft_tokens or "as pay",
        "mean_tokens_per_pass": round(summary["mean_tokens_per_pass"], 3),
        "plain_tokens_per_s": round(statistics.median(rate for rate, _ in rates)),
        "tokens_per_s": round(statistics.median(rate for _, rate in rates)),
        "speed_up": round(statistics.median(gains), 3),
        "share_of_allowed": "",
    }
    print(json.dumps(found | {"per_position": [round(share, 3) for share in summary["per_position"]]}))
    store(DECODE, [found], KEY)


# ---- trees


class RankedOps(CpuOps):
    """Keeps the best tokens of each step of a drafter, for which its operations run one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[list[int]] = []

    def fused(self, block: Any, widths: Any, caches: int) -> None:
        return None

    def best_tokens(self, logits: Any, ids: Any, among: bool, *others: Any) -> None:
        super().best_tokens(logits, ids, among, *others)
        assert ids is not None and not among
        self.steps += [ids[(-row).argsort()[:RANKS]].tolist() for row in logits]


class Ranked(Eagle):
    """Of each round with one request: the place of its first draft token, and the best tokens of each step."""

    def __init__(self, loaded: LoadedDrafter, max_pages: int, ops: RankedOps) -> None:
        super().__init__(loaded, max_pages)
        self._ranked = ops
        self.rounds: list[tuple[int, list[list[int]]]] = []

    def propose(self, wanted: Mapping[int, tuple[Request, int]]) -> None:
        [(request, _)] = wanted.values()
        self._ranked.steps = []
        super().propose(wanted)
        self.rounds.append((request.computed + 1, self._ranked.steps))


def trees(arguments: argparse.Namespace) -> None:
    """Prints, of answers to held-out code, how often all before a step of the chain is right and its first, second, …
    guess too; and the tokens a pass that follow from it.
    """
    llm, ops = LLM(EXAMPLE, draft=arguments.draft, draft_tokens=MOST), RankedOps()
    drafter = load_drafter(arguments.draft, replace(llm._loaded, ops=ops))
    hits, rounds = [[0] * RANKS for _ in range(MOST)], 0
    for prompt in held_out(llm):
        ranked = Ranked(drafter, llm._cache.max_pages, ops)
        llm._driver = Driver(ranked, Fixed(MOST))
        params = SamplingParams(max_tokens=arguments.tokens, ignore_eos=True, temperature=arguments.temperature)
        known = prompt + llm.generate([prompt], params)[0].token_ids
        for place, steps in ranked.rounds:
            if len(steps) < MOST or place + MOST > len(known):
                continue
            rounds += 1
            for step, best in enumerate(steps):
                rank = best.index(known[place + step]) if known[place + step] in best else RANKS
                if rank < RANKS:
                    hits[step][rank] += 1
                if rank:
                    break
    shares = [[count / rounds for count in ranks] for ranks in hits]
    print("step," + ",".join(f"guess {rank + 1}" for rank in range(RANKS)))
    for step, ranks in enumerate(shares, 1):
        print(f"{step}," + ",".join(f"{share:.3f}" for share in ranks))
    # Behind another guess the chain is taken to go on as well as behind the first: more than it can.
    first = shares[0][0]
    others = [ranks[rank] * first**further for ranks in shares for rank in range(1, RANKS) for further in range(MOST)]
    chain = [ranks[0] for ranks in shares]
    print("rows,chain,tree at most")
    for rows in range(1, MOST + 1):
        best = sum(sorted(chain + others, reverse=True)[:rows])
        print(f"{rows},{1 + sum(chain[:rows]):.2f},{1 + best:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    of_passes = commands.add_parser("passes")
    of_passes.add_argument("models", type=Path, nargs="+")
    of_passes.add_argument("--repeats", type=int, default=5)
    of_passes.add_argument(
        "--reads", type=bounds, metavar="LOW,HIGH", help="GB/s that memory must read before and after"
    )
    of_passes.set_defaults(run=passes)
    of_decoding = commands.add_parser("decode")
    of_decoding.add_argument("model", type=Path)
    of_decoding.add_argument("--draft", type=Path, required=True)
    of_decoding.add_argument("--acceptance", required=True, help="share of rounds whose draft token i is accepted")
    of_decoding.add_argument("--tokens", type=int, default=128)
    of_decoding.add_argument("--repeats", type=int, default=5)
    of_decoding.set_defaults(run=decoding)
    of_trees = commands.add_parser("trees")
    of_trees.add_argument("--draft", default=str(EXAMPLE.parent / "drafter-w4a8"))
    of_trees.add_argument("--temperature", type=float, default=0.0)
    of_trees.add_argument("--tokens", type=int, default=128)
    of_trees.set_defaults(run=trees)
    of_example = commands.add_parser("example")
    of_example.add_argument("--draft", default=str(EXAMPLE.parent / "drafter-w4a8"), help="a drafter, or ngram")
    of_example.add_argument("--draft-tokens", type=int)
    of_example.add_argument("--temperature", type=float, default=0.0)
    of_example.add_argument("--tokens", type=int, default=128)
    of_example.add_argument("--seed", type=int, default=0)
    of_example.set_defaults(run=example)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
