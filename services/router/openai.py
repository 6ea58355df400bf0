"""The OpenAI API's request bodies, checked field by field. Pure: JSON in, a GenerationRequest or a clear 4xx out.

Every field is in one of four tables: read here, read as a note that changes nothing (`user`), valid only with its
neutral value because the engine has no such feature (`n`: 1), or unknown. Nothing is ignored in silence.

Where all decode nodes forward bodies to an OpenAI server of their engine's own (vLLM), that server has the last word:
what routing needs is checked here, and the rest goes through.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from prfaas.common.errors import RequestError, UnsupportedError
from prfaas.services.messages import FIRST_PRIORITY, LAST_PRIORITY, SamplingMessage

# A request is checked against its stops at every token, and its messages are rendered by a template: bounds on both.
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 256
MAX_MESSAGES = 4096
MAX_TEXT_PARTS = 1024
MAX_SALT_CHARS = 256
MAX_TOKENS = 1 << 24
"""Of any count of tokens; far above every model, far below what arithmetic would mind."""

Kind = Literal["chat", "completion"]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A valid request, before its prompt is tokenized. `prompt`: text or token ids; `messages`: a chat's, with every
    content a string. One of the two is None."""

    kind: Kind
    model: str
    prompt: str | list[int] | None
    messages: list[dict[str, Any]] | None
    max_output_tokens: int | None
    """None: as many as the context and the settings allow."""
    sampling: SamplingMessage
    stream: bool
    include_usage: bool
    continuous_usage: bool
    echo: bool
    cache_salt: str = ""
    """As vLLM's: prefixes are shared only with requests that have the same."""
    priority: int = 0
    """As vLLM's: lower is sooner."""
    forward: Mapping[str, Any] | None = None
    """The body itself, for an engine that answers it by its own server."""

    @property
    def prompt_field(self) -> str:
        return "messages" if self.kind == "chat" else "prompt"


COMMON_FIELDS = frozenset({
    "model", "max_tokens", "temperature", "top_p", "top_k", "seed", "min_tokens", "ignore_eos", "stop",
    "stop_token_ids", "include_stop_str_in_output", "stream", "stream_options", "cache_salt",
    "priority",
})  # fmt: skip
FIELDS: Mapping[Kind, frozenset[str]] = {
    "chat": COMMON_FIELDS | {"messages", "max_completion_tokens"},
    "completion": COMMON_FIELDS | {"prompt", "echo"},
}
NOTES: Mapping[str, tuple[type, str]] = {
    "user": (str, "a string"),
    "metadata": (dict, "an object"),
    "service_tier": (str, "a string"),
    "store": (bool, "true or false"),
    "safety_identifier": (str, "a string"),
    "prompt_cache_key": (str, "a string"),
    "prompt_cache_retention": (str, "a string"),
    "request_id": (str, "a string"),
}
"""They say something about the request and change nothing of its answer."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "logit_bias": ({},),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_p": (0,),
    "use_beam_search": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "detokenize": (True,),
    "return_token_ids": (False,),
    "kv_transfer_params": (),
}
"""Features of OpenAI and vLLM that this engine doesn't have, with the values that don't ask for them (null always)."""
NEVER = frozenset({"n", "best_of", "use_beam_search", "suffix", "modalities", "audio", "kv_transfer_params"})
"""Of these, what doesn't go with KV from elsewhere, whatever the engine."""


