"""The codes of all errors and warnings, each with its cause and its cure. docs/errors.md is printed from here."""

from __future__ import annotations

from typing import NamedTuple


class Code(NamedTuple):
    cause: str
    cure: str


CODES: dict[str, Code] = {
    # Files
    "folder-missing": Code("The path is not a folder.", "Give the folder that holds config.json, or a hub id."),
    "config-absent": Code(
        "The folder has neither config.json nor params.json.",
        "Fetch the whole checkpoint, or go one folder down.",
    ),
    "file-unreadable": Code("The operating system refused to open or read a file.", "Check permissions and disk."),
    "file-size": Code(
        "A file is shorter or longer than its header says, or shrank while it was read.",
        "Fetch that file again.",
    ),
    "json-invalid": Code(
        "A JSON file is malformed: bad syntax, a key twice, NaN, endless nesting or digits, or too large.",
        "Repair the file, or fetch it again.",
    ),
    "header-invalid": Code(
        "A safetensors header is malformed: its length, its JSON, offsets that overlap, leave holes or don't fit "
        "dtype and shape.",
        "Fetch the file again; if that doesn't help, its producer wrote it wrongly.",
    ),
    "header-dtype": Code(
        "A safetensors header names a dtype that fewbits doesn't know.",
        "Report it with the name of the dtype.",
    ),
    "header-only": Code("The files end with their headers: fine for `inspect`, nothing to run.", "Fetch the weights."),
    "index-invalid": Code(
        "The index doesn't map tensors to files of this folder that have them.",
        "Fetch index and files again, together.",
    ),
    "index-incomplete": Code(
        "Files hold tensors that the index doesn't list.", "Usually harmless: they are planned too."
    ),
    "shards-missing": Code("Safetensors files are missing.", "Fetch the whole folder."),
    "tensor-twice": Code(
        "Two files hold a tensor of one name.", "Remove the files that don't belong to the checkpoint."
    ),
    # Config
    "config-missing": Code(
        "A key that the model can't do without is absent.", "Compare with the original config.json."
    ),
    "config-type": Code("A key has a value of the wrong type.", "Compare with the original config.json."),
    "config-unsupported": Code(
        "A value asks for something that fewbits doesn't compute; it is never approximated.",
        "None, until fewbits learns it: report it with the model's name.",
    ),
    "config-keys-unread": Code(
        "Keys carry values that nothing reads; what they ask for isn't done.",
        "Usually harmless; look at the names if the output is wrong.",
    ),
    "family-unknown": Code("The architecture is not one that fewbits runs.", "`inspect` works all the same."),
    "rope-unsupported": Code(
        "The config asks for a rotary embedding that fewbits doesn't know, or with numbers that make none.",
        "Compare rope_parameters or rope_scaling with the original model's; look for a newer fewbits.",
    ),
    # Quantization: rules
    "format-unknown": Code(
        "The quantization method or storage format isn't read yet.", "`inspect` shows what the tensors tell."
    ),
    "format-refused": Code("A storage format that is recognised and not decoded.", "Use another export of the model."),
    "scheme-unknown": Code(
        "A config group describes numbers or scales that have no definition here.",
        "Check the group for a typing error; otherwise report it.",
    ),
    "scheme-contradiction": Code(
        "A config group contradicts itself, or pairs weights and activations that mean nothing together.",
        "Correct the group; the message names the key.",
    ),
    "scheme-dialect": Code(
        "A config group is written as another tool writes it, and its keys mean something else.",
        "Name that tool's method as quant_method, or export for compressed-tensors.",
    ),
    "pattern-invalid": Code("A target or ignore entry is not a regular expression.", "Correct the entry."),
    "pattern-timeout": Code("A regular expression takes too long on a module's name.", "Simplify the entry."),
    "pattern-no-match": Code(
        "A target or ignore entry matches no module of the file.",
        "Often names from another version of the model; the tensors decide, see the table.",
    ),
    "transform-online": Code(
        "Rotations that act on activations at run time; without them the output is garbage.",
        "Use an export with offline rotations only.",
    ),
    # Quantization: tensors against rules
    "ignored-but-quantized": Code(
        "The config ignores a module that is stored quantized.", "Nothing to do: it runs as it is stored."
    ),
    "unmatched-but-quantized": Code(
        "No rule covers a module that is stored quantized.",
        "Nothing to do: it runs as it is stored, weight-only.",
    ),
    "targeted-but-dense": Code(
        "The config wants a module quantized that is stored in full precision.",
        "Nothing to do: it runs as it is stored.",
    ),
    "fake-quantized": Code(
        "Full-precision weights beside scales: the file was saved uncompressed.",
        "Nothing to do: the stored weights are used, the scales aren't.",
    ),
    "sparse-expanded": Code(
        "A module is stored sparse, as a bitmask and the values that aren't zero.",
        "Nothing to do: it is expanded when it is loaded, and takes the memory of a dense one.",
    ),
    "tensors-disagree": Code(
        "A module's tensors don't fit each other or their config group.",
        "Don't edit configs by hand; quantize again, or report the producer.",
    ),
    "tensors-open": Code(
        "A module is stored quantized, nothing says how, and the tensors allow several readings.",
        "Add a config group for it, or fetch the original config.",
    ),
    "module-incomplete": Code(
        "Tensors of a module are missing, a scale for instance. No scale has a default.",
        "Fetch all files; or report the producer.",
    ),
    "module-missing": Code("The model needs a module that isn't stored.", "Fetch all files."),
    "shape-mismatch": Code(
        "A stored shape isn't what config.json makes it.",
        "config.json and weights belong to different models?",
    ),
    "bias-missing": Code(
        "A bias that the family always has isn't stored.", "The exporter lost it; use another export."
    ),
    "bias-unexpected": Code("A bias is stored that the config denies.", "Nothing to do: it is added."),
    "head-missing": Code(
        "There is no lm_head and the config says that it isn't tied.", "Nothing to do: the embedding serves."
    ),
    "tensors-unclaimed": Code("Tensors belong to no module; they aren't used.", "Usually harmless; look at the names."),
    "scale-missing": Code("A static activation scale isn't stored. No scale has a default.", "Quantize again."),
    "activations-asked": Code(
        "Activations are quantized to int8 because --activations int8 asks for it.",
        "Leave the option out to run what was published.",
    ),
    "act-scale-unused": Code("Activation scales are stored, activations aren't quantized.", "Nothing to do."),
    "output-scale-unused": Code("A scale for a layer's output is stored; outputs stay float.", "Nothing to do."),
    # Quantization: data
    "scale-invalid": Code(
        "A scale is zero over weights that aren't, negative, infinite or not a number.", "Quantize again."
    ),
    "weight-nan": Code("A weight holds codes that are not a number.", "Quantize again."),
    "sparse-invalid": Code(
        "Mask, values, offsets and shape of a sparse tensor don't agree.",
        "The file is damaged: fetch it again, or report the producer.",
    ),
    "code-range": Code("A code is outside of its bits.", "The file is damaged, or num_bits is wrong."),
    "act-order-invalid": Code("weight_g_idx doesn't give every group its columns.", "Quantize again."),
    "act-order-absent": Code(
        "The config promises an activation order, and a module has no index of it.",
        "Nothing to do: groups are taken in order, as the owner's library does.",
    ),
    "zero-point-kept": Code(
        "A scheme says symmetric, its zero points aren't zero.", "Nothing to do: they are applied."
    ),
    # KV cache
    "kv-scheme-unsupported": Code(
        "The KV cache's scheme isn't one that fewbits keeps.", "Nothing to do: it stays float."
    ),
    "kv-scales-missing": Code(
        "The KV cache is meant to be quantized, its scales aren't stored.", "Nothing to do: it stays float."
    ),
    "kv-scales-unused": Code("Scales of a KV cache are stored, no scheme asks for them.", "Nothing to do."),
    # Running
    "kernel-none": Code("No native kernel runs this spec.", "`--allow-reference` runs it in NumPy, slowly."),
    # Command line, prompts, sampling
    "usage": Code("Options that don't go together, or one that is missing.", "The message says which; see `--help`."),
    "checkpoint-not-found": Code("The path doesn't exist and isn't a hub id.", "Check the spelling."),
    "output-unwritable": Code("A file that was asked for can't be written.", "Check the folder and its permissions."),
    "threads-range": Code("The number of threads isn't positive.", "Leave it out: one thread per CPU is the default."),
    "isa-unsupported": Code(
        "FEWBITS_ISA names an instruction set tier that doesn't exist or that this CPU lacks.",
        "`fewbits inspect --system` lists those it has.",
    ),
    "memory-exhausted": Code("There isn't enough memory.", "A smaller checkpoint, a shorter prompt, or more memory."),
    "prompt-empty": Code(
        "The prompt has no token; a model continues at least one.",
        "Give some text, or a token with --prompt-ids.",
    ),
    "prompt-not-text": Code("The prompt isn't valid UTF-8.", "Check the terminal's encoding."),
    "prompt-too-long": Code("The prompt doesn't fit into the model's context.", "Shorten the prompt."),
    "token-out-of-range": Code("A token id isn't in the model's vocabulary.", "Ids go from 0 to vocab_size - 1."),
    "cache-too-small": Code(
        "Prompt and answer need more cache than half of the free memory.",
        "A smaller --max-tokens needs less.",
    ),
    "sampling-range": Code("A sampling option is out of its range.", "The message names the range."),
    "logits-not-finite": Code(
        "The model computed NaN or infinity: damaged weights or scales, or a model that overflows.",
        "`fewbits verify` names the module where it begins; compare the checkpoint with its original.",
    ),
    # Speculative decoding
    "draft-alone": Code("A drafter was given as the model to run.", "Give its target, and the drafter with `--draft`."),
    "draft-not-a-drafter": Code("What `--draft` names isn't an Eagle3 drafter.", "Give a drafter made for the target."),
    "draft-no-mtp": Code(
        "`--draft mtp` drafts with a model's own modules for multi-token prediction, and it has none.",
        "`--draft ngram` works for every model; or give a drafter.",
    ),
    "draft-mismatch": Code(
        "Drafter and target don't fit: vocabulary, width of states, or the layers they are read behind.",
        "The drafter was made for another model?",
    ),
    "draft-vocabulary": Code(
        "d2t isn't a list of offsets that gives each row of the drafter's head a token of its own.",
        "The drafter's export is damaged, or writes d2t in another way: report it.",
    ),
    "draft-embedding": Code(
        "The drafter's own embedding has nothing in common with the target's.",
        "If acceptance is low, the exporter stored an untrained one: remove it, and the target's is used.",
    ),
    "draft-rejected": Code(
        "Next to nothing that is drafted is accepted: the text is right, and no faster than without.",
        "The message says what to look at; `--draft-layers` gives an Eagle3 drafter other states of its target.",
    ),
    # Tokenizer and chat template
    "tokenizer-missing": Code(
        "The folder has no tokenizer.json, the only kind of tokenizer that is read.",
        "Fetch it, or use --prompt-ids, which needs none.",
    ),
    "tokenizer-invalid": Code(
        "tokenizer.json can't be used: it is malformed, or has more than 256 MB.", "Fetch the file again."
    ),
    "vocabulary-mismatch": Code(
        "The tokenizer gives ids that the model has no embedding for.",
        "tokenizer.json belongs to another model?",
    ),
    "chat-template-missing": Code("The checkpoint has no chat template.", "Use --prompt without --chat."),
    "chat-template-invalid": Code(
        "The chat template fails, runs for more than 3 seconds, writes or needs too much, or has more than 4 MB.",
        "Repair chat_template.jinja, or fetch it again.",
    ),
    "chat-template-refused": Code("The chat template itself refuses the messages.", "It says why."),
    # Hub
    "hub-not-found": Code(
        "The hub has no such repository or revision, or hides it from you.",
        "Check the spelling; log in for private ones.",
    ),
    "hub-gated": Code("The repository's terms must be accepted first.", "Accept them on its page, then log in."),
    "hub-unreachable": Code("No connection to the hub, and not all files in the cache.", "Try again when online."),
    "hub-failed": Code("A download failed.", "Run the command again: it goes on where it stopped."),
}
