"""The KV file: what was written comes back, and anything else is one clear error before memory is taken for it."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import msgspec
import pytest
from prfaas.common.kv_layout import KvLayout, LayerLayout, TensorKind, TensorLayout, TokenRange
from prfaas.services import kv_file
from prfaas.services.kv_file import KvCapture, KvFileError

KEY = TensorLayout(TensorKind.KEY, "bfloat16", 2, (4,))
VALUE = TensorLayout(TensorKind.VALUE, "bfloat16", 2, (4,))
DENSE = KvLayout((LayerLayout((KEY, VALUE)), LayerLayout(()), LayerLayout((KEY, VALUE))))
HYBRID = KvLayout(
    (
        LayerLayout((TensorLayout(TensorKind.KEY, "bfloat16", 2, (4,), window_tokens=7), VALUE)),
        LayerLayout((TensorLayout(TensorKind.RECURRENT, "float32", 1, (3, 5)),)),
    )
)


def capture(layout: KvLayout = DENSE, prompt_tokens: int = 30) -> KvCapture:
    rng = random.Random(prompt_tokens)
    nbytes = layout.total_bytes(TokenRange(0, prompt_tokens - 1))
    ids = tuple(rng.randrange(1000) for _ in range(prompt_tokens + 5))
    return KvCapture("tiny", "f" * 32, layout, ids[:prompt_tokens], ids[prompt_tokens:], rng.randbytes(nbytes))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.kv"
    kv_file.write(path, capture())
    return path


@pytest.mark.parametrize("layout", [DENSE, HYBRID])
def test_what_was_written_is_read(layout: KvLayout, tmp_path: Path) -> None:
    """KV, layout (windows and states too), tokens and names; nothing else stays in the folder."""
    written = capture(layout)
    kv_file.write(tmp_path / "a.kv", written)
    assert kv_file.read(tmp_path / "a.kv") == written
    assert [path.name for path in tmp_path.iterdir()] == ["a.kv"]


def test_the_kv_begins_at_a_cache_line_and_ends_the_file(file: Path) -> None:
    """As the format says, so that other programs can read it."""
    data = file.read_bytes()
    magic, version, header_bytes = struct.unpack_from("<8sII", data)
    assert (magic, version, (16 + header_bytes) % 64) == (b"PRFAASKV", 1, 0)
    assert data[16 + header_bytes :] == capture().data


@pytest.mark.parametrize("kept", [0, 5, 12, 15, 16, 17, 300, -65, -1])
def test_a_file_that_ends_early_is_refused_wherever_it_ends(file: Path, kept: int) -> None:
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(KvFileError, match=r"tiny\.kv (ends early|is not a KV file)"):
        kv_file.read(file)


def test_a_file_that_is_too_long_is_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(KvFileError, match="is too long"):
        kv_file.read(file)


def test_a_foreign_file_is_told_so_with_the_mend(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("dear diary, " * 100)
    with pytest.raises(KvFileError, match="is not a KV file; make one with prfaas capture-kv"):
        kv_file.read(tmp_path / "notes.txt")


def test_a_changed_byte_of_kv_is_found(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-7] ^= 1
    file.write_bytes(data)
    with pytest.raises(KvFileError, match="is damaged"):
        kv_file.read(file)


def test_another_version_is_refused(file: Path) -> None:
    data = bytearray(file.read_bytes())
    struct.pack_into("<I", data, 8, 9)
    file.write_bytes(data)
    with pytest.raises(KvFileError, match="format version 9"):
        kv_file.read(file)


def test_a_header_of_four_gigabytes_is_refused_before_it_is_read(file: Path) -> None:
    data = bytearray(file.read_bytes())
    struct.pack_into("<I", data, 12, 0xFFFF_FFFF)
    file.write_bytes(data)
    with pytest.raises(KvFileError, match="its header announces 4294967295 bytes"):
        kv_file.read(file)


def tensor(**changes: object) -> dict[str, object]:
    return {"kind": "key", "dtype": "bfloat16", "heads": 2, "dims": [4]} | changes


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt_token_ids": [1]},
        {"prompt_token_ids": [1, -1]},
        {"prompt_token_ids": [1, 1 << 40]},
        {"following_token_ids": ["a"]},
        {"kv_xxh3": 5},
        {"surprise": 1},
        {"layout": {}},
        {"layout": {"layers": []}},
        {"layout": {"layers": 5}},
        {"layout": {"layers": [[]]}},
        {"layout": {"layers": [[tensor(kind="soul")]]}},
        {"layout": {"layers": [[tensor(dtype="bfloat99")]]}},
        {"layout": {"layers": [[tensor(heads="2")]]}},
        {"layout": {"layers": [[tensor(heads=1.5)]]}},
        {"layout": {"layers": [[tensor(dims=7)]]}},
        {"layout": {"layers": [[tensor(heads=1 << 20, dims=[1 << 20])]]}},
        {"layout": {"layers": [[tensor(window_tokens="x")]]}},
    ],
)
def test_a_wrong_header_is_one_line(file: Path, changes: dict[str, object]) -> None:
    """Values outside their bounds, of the wrong type, or unknown; a layout of terabytes takes no memory."""
    data = file.read_bytes()
    header_bytes = struct.unpack_from("<I", data, 12)[0]
    header = msgspec.json.decode(data[16 : 16 + header_bytes])
    body = msgspec.json.encode(header | changes)
    file.write_bytes(data[:12] + struct.pack("<I", len(body)) + body + data[16 + header_bytes :])
    with pytest.raises(KvFileError, match="its header is wrong") as refused:
        kv_file.read(file)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("layout", [DENSE, HYBRID])
@pytest.mark.parametrize(("chunk_bytes", "step_tokens"), [(40, 8), (1 << 20, 8), (4096, 512), (3, 8)])
def test_chunks_are_the_kv_cut_as_a_transfer_cuts_it(layout: KvLayout, chunk_bytes: int, step_tokens: int) -> None:
    """Every byte once and in order; never over a step's end; between two tokens unless a token is larger."""
    made = capture(layout)
    chunks = made.chunks(chunk_bytes, step_tokens)
    starts = [chunk.start for chunk in chunks]
    assert starts == [0, *(chunk.end for chunk in chunks[:-1])]
    assert chunks[-1].end == len(made.data)
    for form, start, end in chunks:
        assert end - start <= max(chunk_bytes, 4)
        if not form.kind.is_state and form.token_bytes <= chunk_bytes:
            assert (end - start) % form.token_bytes == 0
            assert (end - start) // form.token_bytes <= step_tokens


