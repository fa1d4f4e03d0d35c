"""Trains the example: a small Llama-family language model on the Python standard library's sources.

    python tools/train_example.py --minutes 75 --out DIR

reads the `*.py` files that the running Python carries, trains a byte-level BPE tokenizer and a model on
them, and writes into DIR:

    bf16/       a complete Hugging Face folder: config, weights, tokenizer, generation config
    heldout/    the files that were kept out of training, as text
    state.pt    everything needed to go on with --resume
    log.csv     step, minutes, tokens, learning-rate factor, training loss, held-out loss

The learning-rate schedule follows elapsed time, not steps: the run ends when its minutes are over, however
fast the machine is. Needs the packages of tools/requirements.txt; runs on a CPU or a GPU.
"""

from __future__ import annotations

import argparse
import ast
import copy
import csv
import hashlib
import json
import math
import random
import re
import sysconfig
import textwrap
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

END_OF_TEXT = "<|endoftext|>"
BEGIN_OF_TEXT = "<|begin|>"
HELDOUT_SHARE = 0.026
# The run begins with few layers and ends with all: few learn the first half of a small token budget as well, at a
# third of the cost.
FIRST_LAYERS = 4
GROWTH_AT = 0.5

# Folders and files of which little can be learned: tests, generated tables, character maps.
SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "pydoc_data",
    "__pycache__",
}
SKIPPED_FILES = re.compile(r"_sysconfigdata.*|html/entities\.py|lib2to3/pgen2/.*literals.*|__phello__.*|this\.py")

# One newline with all blank lines and indentation after it; a word with the one character before it;
# up to three digits; a run of punctuation; other blanks.
PRE_TOKEN = r"\n[\n ]*|[^\n\w]?[^\W\d]+|\d{1,3}| ?[^\s\w]+|[^\S\n]+"


@dataclass(frozen=True)
class Shape:
    """The model's shape; the fields have the names of a Llama config."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 640
    num_hidden_layers: int = 14
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5


# ------------------------------------------------------------------------------------------------ sources


def standard_library() -> dict[str, str]:
    """Path below the standard library's folder → source text, normalised and without duplicates."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources: dict[str, str] = {}
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        name = relative.as_posix()
        if SKIPPED_FOLDERS.intersection(relative.parts) or SKIPPED_FILES.fullmatch(name):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            ast.parse(text)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue
        if "decoding_table" in text or len(text) < 200:
            continue
        text = "\n".join(line.rstrip().expandtabs(8) for line in text.splitlines()).strip("\n") + "\n"
        if text not in seen:
            seen.add(text)
            sources[name] = text
    return sources


def is_heldout(name: str, text: str) -> bool:
    """Whole files are held out, by a hash of their path: the same files for every Python that has them.

    Never one of the few giants, which would make up half of the slice.
    """
    digest = hashlib.sha256(f"stdlib-lm:{name}".encode()).digest()
    return len(text) <= 60_000 and int.from_bytes(digest[:8], "big") < HELDOUT_SHARE * 2**64


def definitions(text: str) -> Iterator[str]:
    """A file's functions and small classes, and the methods of its larger classes, as texts of their own."""
    lines = text.splitlines(keepends=True)

    def source(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
        return textwrap.dedent("".join(lines[first : node.end_lineno]))

    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield source(node)
        elif isinstance(node, ast.ClassDef):
            methods = [m for m in node.body if isinstance(m, ast.FunctionDef | ast.AsyncFunctionDef)]
            if len(methods) < 3:
                yield source(node)
            else:
                yield from (source(m) for m in methods)


# ---------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE; a line break together with its indentation can be one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKEN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, BEGIN_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin = tokenizer.token_to_id(BEGIN_OF_TEXT)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN_OF_TEXT} $A",
        pair=f"{BEGIN_OF_TEXT} $A $B",
        special_tokens=[(BEGIN_OF_TEXT, begin)],
    )
    return tokenizer


