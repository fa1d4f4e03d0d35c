"""Measures a checkpoint of the example: held-out perplexity, and how many completions are Python.

    python tools/evaluate_example.py FOLDER [FOLDER ...] [--json FILE]

Perplexity: as tools/heldout.py defines it, over the whole held-out folder. Bits per byte counts the UTF-8 bytes of
the files, to compare tokenizers by.

Completions: each of the 50 prompts below is a function's first line. The model goes on, greedily and at
temperature 0.8 (one sample a prompt, seeded), for at most 256 tokens. What follows the function is cut off:
everything from the first line that is neither blank nor indented. When the limit came first, the unfinished
last line is dropped. The result parses when `ast.parse` accepts it; a function without a body doesn't.

Runs in torch through transformers; a quantized folder needs the compressed-tensors package.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import warnings
from pathlib import Path
from typing import Any

import heldout
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

NEW_TOKENS = 256
TEMPERATURE = 0.8

PROMPTS = """
def read_json(path):
def write_json(path, data):
def main():
def main(argv=None):
def parse_args(argv):
def usage(message):
def is_prime(n):
def factorial(n):
def fibonacci(n):
def gcd(a, b):
def mean(data):
def median(values):
def clamp(value, low, high):
def flatten(items):
def chunks(sequence, size):
def unique(iterable):
def count_words(text):
def reverse(string):
def capitalize_words(text):
def strip_comments(source):
def split_lines(text, keepends=False):
def join_path(base, *parts):
def find_files(root, pattern):
def copy_file(src, dst):
def remove_tree(path, ignore_errors=False):
def file_size(path):
def touch(filename):
def open_url(url, timeout=None):
def parse_url(url):
def parse_header(line):
def quote(s):
def escape(text):
def encode(data, encoding='utf-8'):
def decode_bytes(data):
def checksum(data):
def load_config(filename):
def get_option(options, name, default=None):
def set_value(self, key, value):
def __init__(self, name, parent=None):
def __repr__(self):
def __eq__(self, other):
def __getitem__(self, key):
def close(self):
def read(self, size=-1):
def write(self, data):
def send_message(self, message):
def run_command(command, timeout=10):
def wait_for(condition, timeout):
def log_error(message, *args):
def format_date(date):
""".strip().splitlines()


@torch.no_grad()
def perplexity(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, float]:
    """Perplexity per token and bits per byte over a folder of texts."""
    texts = heldout.texts(folder)
    size = sum(len(text.encode()) for text in texts)
    nats, tokens = 0.0, 0
    positions = model.config.max_position_embeddings
    for window in heldout.windows(texts, lambda text: tokenizer(text)["input_ids"], tokenizer.eos_token_id, positions):
        nats += heldout.nats(model(torch.tensor([window[:-1]])).logits[0].numpy(), window)
        tokens += heldout.predicted(window)
    return {
        "tokens": tokens,
        "bytes": size,
        "perplexity": math.exp(nats / tokens),
        "bits_per_byte": nats / math.log(2) / size,
    }


def function_text(text: str, finished: bool) -> str:
    """The function that a completion begins with."""
    lines = text.splitlines()
    if not finished:
        lines = lines[:-1]
    for number, line in enumerate(lines[1:], 1):
        if line and not line[0].isspace():
            lines = lines[:number]
            break
    return "\n".join(lines).rstrip() + "\n"


def parses(text: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


@torch.no_grad()
def completions(model: Any, tokenizer: PreTrainedTokenizerBase, temperature: float) -> list[str]:
    """The function each prompt becomes, one after the other in the order of PROMPTS."""
    torch.manual_seed(0)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.eos_token
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=NEW_TOKENS,
        pad_token_id=tokenizer.eos_token_id,
        **sampling,
    )
    new = output[:, inputs["input_ids"].shape[1] :]
    return [
        function_text(prompt + tokenizer.decode(row, skip_special_tokens=True), tokenizer.eos_token_id in row)
        for prompt, row in zip(PROMPTS, new, strict=True)
    ]


def evaluate(folder: Path, heldout_folder: Path, show: int) -> dict[str, float]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    result = perplexity(model, tokenizer, heldout_folder)
    for name, temperature in (("greedy", 0.0), ("sampled", TEMPERATURE)):
        texts = completions(model, tokenizer, temperature)
        result[f"parse_{name}"] = sum(map(parses, texts)) / len(texts)
        for text in texts[:show]:
            print(f"--- {name}{'' if parses(text) else ' (does not parse)'}\n{text}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--heldout", type=Path, default=heldout.HELDOUT, help="folder of .txt files")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the first N completions of each kind")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    results = {}
    for folder in arguments.folders:
        result = evaluate(folder, arguments.heldout, arguments.show)
        results[folder.name] = result
        print(
            f"{folder.name}: perplexity {result['perplexity']:.3f} over {result['tokens']} tokens,"
            f" {result['bits_per_byte']:.4f} bits per byte; completions that parse:"
            f" greedy {result['parse_greedy']:.0%}, temperature {TEMPERATURE} {result['parse_sampled']:.0%}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