def test_chunks_of_a_window_end_where_prefill_steps_end() -> None:
    """The window of 7 of 29 tokens begins at token 22; with steps of 8 it comes in tokens 22-23 and 24-28."""
    first_row = [end - start for form, start, end in capture(HYBRID).chunks(1 << 20, 8)][:2]
    assert first_row == [2 * 8, 5 * 8]


def test_a_prefix_is_the_same_prompt_shorter() -> None:
    """Row by row the first tokens' KV; the rest of the prompt becomes text that follows."""
    made = capture(prompt_tokens=30)
    short = made.prefix(11)
    assert short.prompt_token_ids + short.following_token_ids == made.prompt_token_ids + made.following_token_ids
    assert len(short.data) == DENSE.total_bytes(TokenRange(0, 10))
    for mine, whole in zip(kv_file.rows(DENSE, short.tokens), kv_file.rows(DENSE, made.tokens), strict=True):
        assert short.data[mine.start : mine.start + 80] == made.data[whole.start : whole.start + 80]


def test_kv_with_a_state_or_a_window_has_no_prefixes() -> None:
    assert capture(DENSE).has_prefixes
    assert not capture(HYBRID).has_prefixes
    with pytest.raises(ValueError, match="no prefix"):
        capture(HYBRID).prefix(10)
