"""The real model over two regions, in three processes, against transformers' own generate."""

from __future__ import annotations

import asyncio

import pytest

PASSAGE = "The lighthouse keeper wrote the weather down every morning, and every evening he read it back to the sea. "


@pytest.fixture(scope="module")
def reference(smollm2_dir):
    """(token ids of a prompt, number of tokens) -> the greedy continuation's ids, by transformers, fp32."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()

    def generate(ids: list[int], tokens: int) -> list[int]:
        with torch.inference_mode():
            out = model.generate(torch.tensor([ids]), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return out[0, len(ids) :].tolist()

    return generate


@pytest.mark.model
async def test_greedy_answers_equal_generate(cluster, smollm2_dir, reference):
    """Prompts of three lengths at once, over processes, HTTP and a 100-Mbit/s WAN: token for token the text that
    transformers gives alone."""
    from prfaas.services.engine.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(smollm2_dir))
    prompts = [tokenizer.encode(PASSAGE * n) for n in (1, 8, 40)]
    await cluster.start(
        ["--model", str(smollm2_dir), "--dtype", "float32", "--engine-arena-bytes", "512M"],
        ["--model", str(smollm2_dir)],
        rate_mbit=100,
        delay_ms=10,
    )
    answers = await asyncio.gather(*(cluster.complete(ids, 12, ignore_eos=True) for ids in prompts))
    for ids, answer in zip(prompts, answers, strict=True):
        assert answer["headers"]["x-prfaas-reason"] == "offloaded"
        assert answer["choices"][0]["text"] == tokenizer.decode(reference(ids, 12))


@pytest.mark.model
@pytest.mark.parametrize("rate_mbit", [50, 500])
async def test_decode_begins_while_kv_is_in_flight(cluster, smollm2_dir, rate_mbit):
    """Whether the transfer or prefill takes longer: in every run decode's first layer is used before the last layer
    has arrived, and no layer is used before it is there."""
    from prfaas.services.engine.tokenizer import load_tokenizer

    prompt = load_tokenizer(str(smollm2_dir)).encode(PASSAGE * 24)
    await cluster.start(
        ["--model", str(smollm2_dir), "--dtype", "bfloat16", "--engine-arena-bytes", "256M"],
        ["--model", str(smollm2_dir)],
        rate_mbit=rate_mbit,
        delay_ms=10,
    )
    for _ in range(3):
        answer = await cluster.complete(prompt, 2, ignore_eos=True)
        url = f"{cluster.router_url}/requests/{answer['headers']['x-request-id']}/timeline"
        async with cluster.session.get(url) as response:
            timeline = await response.json()
        layers = timeline["layers"]
        assert len(layers) == 30
        assert layers[0]["used_s"] < layers[-1]["arrived_s"]
        assert all(layer["arrived_s"] <= layer["used_s"] + 1e-3 for layer in layers)
