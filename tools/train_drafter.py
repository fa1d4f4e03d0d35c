"""Trains the example's drafter: one Eagle3 layer that guesses what the example model will say next.

    python tools/train_drafter.py --minutes 45 --out DIR

writes DIR/bf16: config.json and weights in the style of the Eagle authors' own files (LlamaForCausalLMEagle3,
`midlayer`, `fc`, `lm_head`, `d2t`, `t2d`; the embedding is the target's and not stored). tools/quantize_drafter.py
quantizes it.

The target is the quantized example, as fewbits decodes it. A quarter of the training text is the example's own, the
rest is what the target makes of beginnings from there, greedily and at a temperature: a drafter is asked about nothing
else. Training is as drafting will be ("training-time test", Li et al. 2025): step 0 reads the target's states, each
further step the state that the drafter itself gave before. For the larger part of the time its weights are what 4-bit
codes will stand for. Needs the packages of tools/requirements.txt, and fewbits.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from compressed_tensors.quantization import fake_quantize, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from train_example import Corpus, FeedForward, Llama, Muon, Shape, is_heldout, schedule, standard_library

import fewbits
from fewbits.engine.llm import LLM
from fewbits.engine.request import SamplingParams
from fewbits.load import decode

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "stdlib-lm"
STEPS = 4  # draft tokens that training unrolls
DECAY = 0.9  # of the weight of each further step's loss
SHARPNESS = 1.4  # of what is learned, as a factor of the target's logits: it is the best guess that counts
BOUNDARIES = (2, Shape.num_hidden_layers // 2, Shape.num_hidden_layers - 3)  # Eagle3's own choice
INTERMEDIATE = 1024
GENERATING = 0.1  # of the time, in which the target writes text to train on
ROUNDED_FROM = 0.4  # of the steps' time: from then on weights are trained as they will be quantized
CODES = preset_name_to_scheme("W4A8", ["Linear"]).weights
PROMPT, ANSWER = 32, 224  # tokens of a text that the target continues, and of its continuation


# -------------------------------------------------------------------------------------------------- target


def load_target(folder: Path) -> Llama:
    """The target with the weights that its codes and scales stand for."""
    plan = fewbits.inspect(folder)
    assert plan.checkpoint is not None
    target = Llama(Shape(), Shape.num_hidden_layers)
    weights = {}
    with plan.checkpoint.reader() as reader:
        for row in plan.rows:
            linear, _ = decode(plan, row, reader)
            weights[f"{row.name}.weight"] = torch.from_numpy(linear.weight.dequantize()).float().reshape(row.shape)
    target.load_state_dict(weights)
    return target.eval().requires_grad_(False)


class Texts(NamedTuple):
    """Token ids int64 [rows, tokens] and what the target makes of all but the last of a row, in bfloat16: its states
    at the boundaries side by side, [rows, tokens - 1, 3 H], and what its head reads, [rows, tokens - 1, H].
    """

    ids: Tensor
    states: Tensor
    last: Tensor

    def rows(self, which: Tensor) -> Texts:
        return Texts(*(part[which] for part in self))


@torch.no_grad()
def read(target: Llama, ids: Tensor) -> Texts:
    """The target reads each text once: every step that trains on it finds that done."""
    H, (rows, tokens) = target.shape.hidden_size, ids.shape
    states = torch.empty(rows, tokens - 1, len(BOUNDARIES) * H, dtype=torch.bfloat16)
    last = torch.empty(rows, tokens - 1, H, dtype=torch.bfloat16)
    cos, sin = target.cos[: tokens - 1], target.sin[: tokens - 1]  # type: ignore[index]
    for some in torch.arange(rows).split(8):
        taken = []
        with torch.autocast("cpu", torch.bfloat16):
            x = target.model.embed_tokens(ids[some, :-1])
            for boundary, layer in enumerate(target.model.layers, 1):
                x = layer(x, cos, sin)
                if boundary in BOUNDARIES:
                    taken.append(x)
            states[some], last[some] = torch.cat(taken, dim=-1).bfloat16(), target.model.norm(x).bfloat16()
        print(f"{int(some[-1]) + 1} of {rows} texts read", end="\r", flush=True)
    print()
    return Texts(ids, states, last)


def continuations(llm: LLM, prompts: list[list[int]], temperature: float, answer: int) -> np.ndarray:
    """What the target makes of each prompt: int64 [prompts, prompt + answer]."""
    params = [
        SamplingParams(max_tokens=answer, temperature=temperature, seed=seed, ignore_eos=True)
        for seed in range(len(prompts))
    ]
    results = llm.generate(prompts, params)
    return np.array([[*prompt, *result.token_ids] for prompt, result in zip(prompts, results, strict=True)])


# ------------------------------------------------------------------------------------------------- drafter


class Attention(nn.Module):
    """Over [embedding ; state]. Step s of row j sees step 0 of the rows up to j, and its own steps 1 … s."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
        width = 2 * shape.hidden_size
        self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, seen: list[tuple[Tensor, Tensor]]) -> Tensor:
        """`seen` are keys and values of the steps before, to which this one's are added."""
        rows, length, _ = x.shape

        def split(y: Tensor, heads: int) -> Tensor:
            y = y.view(rows, length, heads, self.head_dim).transpose(1, 2)
            return y.repeat_interleave(self.heads // heads, dim=1)

        def rotate(y: Tensor) -> Tensor:
            low, high = y.chunk(2, dim=-1)
            return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)

        q = rotate(split(self.q_proj(x), self.heads)) * self.head_dim**-0.5
        seen.append((rotate(split(self.k_proj(x), self.kv_heads)), split(self.v_proj(x), self.kv_heads)))
        first_keys, first_values = seen[0]
        future = torch.full((length, length), -1e9, dtype=q.dtype).triu(1)
        scores = [q @ first_keys.mT + future]
        scores += [(q * keys).sum(-1, keepdim=True) for keys, _ in seen[1:]]
        weights = torch.softmax(torch.cat(scores, dim=-1).float(), dim=-1).to(q.dtype)
        y = weights[..., :length] @ first_values
        for step, (_, values) in enumerate(seen[1:]):
            y = y + weights[..., length + step, None] * values
        return self.o_proj(y.transpose(1, 2).reshape(rows, length, -1))


