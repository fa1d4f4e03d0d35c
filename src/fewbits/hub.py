"""A checkpoint is a folder or a hub id: `owner/name`, or `owner/name@revision`.

A hub id is downloaded into huggingface_hub's own cache, only the files that are needed. The library resumes
what was broken off, shows progress on stderr, asks HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE, and serves the
cache when there is no network.
"""

from __future__ import annotations

import re
from pathlib import Path

from fewbits.errors import CheckpointError, UsageError

_HUB_ID = re.compile(r"(?P<repository>[\w][\w.-]*/[\w][\w.-]*)(@(?P<revision>[\w][\w./-]*))?", re.ASCII)

_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "params.json",
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
)
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_COPIES = ("*/*", "consolidated*")  # subfolders and Mistral's second copy of the same weights
_MISTRAL = ("consolidated*.safetensors", "consolidated*.safetensors.index.json")


def resolve(checkpoint: str | Path) -> Path:
    """The folder of a checkpoint, downloaded first where it is a hub id.

    Raises UsageError where it is neither, CheckpointError where the hub doesn't give it.
    """
    folder = Path(checkpoint)
    found = _HUB_ID.fullmatch(str(checkpoint))
    if folder.exists() or isinstance(checkpoint, Path):
        return folder
    if found is None:
        raise UsageError(
            "checkpoint-not-found",
            f"there is no folder {checkpoint}",
            hint="a checkpoint is a folder or a hub id, owner/name",
        )
    return _download(found["repository"], found["revision"])


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    def fetch(wanted: tuple[str, ...], unwanted: tuple[str, ...]) -> Path:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(wanted),
                ignore_patterns=list(unwanted),
                library_name="fewbits",
            )
        )

    try:
        folder = fetch(_SMALL_FILES + _WEIGHTS, _COPIES)
        if not (folder / "config.json").exists():
            folder = fetch(_SMALL_FILES + _MISTRAL, ("*/*",))
    except errors.GatedRepoError as error:
        raise CheckpointError(
            "hub-gated",
            "the hub gives this repository only to those who accepted its terms",
            module=repository,
            hint=f"accept them on its page, then log in with hf auth login or HF_TOKEN ({_status(error)})",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            "hub-not-found",
            f"no such folder here, and the hub has no such repository, or hides it ({_status(error)})",
            module=repository,
            hint="a private repository needs hf auth login or HF_TOKEN",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError("hub-not-found", f"has no revision {revision}", module=repository) from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            "hub-unreachable",
            "the hub can't be reached, and the cache doesn't have all files",
            module=repository,
            details=tuple(f"cause: {cause}" for cause in (error.__cause__,) if cause is not None),
            hint="the download goes on where it stopped when the command is run again",
        ) from error
    except (OSError, errors.HFValidationError, getattr(errors, "HTTPError", OSError)) as error:
        raise CheckpointError(
            "hub-failed",
            f"the download failed: {error}",
            module=repository,
            hint="it goes on where it stopped when the command is run again",
        ) from error
    return folder


def _status(error: BaseException) -> str:
    response = getattr(error, "response", None)
    return f"HTTP {response.status_code}" if response is not None else type(error).__name__