def parse_request(kind: Kind, body: Any, forwards: bool = False, adapters: Set[str] = frozenset()) -> GenerationRequest:
    """`body`: parsed JSON. forwards: the decode nodes take it as it is. adapters: models that only their engines know.
    Raises RequestError or UnsupportedError naming the field in `param`."""
    if not isinstance(body, dict):
        raise RequestError(f"the body must be a JSON object, not {_json_type(body)}")
    _refuse_unsupported(kind, body, NEVER if forwards else NEUTRAL.keys(), unknown_too=not forwards)
    theirs = kind == "chat" or body.get("model") in adapters or not _is_ours(kind, body)
    forward = body if forwards and theirs else None
    stream = _boolean(body, "stream")
    include_usage, continuous_usage = _stream_options(body, stream)
    max_output_tokens = _max_output_tokens(body)
    sampling = _sampling(body)
    if max_output_tokens is not None and sampling.min_tokens > max_output_tokens:
        raise RequestError(
            f"min_tokens ({sampling.min_tokens}) is above the limit of {max_output_tokens} output tokens",
            param="min_tokens",
        )
    return GenerationRequest(
        kind=kind,
        model=_model(body),
        prompt=_prompt(body) if kind == "completion" else None,
        messages=_messages(body, as_they_are=forwards) if kind == "chat" else None,
        max_output_tokens=max_output_tokens,
        sampling=sampling,
        stream=stream,
        include_usage=include_usage,
        continuous_usage=continuous_usage,
        echo=_boolean(body, "echo"),
        cache_salt=_cache_salt(body),
        priority=_integer(body, "priority", FIRST_PRIORITY, LAST_PRIORITY) or 0,
        forward=forward,
    )


# -- what we don't do -------------------------------------------------------------------------------------------------


def _is_ours(kind: Kind, body: Mapping[str, Any]) -> bool:
    """A decode node can answer it from token ids, and another one go on with it."""
    try:
        _refuse_unsupported(kind, body, NEUTRAL.keys(), unknown_too=True)
    except RequestError:
        return False
    return True


def _refuse_unsupported(kind: Kind, body: Mapping[str, Any], refused: Set[str], unknown_too: bool) -> None:
    """refused: of NEUTRAL, what may have its neutral value alone."""
    known = FIELDS[kind]
    for name, value in body.items():
        if name in known or value is None:
            continue
        if name in NOTES:
            kind_of_note, wanted = NOTES[name]
            if not isinstance(value, kind_of_note):
                raise _wrong(name, wanted, value)
            continue
        if name in NEUTRAL and name not in refused:
            continue
        if name in NEUTRAL:
            if not any(_same(value, neutral) for neutral in NEUTRAL[name]):
                raise UnsupportedError(_unsupported(name), param=name, code="unsupported_parameter")
            continue
        if name in FIELDS["chat"] | FIELDS["completion"]:
            raise RequestError(f"{name} does not belong to a {kind} request", param=name, code="unknown_parameter")
        if not unknown_too:
            continue
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise RequestError(f"unknown field {name[:100]!r}{hint}", param=name[:100], code="unknown_parameter")


def _unsupported(name: str) -> str:
    allowed = [repr(value) for value in NEUTRAL[name]]
    return f"{name} is not supported by this engine; leave it out{f' or give {allowed[0]}' if allowed else ''}"


def _same(value: Any, neutral: Any) -> bool:
    """Equal and of one JSON type: in Python True == 1."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


# -- fields -----------------------------------------------------------------------------------------------------------


def _model(body: Mapping[str, Any]) -> str:
    model = body.get("model")
    if model is None:
        raise RequestError("model is required; GET /v1/models lists it", param="model")
    if not isinstance(model, str) or not 1 <= len(model) <= 512:
        raise _wrong("model", "a string of at most 512 characters", model)
    return model


def _cache_salt(body: Mapping[str, Any]) -> str:
    salt = body.get("cache_salt")
    if salt is None:
        return ""
    if not isinstance(salt, str) or not 1 <= len(salt) <= MAX_SALT_CHARS:
        raise _wrong("cache_salt", f"a string of 1 to {MAX_SALT_CHARS} characters", salt)
    return salt


def _prompt(body: Mapping[str, Any]) -> str | list[int]:
    prompt = body.get("prompt")
    if prompt is None:
        raise RequestError("prompt is required", param="prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    elif isinstance(prompt, list) and len(prompt) > 1 and isinstance(prompt[0], str | list):
        raise UnsupportedError(
            f"a list of {len(prompt)} prompts is not supported; send one request for each", param="prompt"
        )
    if not isinstance(prompt, str | list):
        raise _wrong("prompt", "a string or a list of token ids", prompt)
    if not prompt:
        raise RequestError("prompt is empty", param="prompt")
    if isinstance(prompt, list):
        _check_integers(prompt)
    return prompt


def _check_integers(prompt: list[Any]) -> None:
    """To msgspec neither JSON's true nor 1.0 is an integer, and it takes a quarter of `set(map(type, prompt))`."""
    try:
        msgspec.convert(prompt, list[int])
    except msgspec.ValidationError:
        wrong = next(value for value in prompt if type(value) is not int)
        raise RequestError(
            f"prompt must be a string or a list of token ids; {_show(wrong)} is no token id", param="prompt"
        ) from None