class MidLayer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.hidden_norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = FeedForward(shape)

    def forward(self, embedded: Tensor, state: Tensor, cos: Tensor, sin: Tensor, seen: list[Any]) -> Tensor:
        both = torch.cat((self.input_layernorm(embedded), self.hidden_norm(state)), dim=-1)
        x = state + self.self_attn(both, cos, sin, seen)
        return x + self.mlp(self.post_attention_layernorm(x))


class Drafter(nn.Module):
    """`ids` are the target's ids of the draft vocabulary, in order. It starts as the target's head on its highest
    state.
    """

    def __init__(self, target: Llama, ids: Tensor) -> None:
        super().__init__()
        self.shape = shape = Shape(intermediate_size=INTERMEDIATE, num_hidden_layers=1)
        H = shape.hidden_size
        self.fc = nn.Linear(len(BOUNDARIES) * H, H, bias=False)
        self.midlayer = MidLayer(shape)
        self.norm = nn.RMSNorm(H, shape.rms_norm_eps)
        self.lm_head = nn.Linear(H, len(ids), bias=False)
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("said", target.lm_head.weight[ids], persistent=False)  # by the target, of these tokens
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    nn.init.zeros_(parameter)
                elif parameter.ndim == 2:
                    nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            self.fc.weight *= 0.1
            self.fc.weight[:, -H:] += torch.eye(H)
            self.norm.weight.copy_(target.model.norm.weight)
            self.lm_head.weight.copy_(target.lm_head.weight[ids])

    def unroll(self, target: Llama, states: Tensor, tokens: list[Tensor] | None, first: Tensor) -> list[Tensor]:
        """Draft logits [rows, length, draft vocabulary] of STEPS steps.

        Row j of step 0 reads the target's state of token j and token j + 1, which `first` holds; of step s, what step
        s - 1 gave and token j + 1 + s: that of `tokens`, or without them its own best guess.
        """
        length = states.shape[1]
        state = self.fc(states)
        seen: list[Any] = []
        logits = []
        now = first
        for step in range(STEPS):
            cos, sin = (table[step : step + length].to(states.dtype) for table in (target.cos, target.sin))  # type: ignore[index]
            embedded = target.model.embed_tokens(now).to(states.dtype)
            state = self.midlayer(embedded, state, cos, sin, seen)
            logits.append(self.lm_head(self.norm(state)))
            if step + 1 < STEPS:
                now = tokens[step] if tokens is not None else self.ids[logits[-1].argmax(-1)]
        return logits