class Corpus:
    """An endless stream of training tokens.

    In every pass each file is shown either whole or as its definitions one by one, by a coin: whole files
    teach context, single definitions teach the model to begin with `def` and to stop at the end.
    """

    def __init__(self, texts: list[str], tokenizer: Tokenizer, seed: int) -> None:
        end = tokenizer.token_to_id(END_OF_TEXT)

        def encode(pieces: list[str]) -> list[np.ndarray]:
            return [np.array([*e.ids, end], np.uint16) for e in tokenizer.encode_batch(pieces)]

        self.whole = encode(texts)
        self.pieces = [encode(list(definitions(text))) for text in texts]
        self.random = random.Random(seed)
        self.stream = np.empty(0, np.uint16)
        self.position = 0
        self.passes = 0

    def __len__(self) -> int:
        return sum(map(len, self.whole))

    def _next_pass(self) -> None:
        documents: list[np.ndarray] = []
        for whole, pieces in zip(self.whole, self.pieces, strict=True):
            documents += pieces if pieces and self.random.random() < 0.5 else [whole]
        self.random.shuffle(documents)
        self.stream = np.concatenate([self.stream[self.position :], *documents])
        self.position = 0
        self.passes += 1

    def batch(self, rows: int, length: int) -> Tensor:
        """Token ids int64 [rows, length + 1]."""
        count = rows * length + 1
        while len(self.stream) - self.position < count:
            self._next_pass()
        flat = self.stream[self.position : self.position + count].astype(np.int64)
        self.position += count - 1
        windows = np.lib.stride_tricks.sliding_window_view(flat, length + 1)[::length]
        return torch.from_numpy(windows.copy())