ROLES = ("system", "developer", "user", "assistant")


def _messages(body: Mapping[str, Any], as_they_are: bool) -> list[dict[str, Any]]:
    """as_they_are: the engine's own server checks them; only what KV from elsewhere can't be for is refused."""
    messages = body.get("messages")
    if messages is None:
        raise RequestError("messages is required", param="messages")
    if not isinstance(messages, list):
        raise _wrong("messages", "a list of messages", messages)
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise RequestError(f"messages must hold 1 to {MAX_MESSAGES} messages, not {len(messages)}", param="messages")
    check = _text_message if as_they_are else _message
    return [check(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _text_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise _wrong(where, "an object with role and content", message)
    if isinstance(message.get("content"), list):
        return message | {"content": _content(message, where)}
    return message


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise _wrong(where, "an object with role and content", message)
    role = message.get("role")
    if role in ("tool", "function"):
        raise UnsupportedError(f"{where}.role {role}: tools are not supported by this engine", param=f"{where}.role")
    if role not in ROLES:
        raise RequestError(
            f"{where}.role must be one of {', '.join(ROLES)}; it is {_show(role)}", param=f"{where}.role"
        )
    parsed = {"role": "system" if role == "developer" else role, "content": _content(message, where)}
    for name, value in message.items():
        if name in ("role", "content") or value is None or (value == [] and name == "tool_calls"):
            continue
        if name != "name":
            raise UnsupportedError(f"{where}.{name[:100]} is not supported", param=f"{where}.{name[:100]}")
        if not isinstance(value, str) or len(value) > 256:
            raise _wrong(f"{where}.name", "a string of at most 256 characters", value)
        parsed["name"] = value
    return parsed


def _content(message: Mapping[str, Any], where: str) -> str:
    """Text parts are joined by newlines, as vLLM does."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _wrong(f"{where}.content", "a string or a list of text parts", content)
    if not 1 <= len(content) <= MAX_TEXT_PARTS:
        raise RequestError(f"{where}.content must hold 1 to {MAX_TEXT_PARTS} parts", param=f"{where}.content")
    texts = []
    for i, part in enumerate(content):
        at = f"{where}.content[{i}]"
        if not isinstance(part, dict):
            raise _wrong(at, 'a part such as {"type": "text", "text": "..."}', part)
        if part.get("type") != "text":
            raise UnsupportedError(f"{at}.type {_show(part.get('type'))}: only text is supported", param=f"{at}.type")
        if not isinstance(part.get("text"), str):
            raise _wrong(f"{at}.text", "a string", part.get("text"))
        texts.append(part["text"])
    return "\n".join(texts)


def _max_output_tokens(body: Mapping[str, Any]) -> int | None:
    """max_completion_tokens is the newer name; both may be given when they agree."""
    given = {
        name: _integer(body, name, 1, MAX_TOKENS)
        for name in ("max_tokens", "max_completion_tokens")
        if body.get(name) is not None
    }
    if len(set(given.values())) > 1:
        raise RequestError("max_tokens and max_completion_tokens differ; give one", param="max_completion_tokens")
    return next(iter(given.values()), None)


def _sampling(body: Mapping[str, Any]) -> SamplingMessage:
    top_p = _number(body, "top_p", 0, 1, default=1.0)
    if top_p == 0:
        raise RequestError("top_p must be above 0", param="top_p")
    return SamplingMessage(
        temperature=_number(body, "temperature", 0, 2, default=1.0),
        top_p=top_p,
        # −1 is vLLM's older way to say "off".
        top_k=max(0, _integer(body, "top_k", -1, MAX_TOKENS) or 0),
        seed=_integer(body, "seed", -(1 << 63), (1 << 63) - 1),
        min_tokens=_integer(body, "min_tokens", 0, MAX_TOKENS) or 0,
        ignore_eos=_boolean(body, "ignore_eos"),
        stop_token_ids=_stop_token_ids(body),
        stop=_stops(body),
        include_stop_str_in_output=_boolean(body, "include_stop_str_in_output"),
    )


def _stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop")
    if stop is None:
        return ()
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        raise _wrong("stop", "a string or a list of strings", stop)
    if len(stops) > MAX_STOPS or not all(1 <= len(s) <= MAX_STOP_CHARS for s in stops):
        raise RequestError(f"stop may hold {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters", param="stop")
    return tuple(stops)


def _stop_token_ids(body: Mapping[str, Any]) -> tuple[int, ...]:
    ids = body.get("stop_token_ids")
    if ids is None:
        return ()
    if not isinstance(ids, list) or len(ids) > MAX_STOP_TOKEN_IDS or not all(type(i) is int and i >= 0 for i in ids):
        raise _wrong("stop_token_ids", f"a list of at most {MAX_STOP_TOKEN_IDS} token ids", ids)
    return tuple(ids)


def _stream_options(body: Mapping[str, Any], stream: bool) -> tuple[bool, bool]:
    options = body.get("stream_options")
    if options is None:
        return False, False
    if not isinstance(options, dict):
        raise _wrong("stream_options", "an object", options)
    if not stream:
        raise RequestError("stream_options goes with stream: true only", param="stream_options")
    for name, value in options.items():
        neutral = name == "include_obfuscation" and value is False
        if name not in ("include_usage", "continuous_usage_stats") and value is not None and not neutral:
            raise UnsupportedError(
                f"stream_options.{name[:100]} is not supported", param=f"stream_options.{name[:100]}"
            )
    include = _boolean(options, "include_usage", "stream_options.include_usage")
    continuous = _boolean(options, "continuous_usage_stats", "stream_options.continuous_usage_stats")
    return include, include and continuous


# -- types ------------------------------------------------------------------------------------------------------------


def _boolean(body: Mapping[str, Any], name: str, param: str | None = None) -> bool:
    value = body.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise _wrong(param or name, "true or false", value)
    return value


def _integer(body: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int:
        raise _wrong(name, "a whole number", value)
    if not low <= value <= high:
        raise RequestError(f"{name} must be from {low} to {high}; it is {_show(value)}", param=name)
    return value


def _number(body: Mapping[str, Any], name: str, low: float, high: float, *, default: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if type(value) not in (int, float):
        raise _wrong(name, "a number", value)
    if not low <= value <= high:
        raise RequestError(f"{name} must be from {low} to {high}; it is {_show(value)}", param=name)
    return float(value)


def _wrong(param: str, wanted: str, value: Any) -> RequestError:
    return RequestError(f"{param} must be {wanted}; it is {_show(value)}", param=param)


def _show(value: Any) -> str:
    """Short: a mistake of a megabyte is not sent back."""
    if isinstance(value, str | int | float) or value is None:
        text = "null" if value is None else repr(value)
        return text if len(text) <= 60 else text[:57] + "..."
    return _json_type(value)


def _json_type(value: Any) -> str:
    names: Sequence[tuple[type, str]] = ((dict, "an object"), (list, "a list"), (str, "a string"), (bool, "a boolean"))
    return next((name for kind, name in names if isinstance(value, kind)), "null" if value is None else "a number")
