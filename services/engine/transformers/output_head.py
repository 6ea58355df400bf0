"""The output projection on CPU: the largest matrix of a small model, and half of what a larger batch adds to a pass.

In oneDNN's blocked layout it takes half the time at batch 8 (SmolLM2, AVX2: 14 ms against 27) and no more at batch 1.
The layout is torch's own (`torch.compile` uses these operators); where they are missing the plain module is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_EXPECTED_ROWS = 8
"""A hint for the layout: a usual batch."""


def output_head(linear: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """hidden [rows, hidden_size] -> logits [rows, vocabulary], as `linear` but for rounding."""
    weight, bias = linear.weight, linear.bias
    operators = torch.ops.mkldnn
    available = hasattr(operators, "_reorder_linear_weight") and hasattr(operators, "_linear_pointwise")
    if not available or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return linear  # type: ignore[no-any-return]
    with torch.inference_mode():
        packed = operators._reorder_linear_weight(weight.detach(), _EXPECTED_ROWS)
    return lambda hidden: operators._linear_pointwise(hidden, packed, bias, "none", [], "")
