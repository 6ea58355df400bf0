"""Text to token ids and back, the chat template, and text from a growing output.

Two kinds: a model directory's `tokenizer.json` by the `tokenizers` package (no transformers, no torch: the router runs
on this), and `bytes`, where a byte is a token, for the emulated engine. All of it is pure but for `load_tokenizer`,
which reads the directory, and `strftime_now`, which templates may ask for today's date.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jinja2
import jinja2.ext
import tokenizers
import tokenizers.processors
from jinja2.sandbox import ImmutableSandboxedEnvironment
from prfaas.common.errors import ConfigError, RequestError

BYTES = "bytes"
"""The `model_path` of the byte tokenizer."""
BYTES_EOS = 256
BYTES_VOCABULARY = 257
BYTES_MAX_TOKENS = 262_144


class Tokenizer(Protocol):
    @property
    def vocabulary(self) -> int:
        """Ids run from 0 to vocabulary − 1."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """`special_tokens`: add what the model expects around a text (a chat template has written it already).

        Thread-safe. Raises RequestError for text that is not valid Unicode (lone surrogates).
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens are skipped; bytes that are not UTF-8 become U+FFFD."""
        ...

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The chat template's text, generation prompt included. `content` is a string by now. variables: further ones
        of the template (`tools`, or what a model's own template knows).

        Raises RequestError (param="messages") when the template refuses the messages, or the model has no template.
        """
        ...


def load_tokenizer(model_path: str) -> Tokenizer:
    """`bytes`, or a directory with tokenizer.json. Raises ConfigError naming the file that is missing or broken."""
    if model_path == BYTES:
        return ByteTokenizer()
    directory = Path(model_path)
    backend = _backend(directory)
    backend.no_truncation()
    backend.no_padding()
    config = _read_json(directory / "tokenizer_config.json")
    specials = _special_tokens(config)
    _apply_bos_and_eos(backend, config, specials)
    return FileTokenizer(
        backend,
        read_eos_token_ids(directory),
        ChatTemplate(_template_source(directory, config), specials),
    )


