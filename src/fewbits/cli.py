"""The `fewbits` command: its options, and how every command ends. What a command does is in
`commands/<name>.py`.

Exit codes: 0 fine, 1 `verify` found a difference, 2 bad input or use, 3 a fault of fewbits itself, 130 interrupted,
143 terminated. Text and data go to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from fewbits.errors import FewbitsError, UsageError

FAULT = 3
INTERRUPTED = 130
TERMINATED = 143

EXAMPLE = "examples/stdlib-lm/w4a16-asym"


def _run_options(parser: argparse.ArgumentParser) -> None:
    _checkpoint(parser)
    prompt = parser.add_argument_group("prompt").add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue, with the tokenizer's own special tokens")
    prompt.add_argument(
        "--prompt-ids",
        metavar="IDS",
        help="token ids to continue, as in 1,2,3: needs no tokenizer and adds nothing",
    )
    way = parser.add_argument_group("how the prompt is read").add_mutually_exclusive_group()
    way.add_argument("--raw", action="store_true", help="add no special tokens to the prompt")
    way.add_argument(
        "--chat", action="store_true", help="apply the chat template; without --prompt, an interactive chat"
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-tokens", type=int, metavar="N", help="tokens to generate at most (256)")
    sampling.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (0)")
    sampling.add_argument("--top-k", type=int, metavar="K", help="keep the K most probable tokens (0: all)")
    sampling.add_argument("--top-p", type=float, metavar="P", help="keep the most probable tokens that sum up to P (1)")
    sampling.add_argument("--min-p", type=float, metavar="P", help="keep tokens of at least P times the best one's (0)")
    sampling.add_argument("--repetition-penalty", type=float, metavar="R", help="divide logits of tokens seen (1)")
    sampling.add_argument("--presence-penalty", type=float, metavar="R", help="subtract from tokens generated (0)")
    sampling.add_argument("--frequency-penalty", type=float, metavar="R", help="subtract each time generated (0)")
    sampling.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be given several times"
    )
    sampling.add_argument("--seed", type=int, metavar="S", help="of the random numbers (0)")
    sampling.add_argument(
        "--sampling",
        choices=("options", "model"),
        default="options",
        help="where options aren't given: their defaults, or what generation_config.json says (options)",
    )
    _engine(parser)
    draft = parser.add_argument_group("speculative decoding: the same text, sooner")
    draft.add_argument(
        "--draft",
        metavar="FOLDER",
        help="an Eagle3 drafter of this model, folder or hub id; ngram: look up what followed earlier in the text;"
        " mtp: the model's own modules for multi-token prediction",
    )
    draft.add_argument("--draft-tokens", type=int, metavar="N", help="guess so many at a time (as many as pay)")
    _draft_layers(draft)
    parser.add_argument(
        "--logits", metavar="OUT.npy", help="also write the prompt's logits, float32 [tokens, head rows]"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of streaming text")


def _inspect_options(parser: argparse.ArgumentParser) -> None:
    _checkpoint(parser, nargs="?")
    _activations(parser)
    parser.add_argument(
        "--draft", metavar="FOLDER", help="also an Eagle3 drafter of it: what it reads of the model and shares with it"
    )
    _draft_layers(parser)
    parser.add_argument("--system", action="store_true", help="describe this machine instead of a checkpoint")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _verify_options(parser: argparse.ArgumentParser) -> None:
    _checkpoint(parser)
    _threads(parser)
    _activations(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _bench_options(parser: argparse.ArgumentParser) -> None:
    _checkpoint(parser)
    _engine(parser)
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="of every case; figures are medians (5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="FOLDER", nargs="?", default=EXAMPLE, help=f"a folder ({EXAMPLE})")
    _engine(parser)


def _checkpoint(parser: argparse.ArgumentParser, **options: Any) -> None:
    parser.add_argument("checkpoint", metavar="FOLDER", help="a folder, or a hub id: owner/name[@revision]", **options)


def _draft_layers(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--draft-layers",
        metavar="LAYERS",
        help="numbers of layers behind which the drafter reads the model's states, as in 2,7,11 (the drafter's config)",
    )


def _threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, metavar="N", help="native threads (one per CPU)")


def _activations(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--activations",
        choices=("stored", "int8"),
        default="stored",
        help="int8: quantize the inputs of integer weights, which the checkpoint doesn't say; faster (stored)",
    )


def _kv_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kv-dtype",
        choices=("f32", "bf16", "f16", "int8"),
        help="how keys and values are kept; int8 has a scale for every token and head (what the checkpoint says)",
    )


def _engine(parser: argparse.ArgumentParser) -> None:
    _threads(parser)
    _activations(parser)
    _kv_dtype(parser)
    parser.add_argument(
        "--allow-reference",
        action="store_true",
        help="run layers that have no native kernel in NumPy, slowly",
    )


COMMANDS: tuple[tuple[str, str, Callable[[argparse.ArgumentParser], None]], ...] = (
    ("run", "generate text from a checkpoint", _run_options),
    ("inspect", "show what a checkpoint holds and what would be done with it", _inspect_options),
    ("verify", "check every module and the logits of a checkpoint against the definition", _verify_options),
    ("bench", "measure how fast a checkpoint decodes and prefills, and what the machine allows", _bench_options),
    ("demo", "generate text from the example checkpoint", _demo_options),
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n\nhint: {self.prog} --help\n")


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import fewbits

        print(f"fewbits {fewbits.__version__}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fewbits", description="Runs quantized language-model checkpoints as they were published.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, help_text, add_options in COMMANDS:
        command = commands.add_parser(name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".")
        add_options(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that can't show a character isn't a reason to stop
    try:
        code: int = importlib.import_module(f"fewbits.commands.{arguments.command}").run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read our output has enough. The interpreter flushes stdout once more: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        _say("interrupted", arguments.debug)
        return INTERRUPTED
    except FewbitsError as error:
        _say(f"error: {error}", arguments.debug)
        return 2
    except MemoryError:
        _say(f"error: {UsageError('memory-exhausted', 'the memory is used up')}", arguments.debug)
        return 2
    except Exception as error:
        _say(f"error: a fault of fewbits: {type(error).__name__}: {error}", arguments.debug)
        if not arguments.debug:
            _say("\nhint: --debug shows where; please report it", False)
        return FAULT


def _terminate(*_: Any) -> NoReturn:
    raise SystemExit(TERMINATED)


def _say(text: str, with_traceback: bool) -> None:
    if with_traceback:
        traceback.print_exc()
    print(text, file=sys.stderr)
