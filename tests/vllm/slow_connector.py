"""Our connector on a device that takes longer for a layer: vLLM loads it by kv_connector_module_path."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from prfaas.services.engine.vllm.connector import PrfaasConnector

LAYER_S = 0.03


class SlowConnector(PrfaasConnector):
    """While there is a file `slow` in the control folder each layer of a prefill takes LAYER_S more."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        if self._worker is not None and self._worker.saves and Path(self._control, "slow").exists():
            time.sleep(LAYER_S)
        super().save_kv_layer(layer_name, kv_layer, attn_metadata, **kwargs)
