"""Text to ids, ids to text, chat templates; and text from tokens that come one at a time."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prfaas.common.errors import ConfigError, RequestError
from prfaas.services.engine.tokenizer import BYTES_EOS, ByteTokenizer, TextStream, Tokenizer, load_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

loaded = functools.cache(load_tokenizer)
TRICKY = "naïve 你好，世界 👩‍👩‍👧‍👦 🇩🇪 e\u0301 \ufffd tabs\t\n  two spaces ﷽ x"


def streamed(tokenizer: Tokenizer, ids: Sequence[int], context: Sequence[int] = ()) -> str:
    stream = TextStream(tokenizer, context)
    return "".join(stream.push(i) for i in ids) + stream.flush()


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory whose tokens are the 256 byte symbols and a few merges, as GPT-2's kind of tokenizer has."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    merges = [("Ġ", "w"), ("ð", "Ł"), ("ä", "½")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    directory = tmp_path_factory.mktemp("byte_level")
    backend.save(str(directory / "tokenizer.json"))
    return directory


def write_config(directory: Path, **config: object) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def test_a_byte_is_a_token() -> None:
    """`bytes` needs no directory: ids are UTF-8, and the end of the sequence has an id of its own without text."""
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]
    assert tokenizer.decode([97, 0xC3, 0xA9, BYTES_EOS]) == "aé"
    assert tokenizer.eos_token_ids == (BYTES_EOS,)
    assert tokenizer.render_chat([{"role": "user", "content": "Hi"}]) == "user: Hi\nassistant: "


def test_the_chat_template_has_what_transformers_gives_it(byte_level: Path) -> None:
    """Special tokens, `tojson` without HTML escapes, loop controls, generation blocks and today's date."""
    template = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }}="
        "{{ m.content | tojson }};{% endfor %}{% generation %}{{ eos_token }}{% endgeneration %}"
        "{% if add_generation_prompt %}>{% endif %}{{ strftime_now('%Y') | length }}"
    )
    write_config(byte_level, bos_token={"content": "<s>"}, eos_token="</s>", chat_template=template)
    chat = load_tokenizer(str(byte_level)).render_chat(
        [{"role": "user", "content": "<é>"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    )
    assert chat == '<s>user="<é>";assistant="b";</s>>4'


def test_an_older_models_template_file_is_read(byte_level: Path) -> None:
    """chat_template.json, before the one in tokenizer_config.json and behind chat_template.jinja."""
    write_config(byte_level, chat_template="config")
    older, newer = byte_level / "chat_template.json", byte_level / "chat_template.jinja"
    try:
        older.write_text(json.dumps({"chat_template": "json"}))
        assert load_tokenizer(str(byte_level)).render_chat([]) == "json"
        newer.write_text("jinja")
        assert load_tokenizer(str(byte_level)).render_chat([]) == "jinja"
    finally:
        older.unlink()
        newer.unlink(missing_ok=True)


def test_bos_and_eos_are_added_as_the_config_says(byte_level: Path) -> None:
    """add_bos_token and add_eos_token win over tokenizer.json; a rendered chat gets neither."""
    backend = Backend.from_file(str(byte_level / "tokenizer.json"))
    bos, eos, plain = backend.token_to_id("<s>"), backend.token_to_id("</s>"), backend.encode("hi").ids
    for flags, ids in [
        ({"add_bos_token": True}, [bos, *plain]),
        ({"add_bos_token": True, "add_eos_token": True}, [bos, *plain, eos]),
        ({"add_bos_token": False}, plain),
        ({}, plain),
    ]:
        write_config(byte_level, bos_token="<s>", eos_token="</s>", **flags)
        tokenizer = load_tokenizer(str(byte_level))
        assert tokenizer.encode("hi") == ids
        assert tokenizer.encode("hi", special_tokens=False) == plain


def test_a_template_that_refuses_is_the_clients_fault(byte_level: Path) -> None:
    """raise_exception, and a message that lacks what the template needs, name the field `messages`."""
    for template in (
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0]['content'] + messages[7]['content'] }}",
        "{{ messages.__class__.__mro__ }}",
    ):
        write_config(byte_level, chat_template=template)
        with pytest.raises(RequestError) as caught:
            load_tokenizer(str(byte_level)).render_chat([{"role": "user", "content": "x"}])
        assert caught.value.param == "messages"


def test_without_a_template_chat_says_so(byte_level: Path) -> None:
    write_config(byte_level)
    with pytest.raises(RequestError, match="no chat template"):
        load_tokenizer(str(byte_level)).render_chat([{"role": "user", "content": "x"}])


