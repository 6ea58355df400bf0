"""Emulated KV: a function of the tokens, the same however it is cut, and every wrong byte is found."""

from __future__ import annotations

import pytest
from prfaas.common.kv_layout import WHOLE, Shard, TokenRange
from prfaas.services.engine.emulated.content import KvContent, emulated_layout
from prfaas.services.engine.emulated.output import OutputTokens
from prfaas.services.engine.emulated.rows import Rows

PROMPT = [(i * 7) % 256 for i in range(300)]


@pytest.mark.parametrize(("head_dim", "state_bytes"), [(64, 0), (3, 7), (16, 4096)])
def test_written_in_steps_is_read_as_a_whole(head_dim: int, state_bytes: int) -> None:
    """Steps of any length write what one step writes; the state comes with the last; pieces cover every byte once."""
    layout = emulated_layout(2, 2, head_dim, state_bytes)
    tokens = TokenRange(10, 299)
    content = KvContent(layout, PROMPT)
    memory = bytearray(layout.total_bytes(tokens))
    rows = Rows(memoryview(memory), layout, tokens, WHOLE)
    covered = 0
    for start, end in ((10, 11), (11, 200), (200, 299)):
        for layer in range(2):
            covered += sum(piece.data.nbytes for piece in rows.write(content, layer, start, end))
    assert covered == len(memory)
    assert [rows.first_wrong_byte(content, layer) for layer in range(2)] == [None, None]


def test_every_wrong_byte_is_found_and_named() -> None:
    layout = emulated_layout(1, 2, 4, 16)
    tokens = TokenRange(0, 5)
    content = KvContent(layout, PROMPT)
    memory = bytearray(layout.total_bytes(tokens))
    rows = Rows(memoryview(memory), layout, tokens, WHOLE)
    rows.write(content, 0, 0, 5)
    for offset in range(len(memory)):
        memory[offset] ^= 1
        assert rows.first_wrong_byte(content, 0) is not None, offset
        memory[offset] ^= 1
    memory[5 * 8 * 3 + 9] ^= 0x80  # the fourth row is the value of head 1
    assert rows.first_wrong_byte(content, 0) == "layer 0, tensor 1 (value), row 1 (head 1), byte 9"


def test_a_row_of_other_tokens_layers_or_heads_is_wrong() -> None:
    """Each of them changes the bytes, so a swapped row can't pass; and a shard's rows are those of its heads."""
    layout = emulated_layout(2, 2, 8, 0)
    tokens = TokenRange(0, 20)
    content = KvContent(layout, PROMPT)
    row = bytearray(layout.extent(0, 0, tokens).row_bytes)

    def filled(with_content: KvContent, layer: int, tensor: int, head: int) -> bytes:
        with_content.fill(memoryview(row), layer, tensor, head, 0, 20)
        return bytes(row)

    first_token_changed = KvContent(layout, [PROMPT[0] + 1, *PROMPT[1:]])
    rows = {filled(content, layer, tensor, head) for layer in (0, 1) for tensor in (0, 1) for head in (0, 1)}
    assert len(rows | {filled(first_token_changed, 0, 0, 0)}) == 9
    assert filled(content, 0, 0, 0)[-16:] != filled(first_token_changed, 0, 0, 0)[-16:]

    shard = Shard(1, 2, 1, 2)
    memory = bytearray(layout.total_bytes(tokens, shard))
    Rows(memoryview(memory), layout, tokens, shard).write(content, 0, 0, 20)
    assert bytes(memory[: len(row)]) == filled(content, 0, 0, 1)


def test_outputs_depend_on_prompt_seed_and_position_alone() -> None:
    """A request that runs again says the same; readable; another seed or prompt says something else."""

    def text(prompt: list[int], seed: int | None) -> bytes:
        tokens = OutputTokens(prompt, seed)
        return bytes(tokens.token(position) for position in range(40))

    assert text(PROMPT, 1) == text(list(PROMPT), 1)
    assert text(PROMPT, None).decode().isprintable()
    assert len({text(PROMPT, None), text(PROMPT, 1), text(PROMPT, -1), text(PROMPT[1:], 1)}) == 4
