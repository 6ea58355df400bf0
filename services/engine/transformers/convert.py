"""Convert a GGUF file once to a safetensors directory that `from_pretrained` loads in a tenth of the time.

Run as a process of its own, `python -m prfaas.services.engine.transformers.convert GGUF OUT`, so that the memory and
the imports of the conversion are gone afterwards. `services/model_store.py` calls it.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path


def convert(gguf: Path, out: Path) -> None:
    """Write model, tokenizer and chat template of `gguf` to the directory `out`, weights in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are dequantized by now; what still says "quantized" would make save_pretrained refuse.
    model.hf_quantizer = None
    for leftover in ("quantization_method", "is_quantized"):
        vars(model).pop(leftover, None)
    vars(model.config).pop("quantization_config", None)
    model.config.dtype = torch.bfloat16
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
