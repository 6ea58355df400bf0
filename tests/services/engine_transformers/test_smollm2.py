"""The real model, in float32: greedy output over two engines equals `generate`'s, token for token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(300)]

# One token to 4,000, and around the step of 512; shorter output for long prompts, for the time it takes.
CASES = [(1, 24), (2, 24), (17, 24), (64, 24), (130, 16), (300, 16), (512, 16), (513, 16), (1030, 8), (4000, 8)]
MIB = 1 << 20

TEXT = (
    "The canal had been dug in the dry years, when labour was cheap and water was not. Every morning the keeper walked "
    "its length with a lantern, counting the gates: one at the mill, two at the orchard, and the great one by the sea. "
    "Nobody had asked him to count them. In his notebook he wrote the height of the water, the direction of the wind, "
    "and sometimes a line about the heron that fished below the third lock. "
)


@pytest.fixture(scope="module")
def prompts(smollm2_dir: Path) -> list[list[int]]:
    """English text, cut to length at different places, so that continuations differ and are not near-ties."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json")).encode(TEXT * 60).ids
    return [ids[start : start + n] for start, (n, _) in enumerate(CASES)]


@pytest.fixture(scope="module")
def expected(smollm2_dir: Path, prompts: list[list[int]]) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()
    answers = []
    for prompt, (_, output_tokens) in zip(prompts, CASES, strict=True):
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=output_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


@pytest.fixture
async def pair(smollm2_dir: Path, toolbox: Any) -> AsyncIterator[Any]:
    settings = {"model": str(smollm2_dir), "arena_bytes": 640 * MIB}
    pair = toolbox.Pair(await toolbox.started(**settings), await toolbox.started(**settings))
    yield pair
    await pair.prefill.close()
    await pair.decode.close()


async def test_ten_prompts(pair: Any, prompts: list[list[int]], expected: list[list[int]]) -> None:
    """One after the other, then the eight shortest at once, in a batch whose members come and go."""
    free = pair.decode.load().free_kv_bytes
    for prompt, (length, output_tokens), tokens in zip(prompts, CASES, expected, strict=True):
        assert (await pair.generate(prompt, output_tokens)).token_ids == tokens, f"{length} tokens"
    at_once = await asyncio.gather(
        *(pair.generate(prompt, output_tokens) for prompt, (_, output_tokens) in zip(prompts[:8], CASES, strict=False))
    )
    assert [answer.token_ids for answer in at_once] == expected[:8]
    assert pair.decode.load().free_kv_bytes == free