class FileTokenizer:
    """A model directory's tokenizer."""

    def __init__(
        self, backend: tokenizers.Tokenizer, eos_token_ids: tuple[int, ...], chat_template: ChatTemplate
    ) -> None:
        self._backend = backend
        self._chat_template = chat_template
        self.vocabulary: int = backend.get_vocab_size(with_added_tokens=True)
        self.eos_token_ids = eos_token_ids

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        _check_unicode(text)
        ids: list[int] = self._backend.encode(text, add_special_tokens=special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._backend.decode(ids if isinstance(ids, list) else list(ids), skip_special_tokens=True)
        return text

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        return self._chat_template.render(messages, **variables)


class ByteTokenizer:
    """A byte of UTF-8 is a token; one special id, the end of the sequence."""

    vocabulary = BYTES_VOCABULARY
    eos_token_ids = (BYTES_EOS,)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        _check_unicode(text)
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", "replace")

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        return "".join(f"{m.get('role', '')}: {m.get('content') or ''}\n" for m in messages) + "assistant: "


class ChatTemplate:
    """A chat template in a sandbox, with the globals that transformers gives it. Templates come with models from
    strangers: they see plain data only, and can neither write attributes nor reach Python's internals."""

    def __init__(self, source: str | None, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = None if source is None else environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError([f"the chat template's line {error.lineno} is not jinja: {error.message}"]) from error

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        if self._template is None:
            raise RequestError("this model has no chat template; use /v1/completions", param="messages")
        try:
            known = {"tools": None, "documents": None, "add_generation_prompt": True} | self._special_tokens
            return self._template.render(known | variables | {"messages": [dict(m) for m in messages]})
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise RequestError(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}` marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own protocol)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """jinja's own filter escapes HTML, which is wrong for a prompt."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().astimezone().strftime(format)


def _check_unicode(text: str) -> None:
    """JSON can say `\\ud800`; no tokenizer can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the text is not valid Unicode at character {error.start}") from error


# -- reading a model directory ----------------------------------------------------------------------------------------


def _backend(directory: Path) -> tokenizers.Tokenizer:
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise ConfigError([f"no tokenizer: {file} does not exist; give a model directory or {BYTES!r}"])
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers package raises a bare Exception
        raise ConfigError([f"{file} is not a tokenizer: {error}"]) from error


def _read_json(file: Path) -> dict[str, Any]:
    """{} when there is none."""
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError([f"{file} is not JSON: {error}"]) from error
    return data if isinstance(data, dict) else {}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, … : each a string, or an object with the string in `content`."""
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        value = config.get(name)
        if isinstance(value, Mapping):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def _apply_bos_and_eos(backend: tokenizers.Tokenizer, config: Mapping[str, Any], specials: Mapping[str, str]) -> None:
    """tokenizer_config.json's add_bos_token and add_eos_token, where given, win over tokenizer.json, as in
    transformers."""
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return

    def token(name: str) -> list[str]:
        text = specials.get(f"{name}_token")
        wanted = config.get(f"add_{name}_token") and text is not None and backend.token_to_id(text) is not None
        return [text] if wanted and text is not None else []

    before, after = token("bos"), token("eos")
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=[*before, "$A", *after],
        special_tokens=[(text, backend.token_to_id(text)) for text in dict.fromkeys([*before, *after])],
    )


def _template_source(directory: Path, config: Mapping[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    source = _read_json(directory / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(source, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, Mapping)}
        source = named.get("default")
    return source if isinstance(source, str) else None


def read_eos_token_ids(directory: Path) -> tuple[int, ...]:
    """A model's end-of-sequence ids, for whoever asks: those of generation_config.json, else of config.json, else the
    tokenizer's own eos token. Raises ConfigError for a file that is not JSON."""
    config = _read_json(directory / "config.json")
    text_config = config.get("text_config")
    for source in (_read_json(directory / "generation_config.json"), config, text_config):
        value = source.get("eos_token_id") if isinstance(source, Mapping) else None
        if isinstance(value, int):
            return (value,)
        if isinstance(value, list) and value:
            return tuple(int(v) for v in value)
    eos = _special_tokens(_read_json(directory / "tokenizer_config.json")).get("eos_token")
    if eos is None or not (directory / "tokenizer.json").is_file():
        return ()
    token = _backend(directory).token_to_id(eos)
    return () if token is None else (token,)


# -- text from a growing output ---------------------------------------------------------------------------------------


class TextStream:
    """The text of tokens that come one at a time: the pieces joined equal the text of all.

    A token may hold a part of a character, and its text may depend on its left neighbour (a leading space). So a
    window of the last few tokens is decoded again for each new one, and what ends in an incomplete character is held
    back. `context`: the last tokens of the prompt, so that the first piece keeps its leading space.
    """

    _WINDOW = 12  # tokens, at which the window is cut …
    _KEEP = 6  # … to its last few; a character has at most 4 bytes, so at most 4 tokens
    _MOST_HELD = 4  # tokens without a whole character: no character is that long, the bytes are not UTF-8

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._decode = tokenizer.decode
        self._window = list(context[-self._KEEP :])
        self._text = self._decode(self._window) if self._window else ""
        self._emitted = self._complete_length()
        self._held_tokens = 0

    @property
    def held_tokens(self) -> int:
        """How many of the last tokens pushed have text that is held back."""
        return self._held_tokens

    def push(self, token_id: int) -> str:
        """The text that is certain now and was not before; "" while a character is incomplete."""
        self._window.append(token_id)
        self._text = self._decode(self._window)
        complete = len(self._text)
        if self._text.endswith("\ufffd"):
            self._held_tokens += 1
            if self._held_tokens < self._MOST_HELD:
                return ""
            complete = self._complete_length()
        else:
            self._held_tokens = 0
        new = self._text[self._emitted : complete]
        self._emitted = max(self._emitted, complete)
        if len(self._window) > self._WINDOW:
            self._cut()
        return new

    def flush(self) -> str:
        """What is still held back, at the end of the output."""
        new = self._text[self._emitted :]
        self._emitted = len(self._text)
        self._held_tokens = 0
        return new

    def _complete_length(self) -> int:
        """An incomplete character at the end decodes to one U+FFFD."""
        return len(self._text) - self._text.endswith("\ufffd")

    def _cut(self) -> None:
        unsaid = len(self._text) - self._emitted
        del self._window[: -self._KEEP]
        self._text = self._decode(self._window)
        self._emitted = len(self._text) - unsaid
