"""The flags of what prompts say, for those who send them; a simulator needs none. The names are ours."""

from __future__ import annotations

import argparse
import math

from prfaas.common.errors import ConfigError
from prfaas.loadgen.workloads.prompts import MAX_VOCAB_TOKENS, TextPrompts, TokenPrompts

TEXT, TOKEN_IDS = "text", "token-ids"
DEFAULT_VOCAB_TOKENS = 32_000


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts")
    group.add_argument("--prompt-format", metavar="NAME", help=f"{TEXT} or {TOKEN_IDS} [{TEXT}]")
    group.add_argument(
        "--vocab-size", metavar="N", help=f"token ids are below it; for {TOKEN_IDS} [{DEFAULT_VOCAB_TOKENS}]"
    )
    group.add_argument(
        "--tokens-per-word", metavar="X", help=f"what the server makes of a word and its space; for {TEXT} [1]"
    )


def prompts_from(args: argparse.Namespace, content_seed: int) -> TextPrompts | TokenPrompts:
    """`content_seed`: the workload's. Raises ConfigError with one line a mistake."""
    kind = args.prompt_format or TEXT
    problems = []
    if kind not in (TEXT, TOKEN_IDS):
        problems.append(f"--prompt-format {kind}: there are {TEXT}, {TOKEN_IDS}")
    if args.vocab_size is not None and kind == TEXT:
        problems.append(f"--vocab-size is for --prompt-format {TOKEN_IDS}")
    if args.tokens_per_word is not None and kind == TOKEN_IDS:
        problems.append(f"--tokens-per-word is for --prompt-format {TEXT}")
    vocab = _number(args.vocab_size or str(DEFAULT_VOCAB_TOKENS))
    ratio = _number(args.tokens_per_word or "1")
    if not (vocab.is_integer() and 1 <= vocab <= MAX_VOCAB_TOKENS):
        problems.append(f"--vocab-size {args.vocab_size}: it is a whole number from 1 to {MAX_VOCAB_TOKENS:,}")
    if not 0 < ratio < math.inf:
        problems.append(f"--tokens-per-word {args.tokens_per_word}: it is a number above 0")
    if problems:
        raise ConfigError(problems)
    return TokenPrompts(content_seed, int(vocab)) if kind == TOKEN_IDS else TextPrompts(content_seed, ratio)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