# -------------------------------------------------------------------------------------------------- model


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads = shape.num_attention_heads, shape.num_key_value_heads
        self.head_dim = shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, _ = x.shape

        def split(y: Tensor, heads: int) -> Tensor:
            return y.view(rows, length, heads, self.head_dim).transpose(1, 2)

        def rotate(y: Tensor) -> Tensor:
            low, high = y.chunk(2, dim=-1)
            return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)

        q = rotate(split(self.q_proj(x), self.heads))
        k = rotate(split(self.k_proj(x), self.kv_heads))
        v = split(self.v_proj(x), self.kv_heads)
        if x.device.type == "cpu" and length <= 256:  # twice as fast there as the fused kernel, both ways
            k, v = (y.repeat_interleave(self.heads // self.kv_heads, dim=1) for y in (k, v))
            future = torch.full((length, length), -1e9, dtype=q.dtype).triu(1)
            y = torch.softmax(q @ k.mT * self.head_dim**-0.5 + future, dim=-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(rows, length, -1))


class FeedForward(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = FeedForward(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, shape: Shape, layers: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(layers))
        self.norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)


class Llama(nn.Module):
    """The Llama architecture, with transformers' parameter names: the state dict is the checkpoint."""

    def __init__(self, shape: Shape, layers: int) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape, layers)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        frequency = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
        angle = torch.outer(torch.arange(shape.max_position_embeddings).float(), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if "embed_tokens" in name:
                nn.init.normal_(parameter, std=0.5)
            elif name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                nn.init.zeros_(parameter)  # every block starts as the identity
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids int64 [rows, length] → logits [rows, length, vocabulary]."""
        x = self.model.embed_tokens(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]  # type: ignore[index]
        if torch.is_autocast_enabled(ids.device.type):
            x, cos, sin = x.bfloat16(), cos.bfloat16(), sin.bfloat16()
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return self.lm_head(self.model.norm(x))

    def grow(self) -> list[Layer]:
        """Brings the model to its full depth without changing what it computes; returns the new layers.

        Each layer is followed by copies of itself, whose output projections are zero.
        """
        old, depth = list(self.model.layers), self.shape.num_hidden_layers
        layers: list[Layer] = []
        new: list[Layer] = []
        for position in range(depth):
            source = old[position * len(old) // depth]
            if source in layers:
                source = copy.deepcopy(source)
                nn.init.zeros_(source.self_attn.o_proj.weight)
                nn.init.zeros_(source.mlp.down_proj.weight)
                new.append(source)
            layers.append(source)
        self.model.layers = nn.ModuleList(layers)
        return new

    def loss(self, window: Tensor) -> Tensor:
        logits = self(window[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())


# ---------------------------------------------------------------------------------------------- optimizer


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by a Newton-Schulz iteration (K. Jordan et al., 2024).

    At a budget of a few million tokens it needs clearly fewer steps than AdamW for the hidden matrices.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            for parameters in by_shape.values():
                updates = []
                for parameter in parameters:
                    state = self.state[parameter]
                    if not state:
                        state["buffer"] = torch.zeros_like(parameter)
                    state["buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(state["buffer"], group["momentum"]))
                orthogonal = newton_schulz(torch.stack(updates))
                rows, columns = parameters[0].shape
                scale = -group["lr"] * max(1.0, rows / columns) ** 0.5
                for parameter, update in zip(parameters, orthogonal, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=scale)


def newton_schulz(matrices: Tensor) -> Tensor:
    """The nearest orthogonal matrices, roughly [count, rows, columns]: singular values of 0.7 to 1.2."""
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).float()


def schedule(progress: float) -> float:
    """Learning-rate factor at a share of the time budget: short warm-up, plateau, linear decay to zero."""
    return min(1.0, progress / 0.015, (1 - progress) / 0.6) if progress < 1 else 0.0


# ----------------------------------------------------------------------------------------- export, training


def export(model: Llama, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a complete Hugging Face folder with bfloat16 weights."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = asdict(model.shape) | {"num_hidden_layers": len(model.model.layers)}
    theta = shape.pop("rope_theta")
    end, begin = tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(BEGIN_OF_TEXT)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        **shape,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "bos_token_id": begin,
        "eos_token_id": end,
        "pad_token_id": None,
        "use_cache": True,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": shape["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    generation_config = {"bos_token_id": begin, "eos_token_id": end}
    for name, content in (
        ("config.json", config),
        ("tokenizer_config.json", tokenizer_config),
        ("generation_config.json", generation_config),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    weights = {name: tensor.detach().cpu().bfloat16().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def heldout_loss(model: Llama, tokenizer: Tokenizer, texts: list[str], device: str, limit: int) -> float:
    """Mean loss in nats per token over the first `limit` windows of 512 tokens."""
    ids = [i for encoding in tokenizer.encode_batch(texts) for i in encoding.ids]
    windows = torch.tensor(ids[: len(ids) // 513 * 513]).view(-1, 513)[:limit].to(device)
    with torch.autocast(device, torch.bfloat16):
        return sum(model.loss(chunk).item() * len(chunk) for chunk in windows.split(8)) / len(windows)


def train(arguments: argparse.Namespace) -> None:
    torch.manual_seed(arguments.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and arguments.threads:
        torch.set_num_threads(arguments.threads)
    out: Path = arguments.out
    (out / "heldout").mkdir(parents=True, exist_ok=True)

    sources = standard_library()
    heldout = {name: text for name, text in sources.items() if is_heldout(name, text)}
    training = [text for name, text in sources.items() if name not in heldout]
    for name, text in heldout.items():
        (out / "heldout" / (name.replace("/", ".") + ".txt")).write_text(text, encoding="utf-8")
    tokenizer_file = out / "bf16" / "tokenizer.json"
    if arguments.resume:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    else:
        tokenizer = train_tokenizer(training, Shape.vocab_size)
    corpus = Corpus(training, tokenizer, arguments.seed)
    size = sum(len(text.encode()) for text in training)
    print(
        f"{len(training)} files, {size / 1e6:.1f} MB, {len(corpus) / 1e6:.2f} M tokens"
        f" ({size / len(corpus):.2f} bytes per token);"
        f" held out: {len(heldout)} files, {sum(map(len, heldout.values())) / 1e3:.0f} kB",
        flush=True,
    )

    model = Llama(Shape(), FIRST_LAYERS).to(device)
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    muon = Muon(hidden, lr=0.005, momentum=0.95, weight_decay=0.1)
    adam = torch.optim.AdamW(
        [
            {"params": [model.model.embed_tokens.weight], "lr": 0.003},
            {"params": [model.lm_head.weight], "lr": 0.0015, "weight_decay": 0.01},
            {"params": norms, "lr": 0.002},
        ],
        betas=(0.9, 0.95),
        eps=1e-10,
        weight_decay=0.0,
    )
    optimizers = (muon, adam)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    def grow() -> None:
        for layer in model.grow():
            muon.param_groups[0]["params"] += [p for p in layer.parameters() if p.ndim == 2]
            adam.param_groups[2]["params"] += [p for p in layer.parameters() if p.ndim == 1]
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)

    step, tokens, before = 0, 0, 0.0
    state_file = out / "state.pt"
    if arguments.resume:
        state = torch.load(state_file, map_location=device)
        if state["layers"] == model.shape.num_hidden_layers:
            grow()
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, tokens, before = state["step"], state["tokens"], state["seconds"]
        corpus.random.seed(arguments.seed + step)

    def save(seconds: float) -> None:
        export(model, tokenizer, out / "bf16")
        content = {
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "step": step,
            "tokens": tokens,
            "seconds": seconds,
            "layers": len(model.model.layers),
        }
        torch.save(content, state_file.with_suffix(".tmp"))
        state_file.with_suffix(".tmp").replace(state_file)

    budget = arguments.minutes * 60
    start = time.monotonic() - before
    saved_at = before
    mean_loss = math.nan
    log = (out / "log.csv").open("a" if arguments.resume else "w", newline="", encoding="utf-8")
    writer = csv.writer(log)
    if not arguments.resume:
        writer.writerow(["step", "minutes", "tokens", "rate", "loss", "heldout_loss"])
    while (seconds := time.monotonic() - start) < budget:
        progress = seconds / budget
        if progress >= GROWTH_AT and len(model.model.layers) == FIRST_LAYERS:
            grow()
        factor = schedule(progress)
        for optimizer, lrs in zip(optimizers, peaks, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * factor
        muon.param_groups[0]["momentum"] = min(0.95, 0.85 + step / 1000)
        # Short windows are cheaper; the last part of the run teaches the positions up to the maximum.
        length = 256 if progress < 0.6 else 512 if progress < 0.87 else model.shape.max_position_embeddings
        window = corpus.batch(arguments.batch_tokens // length, length).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=not arguments.float32):
            loss = model.loss(window)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        tokens += window.shape[0] * length
        value = loss.item()
        mean_loss = value if math.isnan(mean_loss) else 0.95 * mean_loss + 0.05 * value
        if step % 20 == 0:
            heldout_now = ""
            if step % 200 == 0:
                heldout_now = f"{heldout_loss(model, tokenizer, list(heldout.values()), device, 32):.4f}"
            minutes = (time.monotonic() - start) / 60
            writer.writerow([step, f"{minutes:.2f}", tokens, f"{factor:.3f}", f"{mean_loss:.4f}", heldout_now])
            log.flush()
            print(
                f"step {step}  {minutes:.1f} min  {tokens / 1e6:.2f} M tokens (pass {corpus.passes})"
                f"  loss {mean_loss:.3f}  {'held-out ' + heldout_now if heldout_now else ''}",
                flush=True,
            )
        if seconds - saved_at > 60 * arguments.save_minutes:
            save(time.monotonic() - start)
            saved_at = time.monotonic() - start
    save(time.monotonic() - start)
    final = heldout_loss(model, tokenizer, list(heldout.values()), device, 1_000_000)
    print(f"done: {step} steps, {tokens / 1e6:.2f} M tokens, held-out loss {final:.4f} nats per token")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=75, help="wall-clock budget (default: 75)")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens a step (default: 4096)")
    parser.add_argument("--save-minutes", type=float, default=4, help="minutes between checkpoints (default: 4)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast (for machines where it is slow)")
    parser.add_argument("--resume", action="store_true", help="go on from the state.pt in --out")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
