"""The real model, in float32, over two regions: greedy output equals `generate`'s, token for token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from prfaas.common.config import TransportConfig
from prfaas.common.kv_layout import TokenRange
from prfaas.services.engine.api import DecodeRequest

pytestmark = [
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="module"),  # the engines are loaded once
]

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
def expected(smollm2_dir: Path, prompts: list[list[int]]) -> Iterator[Future[list[list[int]]]]:
    """Computed once, in a thread beside the engines: half a minute on a second core."""

    def generate() -> list[list[int]]:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()
        answers = []
        for prompt, (_, output_tokens) in zip(prompts, CASES, strict=True):
            output = model.generate(
                torch.tensor([prompt]), max_new_tokens=output_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
            )
            answers.append(output[0, len(prompt) :].tolist())
        return answers

    with ThreadPoolExecutor(1) as beside:
        yield beside.submit(generate)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def regions(smollm2_dir: Path, toolbox: Any) -> AsyncIterator[Any]:
    """The node's own settings of the transport, over TCP."""
    transport = TransportConfig(bind="127.0.0.1:0")
    async with toolbox.regions(
        transport, model=str(smollm2_dir), arena_bytes=640 * MIB, prefix_bytes=256 * MIB
    ) as regions:
        yield regions


async def tokens_of(regions: Any, toolbox: Any, prompt: list[int], output_tokens: int) -> list[int]:
    if len(prompt) == 1:  # nothing to prefill, as the decode node's handler has it
        request = DecodeRequest("r", prompt, output_tokens, toolbox.GREEDY)
        return list((await toolbox.collect(regions.decode.decode(request, []))).token_ids)
    return list((await regions.generate(prompt, output_tokens)).answer.token_ids)


async def test_alone(regions: Any, toolbox: Any, prompts: list[list[int]], expected: Future[list[list[int]]]) -> None:
    """Ten prompts, one after the other."""
    found = [
        await tokens_of(regions, toolbox, prompt, output_tokens)
        for prompt, (_, output_tokens) in zip(prompts, CASES, strict=True)
    ]
    for (length, _), tokens, right in zip(CASES, found, await asyncio.wrap_future(expected), strict=True):
        assert tokens == right, f"{length} tokens"


async def test_eight_at_once(
    regions: Any, toolbox: Any, prompts: list[list[int]], expected: Future[list[list[int]]]
) -> None:
    """The same ten, eight at any time, the longest among them from the beginning: the ninth begins when one ends."""
    slots = asyncio.Semaphore(8)

    async def one(prompt: list[int], output_tokens: int) -> list[int]:
        async with slots:
            return await tokens_of(regions, toolbox, prompt, output_tokens)

    requests = [one(prompt, output_tokens) for prompt, (_, output_tokens) in zip(prompts, CASES, strict=True)]
    found = (await asyncio.gather(*reversed(requests)))[::-1]
    for (length, _), tokens, right in zip(CASES, found, await asyncio.wrap_future(expected), strict=True):
        assert tokens == right, f"{length} tokens"


async def test_a_second_turn(regions: Any, toolbox: Any, smollm2_dir: Path) -> None:
    """A conversation of 2,000 tokens goes on: the second turn computes and sends its increment alone (bytes counted on
    both sides), and says token for token what it says without a cache."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json")).encode(TEXT * 60).ids[50:]
    layout, block = regions.decode.info.layout, regions.decode.prefixes.block_tokens
    first = await regions.generate(ids[:2000], 48, reuse=True)
    assert (first.prefill_held, first.decode_held) == (0, 0)
    prompt = [*ids[:2000], *first.answer.token_ids, *ids[2300:2400]]
    second = await regions.generate(prompt, 24, reuse=True)
    assert second.prefill_held == 1999 // block * block
    assert second.decode_held == 2047 // block * block
    increment = layout.total_bytes(TokenRange(second.decode_held, len(prompt) - 1))
    assert second.sent_bytes == second.received_bytes == increment
    assert increment < first.sent_bytes / 10
    assert second.done.reports[0].wire_bytes < first.done.reports[0].wire_bytes / 10
    assert second.answer.token_ids == (await regions.generate(prompt, 24)).answer.token_ids
