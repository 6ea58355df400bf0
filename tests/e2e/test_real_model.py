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