def as_codes(weight: Tensor) -> Tensor:
    """What is left of a weight [N, K] when it is quantized to CODES, as llm-compressor does it."""
    stored = weight.bfloat16()
    groups = stored.unflatten(1, (-1, CODES.group_size))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), CODES)
    return fake_quantize(stored, scale, zero, CODES).float()


@contextmanager
def quantized(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within, these are what their codes stand for: gradients are of that, steps are taken by the weights themselves
    (Courbariaux et al. 2015).
    """
    kept = [weight.data for weight in weights]
    for weight in weights:
        weight.data = as_codes(weight.data)
    try:
        yield
    finally:
        for weight, data in zip(weights, kept, strict=True):
            weight.data = data


def loss_of(drafter: Drafter, target: Llama, texts: Texts) -> Tensor:
    """Cross-entropy to what the target says, sharpened, of the draft vocabulary."""
    length = texts.ids.shape[1] - STEPS - 1
    tokens = [texts.ids[:, 2 + step : 2 + step + length] for step in range(STEPS - 1)]
    wanted = torch.softmax(SHARPNESS * nn.functional.linear(texts.last, drafter.said).float(), dim=-1)
    total = torch.zeros(())
    drafts = drafter.unroll(target, texts.states[:, :length], tokens, texts.ids[:, 1 : 1 + length])
    for step, logits in enumerate(drafts):
        logits = logits.float()
        expected = torch.logsumexp(logits, dim=-1) - (logits * wanted[:, 1 + step : 1 + step + length]).sum(-1)
        total = total + DECAY**step * expected.mean()
    return total


@torch.no_grad()
def judge(drafter: Drafter, target: Llama, texts: Texts) -> str:
    """On greedy continuations of the target: tokens per pass at STEPS draft tokens, the bonus token counted, and how
    often the i-th draft token is accepted.
    """
    length = texts.ids.shape[1] - STEPS - 1
    passes = tokens = 0
    at = [0] * STEPS
    for some in torch.arange(len(texts.ids)).split(16):
        ids = texts.ids[some]
        drafts = drafter.unroll(target, texts.states[some, :length].float(), None, ids[:, 1 : 1 + length])
        guesses = torch.stack([drafter.ids[logits.argmax(-1)] for logits in drafts], dim=-1)
        truth = torch.stack([ids[:, 2 + step : 2 + step + length] for step in range(STEPS)], dim=-1)
        accepted = (guesses == truth).long().cumprod(-1).sum(-1)
        for row in accepted.tolist():
            place = PROMPT - 1  # the last token of the prompt has a state, the first of the answer is known
            while place < length:
                passes += 1
                tokens += row[place] + 1
                for position in range(row[place]):
                    at[position] += 1
                place += row[place] + 1
    return f"{tokens / passes:.3f} tokens a pass, {' '.join(f'{count / passes:.3f}' for count in at)}"


# ---------------------------------------------------------------------------------------- export, training


def export(drafter: Drafter, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shape = drafter.shape
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": shape.vocab_size,
        "draft_vocab_size": len(drafter.ids),
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        # Numbers of layers whose output is read, as the Eagle authors count: one less than the boundary behind it.
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": [boundary - 1 for boundary in BOUNDARIES],
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = {name: tensor.detach().bfloat16().contiguous() for name, tensor in drafter.state_dict().items()}
    ids = drafter.ids
    weights["d2t"] = ids - torch.arange(len(ids))
    weights["t2d"] = torch.zeros(shape.vocab_size, dtype=torch.bool).index_fill_(0, ids, True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def prompts_of(ids: np.ndarray, count: int, source: random.Random) -> list[list[int]]:
    starts = [source.randrange(len(ids) - PROMPT) for _ in range(count)]
    return [ids[start : start + PROMPT].tolist() for start in starts]


def train(arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    begin = time.monotonic()
    sources = standard_library()
    training = [text for name, text in sources.items() if not is_heldout(name, text)]
    heldout = [path.read_text(encoding="utf-8") for path in sorted((EXAMPLE / "heldout").glob("*.txt"))]
    tokenizer = Tokenizer.from_file(str(arguments.target / "tokenizer.json"))
    corpus = Corpus(training, tokenizer, seed=1)
    target = load_target(arguments.target)
    source = random.Random(2)

    llm = LLM(arguments.target, threads=arguments.threads)
    whole = np.concatenate(corpus.whole)
    batches = []
    while (time.monotonic() - begin) / 60 < arguments.minutes * GENERATING:
        temperature = (0.0, 0.8)[len(batches) % 2]
        batches.append(continuations(llm, prompts_of(whole, 64, source), temperature, ANSWER))
        print(f"{64 * ANSWER * len(batches) / 1e6:.2f} M tokens of the target's own text", end="\r", flush=True)
    own = np.concatenate(batches)
    unseen = np.concatenate([np.array(tokenizer.encode(text).ids) for text in heldout])
    answers = torch.from_numpy(continuations(llm, prompts_of(unseen, 64, random.Random(3)), 0.0, ANSWER))
    del llm

    said = np.bincount(
        np.concatenate([whole, own[:, PROMPT:].reshape(-1)]).astype(np.int64), minlength=Shape.vocab_size
    )
    ids = torch.from_numpy(np.sort(np.argsort(-said, kind="stable")[: arguments.draft_vocabulary]).copy())
    covered = said[ids.numpy()].sum() / said.sum()
    print(f"\n{len(ids)} tokens that make up {covered:.1%} of all text", flush=True)
    judged = read(target, answers)
    texts = read(target, torch.cat((torch.from_numpy(own), corpus.batch(len(own) // 3, PROMPT + ANSWER - 1))))
    drafter = Drafter(target, ids)
    matrices = [p for p in drafter.parameters() if p.ndim == 2]
    rest = [p for p in drafter.parameters() if p.ndim == 1]
    muon = Muon([p for p in matrices if p is not drafter.lm_head.weight], lr=0.008, momentum=0.95, weight_decay=0.05)
    adam = torch.optim.AdamW(
        [{"params": [drafter.lm_head.weight], "lr": 0.001}, {"params": rest, "lr": 0.002}],
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    optimizers = (muon, adam)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    started, budget = time.monotonic(), arguments.minutes * 60
    step, mean = 0, 0.0
    order = torch.empty(0, dtype=torch.int64)
    while (seconds := time.monotonic() - begin) < budget:
        progress = (time.monotonic() - started) / (budget - (started - begin))
        factor = schedule(progress)
        for optimizer, lrs in zip(optimizers, peaks, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * factor
        if len(order) < arguments.rows:
            order = torch.randperm(len(texts.ids))
        some, order = order[: arguments.rows], order[arguments.rows :]
        rounded = matrices if progress > ROUNDED_FROM else []
        with quantized(rounded):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(drafter, target, texts.rows(some))
            loss.backward()
        nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        mean = loss.item() if step == 1 else 0.97 * mean + 0.03 * loss.item()
        if step % 50 == 0:
            text = f"step {step}  {seconds / 60:.1f} min  rate {factor:.2f}  loss {mean:.3f}"
            if step % 200 == 0:
                with quantized(matrices):
                    text += "  held out: " + judge(drafter, target, judged)
                export(drafter, arguments.out / "bf16")
            print(text, flush=True)
    export(drafter, arguments.out / "bf16")
    print(f"done: {step} steps; held out: {judge(drafter, target, judged)}")
    with quantized(matrices):
        print(f"quantized: {judge(drafter, target, judged)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=EXAMPLE / "w4a16-asym", help="the example (w4a16-asym)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the result")
    parser.add_argument("--minutes", type=float, default=45, help="wall-clock budget (default: 45)")
    parser.add_argument("--draft-vocabulary", type=int, default=3072, help="tokens it can draft (default: 3072)")
    parser.add_argument("--rows", type=int, default=8, help="texts a step (default: 8)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
