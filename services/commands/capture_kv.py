"""`prfaas capture-kv`: the KV of a prompt, computed by the real model, in a file (format: services/kv_file.py)."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prfaas.common.command_line import Parser
from prfaas.common.errors import UsageError
from prfaas.common.kv_layout import MAX_TOKENS
from prfaas.services.commands.flags import new_parser, whole
from prfaas.services.commands.progress import progress_bar
from prfaas.services.commands.prompt_source import prompt_tokens, read_text
from prfaas.services.model_store import Progress, ensure_model

if TYPE_CHECKING:
    from prfaas.services.engine.transformers.offline import OfflineModel
    from prfaas.services.kv_file import KvCapture


def main(argv: Sequence[str]) -> int:
    from prfaas.services import kv_file  # numpy: not needed for --help

    options = parser().parse_args(argv)
    out = Path(options.out)
    check_writable(out)
    text = read_text(options.text) if options.text else options.prompt
    with progress_bar(counts=True) as progress:
        model = load_model(options.model, progress)
        capture = capture_text(model, options.model, text, options.tokens, progress)
    kv_file.write(out, capture)
    report = {
        "file": str(out),
        "file_bytes": out.stat().st_size,
        "model": capture.model,
        "model_fingerprint": capture.model_fingerprint,
        "prompt_tokens": len(capture.prompt_token_ids),
        "following_tokens": len(capture.following_token_ids),
        "kv_bytes": len(capture.data),
    }
    if options.json:
        print(json.dumps(report))
    else:
        print(
            f"{out}: {len(capture.data) / 1e6:.1f} MB of KV, {report['prompt_tokens']} prompt tokens of "
            f"{capture.model}, {report['following_tokens']} more tokens of the text"
        )
    return 0


def parser() -> Parser:
    made = new_parser(
        "prfaas capture-kv",
        "Runs a prompt through the real model and writes its KV, in wire order, to a file for `prfaas bench codec`.",
        "prfaas capture-kv --model smollm2 --tokens 2048 --out smollm2.kv",
    )
    made.add_argument("--out", metavar="FILE", required=True, help="where to write it; replaced when it is there")
    add_prompt_flags(made)
    made.add_argument("--json", action="store_true", help="print one object instead")
    return made


def add_prompt_flags(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--model", metavar="NAME", default="smollm2", help="smollm2, directory or Hugging Face id [smollm2]"
    )
    source = made.add_mutually_exclusive_group()
    source.add_argument("--text", metavar="FILE", help="prompt: the beginning of this text")
    source.add_argument("--prompt", metavar="TEXT", help="prompt: this [a text of about 2,700 tokens that is built in]")
    made.add_argument(
        "--tokens", metavar="N", type=whole(2, MAX_TOKENS), help="prompt length [2048; of --text and --prompt: all]"
    )


def check_writable(out: Path) -> None:
    """Before the minutes of work. Raises UsageError."""
    if out.is_dir():
        raise UsageError(f"--out {out}: a folder; name a file")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"--out {out}: no folder {out.absolute().parent}; make it first")
    if not os.access(out.absolute().parent, os.W_OK):
        raise UsageError(f"--out {out}: no permission to write into {out.absolute().parent}")


def load_model(name: str, progress: Progress) -> OfflineModel:
    """Fetched when it isn't here. Raises SetupError, ConfigError, ModelRefusedError; without torch
    ModuleNotFoundError."""
    with progress_bar() as fetching:
        directory = ensure_model(name, fetching)
    progress("loading the model", 0, 0)
    from prfaas.services.engine.transformers.offline import OfflineModel

    return OfflineModel(str(directory), Path(name).name if Path(name).is_dir() else name)


def capture_text(model: OfflineModel, name: str, text: str | None, tokens: int | None, progress: Progress) -> KvCapture:
    """Raises UsageError for a text or a length that doesn't fit."""
    from prfaas.services.engine.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(ensure_model(name)))
    prompt, following = prompt_tokens(tokenizer, text, tokens, model.max_model_tokens)
    return model.capture(prompt, following, lambda done, total: progress("computing the prompt", done, total))
