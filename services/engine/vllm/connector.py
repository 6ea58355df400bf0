"""PrfaasConnector: what vLLM loads, by `--kv-transfer-config`:

    {"kv_connector": "PrfaasConnector", "kv_connector_module_path": "prfaas.services.engine.vllm.connector",
     "kv_role": "kv_both", "kv_connector_extra_config": {"control": "/run/prfaas/vllm"}}

vLLM makes one in its scheduler and one in each worker. This module is the seam: it takes vLLM's objects apart and
passes what is in them to SchedulerSide and WorkerSide, which know nothing of vLLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import vllm
from prfaas.common import log
from prfaas.common.errors import ConfigError
from prfaas.services.engine.vllm import model_layout
from prfaas.services.engine.vllm.control import VERSION, Ready
from prfaas.services.engine.vllm.paged_kv import PagedTensor, StateTensor
from prfaas.services.engine.vllm.probe import BlockOrder, plain_order, probe_order
from prfaas.services.engine.vllm.scheduler_side import SchedulerSide
from prfaas.services.engine.vllm.shared_kv import LAYOUT_DTYPES
from prfaas.services.engine.vllm.steps import Step
from prfaas.services.engine.vllm.version import check_version
from prfaas.services.engine.vllm.worker_link import WorkerLink, socket_path
from prfaas.services.engine.vllm.worker_side import WorkerSide
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.model_executor.models.utils import extract_layer_index

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


_log = log.get_logger("vllm-connector")


class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]  # vllm is not in mypy's environment
    def __init__(self, step: Step) -> None:
        self.step = step


class PrfaasConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]  # as above
    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        """Raises ConfigError for a vLLM, or a setting of it, that this connector is not for."""
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        check_version(vllm.__version__)
        self._control = str(self._kv_transfer_config.get_from_extra_config("control", ""))
        _check_settings(vllm_config, self._control)
        self._groups = [(group.kv_cache_spec, group.layer_names) for group in kv_cache_config.kv_cache_groups]
        self._blocks = kv_cache_config.num_blocks
        self._scheduler = SchedulerSide() if role is KVConnectorRole.SCHEDULER else None
        self._worker: WorkerSide | None = None
        self._link: WorkerLink | None = None

    @property
    def requires_kv_delivery(self) -> bool:
        """KV has been copied out when a request ends; nobody needs its blocks after that."""
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """The hooks of each layer must run, also where CUDA graphs are replayed."""
        return True

    # -- scheduler ----------------------------------------------------------------------------------------------------

    @property
    def _in_scheduler(self) -> SchedulerSide:
        assert self._scheduler is not None
        return self._scheduler

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._in_scheduler.external_tokens(request, num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._in_scheduler.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        new = [(each.req_id, each.block_ids, each.num_computed_tokens) for each in scheduler_output.scheduled_new_reqs]
        cached = scheduler_output.scheduled_cached_reqs
        running = [
            (req_id, cached.new_block_ids[i], cached.num_computed_tokens[i], req_id in cached.resumed_req_ids)
            for i, req_id in enumerate(cached.req_ids)
        ]
        return StepMetadata(self._in_scheduler.step(scheduler_output.num_scheduled_tokens, new, running))

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._in_scheduler.finished(request.request_id)
        return False, None

    # -- worker -------------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """The caches are there: from here on our node can be served."""
        config = self._vllm_config
        parallel, model = config.parallel_config, config.model_config
        kv = model_layout.model_kv(
            self._groups,
            model.get_total_num_hidden_layers(),
            model.get_total_num_kv_heads(),
            parallel.rank % parallel.tensor_parallel_size,
            parallel.tensor_parallel_size,
            extract_layer_index,
            _dtype_name,
        )
        modules = config.compilation_config.static_forward_context
        caches = {
            name: _states(modules[name]) if part.is_state else self._paged(part, modules[name], kv_caches[name])
            for name, part in kv.parts.items()
        }
        block_tokens = config.cache_config.block_size
        ready = Ready(
            VERSION,
            vllm.__version__,
            kv.rank,
            kv.ranks,
            kv.layout.to_dict(),
            block_tokens,
            self._blocks * block_tokens,
        )
        self._link = WorkerLink(socket_path(self._control, kv.rank), ready, kv.layout)
        self._worker = WorkerSide(kv, caches, self._link)

    def _paged(self, part: model_layout.Part, module: Any, cache: torch.Tensor) -> list[PagedTensor]:
        ratio = cache.shape[0] // self._blocks
        orders: tuple[BlockOrder, ...]
        if len(part.tensors) == 1:
            orders = (plain_order(cache, 0, part.spec.head_size),)
        else:
            orders = probe_order(module, cache, part.spec.head_size, part.spec.head_size_v or part.spec.head_size)
        if part.layer == 0:
            _log.info("KV cache", layer=part.name, shape=list(cache.shape), orders=[str(order) for order in orders])
        return [PagedTensor(cache, order, ratio) for order in orders]

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Before the forward pass of a step that loads; after that of any other, where there is nothing to do."""
        if self._worker is not None:
            self._worker.before_forward()

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None and isinstance(connector_metadata, StepMetadata):
            self._worker.begin(connector_metadata.step)

    def wait_for_layer_load(self, layer_name: str) -> None:
        if self._worker is not None:
            self._worker.before_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        if self._worker is not None:
            self._worker.after_layer(layer_name)

    def wait_for_save(self) -> None:
        if self._worker is not None:
            self._worker.end()

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_bad_blocks() if self._worker is not None else set()

    def shutdown(self) -> None:
        if self._link is not None:
            self._link.close()


def _check_settings(config: VllmConfig, control: str) -> None:
    problems = []
    if not control:
        problems.append('kv_connector_extra_config has no "control": name a folder for the sockets to our node')
    if config.speculative_config is not None:
        problems.append("speculative decoding (--speculative-config) doesn't go with PrfaasConnector yet")
    if config.parallel_config.pipeline_parallel_size > 1:
        problems.append("--pipeline-parallel-size must be 1 with PrfaasConnector")
    if getattr(config.parallel_config, "decode_context_parallel_size", 1) > 1:
        problems.append("--decode-context-parallel-size must be 1 with PrfaasConnector")
    if config.cache_config.cache_dtype not in ("auto", "bfloat16", "float16", "float32"):
        problems.append(f"--kv-cache-dtype {config.cache_config.cache_dtype} (quantized KV) can't be sent yet")
    if config.model_config.is_hybrid and config.cache_config.mamba_cache_mode != "none":
        problems.append(
            "prefix caching of a model with recurrent state doesn't go with PrfaasConnector yet: "
            "start vLLM with --no-enable-prefix-caching"
        )
    if problems:
        raise ConfigError(problems)


def _dtype_name(dtype: torch.dtype) -> str:
    if dtype not in LAYOUT_DTYPES:
        raise ConfigError([f"vLLM keeps KV as {dtype}, which can't be sent yet"])
    return LAYOUT_DTYPES[dtype]


def _states(module: Any) -> list[StateTensor]:
    """The module has cut its pages into states, in the order of its spec."""
    return [StateTensor(each) for each in module.kv_cache]
