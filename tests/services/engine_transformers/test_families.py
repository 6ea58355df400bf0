"""Every verified model type gives `generate`'s tokens through prefill engine, transfer and decode engine (float32)."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from prfaas.common.config import EngineConfig
from prfaas.common.errors import ConfigError, ModelRefusedError
from prfaas.common.kv_layout import TensorKind
from prfaas.services.engine.api import DecodeRequest
from prfaas.services.engine.tokenizer import load_tokenizer
from prfaas.services.engine.transformers import loader
from prfaas.services.engine.transformers.families import VERIFIED
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

# One token; shorter than a convolution; around the window (48) and the step (40); many steps.
LENGTHS = [1, 2, 3, 5, 40, 41, 42, 49, 130, 301]
OUTPUT_TOKENS = 20


def generate(directory: Path, prompts: list[list[int]], output_tokens: int) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    answers = []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=output_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


@pytest.mark.parametrize("model_type", list(VERIFIED))
async def test_tokens_equal_generate(model_type: str, tiny_model: Callable[[str], Path], toolbox: Any) -> None:
    """Alone, ten at once, and prefilled locally: greedy output is `generate`'s, token for token, and all memory comes
    back."""
    directory = tiny_model(model_type)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(5, 1000, (n,), generator=generator).tolist() for n in LENGTHS]
    expected = await asyncio.to_thread(generate, directory, prompts, OUTPUT_TOKENS)
    settings = {"model": str(directory), "prefill_step_tokens": 40}
    pair = toolbox.Pair(await toolbox.started(**settings), await toolbox.started(**settings))
    free = (pair.prefill.load().free_kv_bytes, pair.decode.load().free_kv_bytes)

    alone = [(await pair.generate(prompt, OUTPUT_TOKENS)).token_ids for prompt in prompts]
    assert alone == expected
    together = await asyncio.gather(*(pair.generate(prompt, OUTPUT_TOKENS) for prompt in prompts))
    assert [answer.token_ids for answer in together] == expected
    requests = [DecodeRequest("r", prompt, OUTPUT_TOKENS, toolbox.GREEDY) for prompt in prompts]
    local = await asyncio.gather(*(toolbox.collect(pair.decode.decode(request, [])) for request in requests))
    assert [answer.token_ids for answer in local] == expected

    assert (pair.prefill.load().free_kv_bytes, pair.decode.load().free_kv_bytes) == free
    await pair.prefill.close()
    await pair.decode.close()


def test_layout_of_a_sliding_model(tiny_model: Callable[[str], Path]) -> None:
    """A window of W sends W − 1 tokens: the token that decode computes attends to itself and W − 1 before it."""
    loaded = loader.load(EngineConfig(model=str(tiny_model("gemma3_text"))))
    windows = [{tensor.window_tokens for tensor in layer.tensors} for layer in loaded.layout.layers]
    assert windows == [{47}, {47}, {None}, {47}]


def test_layout_of_a_hybrid_model(tiny_model: Callable[[str], Path]) -> None:
    """Recurrent states keep float32 whatever the model's dtype; the rest has the dtype that was asked for."""
    loaded = loader.load(EngineConfig(model=str(tiny_model("falcon_h1")), dtype="bfloat16"))
    tensors = {tensor.kind: tensor for tensor in loaded.layout.layers[0].tensors}
    assert list(tensors) == [TensorKind.KEY, TensorKind.VALUE, TensorKind.CONV, TensorKind.RECURRENT]
    assert tensors[TensorKind.KEY].dtype == tensors[TensorKind.CONV].dtype == "bfloat16"
    assert tensors[TensorKind.RECURRENT].dtype == "float32"
    assert tensors[TensorKind.RECURRENT].dims == (8, 16, 16)
    assert tensors[TensorKind.CONV].dims == (160, 4)


def test_fingerprint_names_the_weights(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """The same files under another name have the same fingerprint; one changed byte of the weights has another."""
    directory = tiny_model("llama")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in directory.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    first = loader.load(EngineConfig(model=str(directory))).fingerprint
    assert loader.load(EngineConfig(model=str(copy))).fingerprint == first
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert loader.load(EngineConfig(model=str(copy))).fingerprint != first


def test_the_engine_and_the_router_stop_at_the_same_tokens(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Where the configs name no end of sequence it is the tokenizer's own, not a default of transformers' class; where
    they do it is theirs, one or a list."""
    directory = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), directory)
    Tokenizer(WordLevel({"<s>": 0, "a": 1, "</s>": 7}, unk_token="<s>")).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    (directory / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((directory / "config.json").read_text())
    del config["eos_token_id"]
    for changes, expected in (({}, (7,)), ({"eos_token_id": [3, 4]}, (3, 4)), ({"eos_token_id": 5}, (5,))):
        (directory / "config.json").write_text(json.dumps(config | changes))
        loaded = loader.load(EngineConfig(model=str(directory)))
        assert loaded.eos_token_ids == load_tokenizer(str(directory)).eos_token_ids == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "jamba"}, "'jamba' has not been verified"),
        ({"model_type": "no-such-model"}, "unknown to the installed transformers"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope type 'dynamic'"),
    ],
)
def test_unverified_models_are_refused_before_weights_are_read(
    changes: dict[str, Any], words: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """The refusal names the type; there is not even a weight file to read."""
    config = json.loads((tiny_model("llama") / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelRefusedError, match=words):
        loader.load(EngineConfig(model=str(tmp_path)))


def test_bidirectional_gemma_is_refused(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """An embedding model of the same type attends forwards: there is no prefill to hand over."""
    config = json.loads((tiny_model("gemma3_text") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"use_bidirectional_attention": True}))
    with pytest.raises(ModelRefusedError, match="bidirectional attention"):
        loader.load(EngineConfig(model=str(tmp_path)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "/no/such/directory"}, "engine.model = '/no/such/directory'"),
        ({"device": "cuda"}, "engine.device = 'cuda'"),
        ({"max_model_tokens": 5000}, "the model has 4096 positions"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str, tiny_model: Callable[[str], Path]) -> None:
    """The message names the key and the value."""
    with pytest.raises(ConfigError, match=words):
        loader.load(EngineConfig(**({"model": str(tiny_model("llama"))} | settings)))