def test_end_of_sequence_ids_come_from_where_generate_takes_them(byte_level: Path) -> None:
    """generation_config.json before config.json before the tokenizer's own token."""
    write_config(byte_level, eos_token="</s>")
    own = Backend.from_file(str(byte_level / "tokenizer.json")).token_to_id("</s>")
    assert load_tokenizer(str(byte_level)).eos_token_ids == (own,)
    try:
        (byte_level / "config.json").write_text('{"text_config": {"eos_token_id": 5}}')
        assert load_tokenizer(str(byte_level)).eos_token_ids == (5,)
        (byte_level / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
        assert load_tokenizer(str(byte_level)).eos_token_ids == (2, 7)
    finally:
        (byte_level / "config.json").unlink()
        (byte_level / "generation_config.json").unlink()


def test_a_directory_without_a_tokenizer_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json does not exist"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="is not a tokenizer"):
        load_tokenizer(str(tmp_path))


def test_text_that_is_not_unicode_is_refused(byte_level: Path) -> None:
    """A lone surrogate, which JSON can say, is a 400 and not a crash."""
    for path in ("bytes", str(byte_level)):
        with pytest.raises(RequestError, match="not valid Unicode at character 1"):
            load_tokenizer(path).encode("a\ud800")


def test_streamed_text_equals_whole_text() -> None:
    """Emoji of several code points, CJK, combining marks, U+FFFD itself: joined pieces are the text."""
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(TRICKY * 3)
    assert streamed(tokenizer, ids) == TRICKY * 3


def test_an_incomplete_character_is_held_back() -> None:
    """No piece ever holds half a character, and what is held at the end is flushed as U+FFFD."""
    stream = TextStream(ByteTokenizer())
    a, b, c, d = "😀".encode()
    assert [stream.push(i) for i in (97, a, b, c)] == ["a", "", "", ""]
    assert stream.held_tokens == 3
    assert stream.push(d) == "😀"
    assert stream.held_tokens == 0
    assert stream.push(a) == ""
    assert stream.flush() == "\ufffd"


@settings(max_examples=300)
@given(st.binary(max_size=80))
def test_any_bytes_stream_to_the_text_that_whole_decoding_gives(data: bytes) -> None:
    """Also for outputs that are not UTF-8 at all."""
    assert streamed(ByteTokenizer(), list(data)) == data.decode("utf-8", "replace")


@settings(max_examples=200)
@given(ids=st.lists(st.integers(0, 258), max_size=60))
def test_any_tokens_of_a_byte_level_tokenizer_stream_to_the_whole_text(byte_level: Path, ids: list[int]) -> None:
    tokenizer = loaded(str(byte_level))
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)


def test_the_window_is_short_however_long_the_output() -> None:
    """The cost of a token does not grow with the output: no decode ever sees more than a few tokens."""

    class Spy(ByteTokenizer):
        longest = 0

        def decode(self, ids: Sequence[int]) -> str:
            self.longest = max(self.longest, len(ids))
            return super().decode(ids)

    for data in ("word " * 400, "你" * 700, "\ufffd" * 700):
        spy = Spy()
        assert streamed(spy, list(data.encode())) == data
        assert spy.longest <= 16
    spy = Spy()
    streamed(spy, [0x80] * 2000)
    assert spy.longest <= 16


def test_the_first_word_keeps_its_space() -> None:
    """A tokenizer that strips the space at a text's start does not strip it from an output that follows a prompt."""
    backend = Backend(models.WordLevel({"▁Once": 0, "▁upon": 1, "▁a": 2}, unk_token="▁a"))
    backend.decoder = decoders.Metaspace()

    class Words(ByteTokenizer):
        def decode(self, ids: Sequence[int]) -> str:
            return str(backend.decode(list(ids)))

    assert streamed(Words(), [1, 2]) == "upon a"
    assert streamed(Words(), [1, 2], context=[0]) == " upon a"
    long = [0, 1, 2] * 20
    assert streamed(Words(), long) == backend.decode(long)


@pytest.mark.model
def test_smollm2(smollm2_dir: Path) -> None:
    """The real tokenizer: whole = streamed, the chat template writes its control tokens, `<|im_end|>` ends."""
    tokenizer = load_tokenizer(str(smollm2_dir))
    ids = tokenizer.encode(TRICKY)
    assert tokenizer.decode(ids) == TRICKY
    assert streamed(tokenizer, ids) == TRICKY
    chat = tokenizer.render_chat([{"role": "user", "content": "Hi"}])
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.encode(chat, special_tokens=False).count(2) == 2


@pytest.mark.model
@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(17, 49151), max_size=40))
def test_any_tokens_of_smollm2_stream_to_the_whole_text(smollm2_dir: Path, ids: list[int]) -> None:
    tokenizer = loaded(str(smollm2_dir))
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)
