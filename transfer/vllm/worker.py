"""What a worker of vLLM can be asked for: experts loaded again. `--worker-extension-cls transfer.vllm.worker.Worker`.

    llm.collective_rpc("reload_experts", args=([(3, 7), (4, 0)],))

Each rank loads those it has. Nothing may be in flight meanwhile.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from shm.errors import InvalidInput
from transfer.client.loader import Named
from transfer.vllm.model_loader import CONTENT, directory_of
from transfer.vllm.reload import Reload, fill, modules_by_layer
from transfer.vllm.weights import Settings

RELOAD = "vllm.model_executor.model_loader.reload.layerwise"
CONFIG = "vllm.config"
PLATFORMS = "vllm.platforms"
PROOFS = ("witness", "none")

_log = logging.getLogger("hotspare.vllm")


class Worker:
    """Mixed into vLLM's worker by itself, whose attributes it uses."""

    vllm_config: Any
    model_runner: Any

    def reload_experts(self, experts: Iterable[tuple[int, int]], proof: str = "witness") -> dict[str, Any]:
        """Load the weights of these (layer, expert) again, from memory first; a `Reloaded` as a document.

        With proof="none" you vouch that vLLM loads this kernel's weights again as it loaded them first, should every
        expert of every layer be lost. Raises InvalidInput, and RestoreError for what could not be done.
        """
        if proof not in PROOFS:
            raise InvalidInput(f"proof={proof!r}: give one of {', '.join(PROOFS)}")
        model, config = self.model_runner.get_model(), self.vllm_config
        settings, _ = Settings.take(config.load_config.model_loader_extra_config)

        def rewrite(module: Any, tensors: list[Named]) -> None:
            with importlib.import_module(CONFIG).set_current_vllm_config(config), _as_at_start(module):
                load_again(model, module, tensors, config.model_config)

        asked, modules, content = list(experts), modules_by_layer(model), getattr(model, CONTENT, None)
        directory = directory_of(config.model_config.model, config.model_config.revision)
        with settings.restorer(directory) as restorer:
            done = fill(modules, asked, restorer, content)
        if done is None:
            with settings.loader(directory) as loader:
                reload = Reload(modules, rewrite, loader, content)
                done = reload.run(asked, is_vouched=proof == "none")
        _log.info("%d experts loaded again in %.2f s, for which %d were read", done.experts, done.seconds, done.read)
        return done._asdict()


def load_again(model: Any, module: Any, tensors: list[Named], model_config: Any) -> None:
    """Have vLLM take a layer's tensors into one expert module: what its `reload_weights` does with the whole model.

    The module's parameters keep their memory, which captured graphs know.
    """
    reload = importlib.import_module(RELOAD)
    reload.initialize_layerwise_reload(module)
    try:
        model.load_weights(iter(tensors))
        reload.finalize_layerwise_reload(module, model_config)
    finally:
        for each in module.modules():
            reload.get_layerwise_info(each).reset()


@contextmanager
def _as_at_start(module: Any) -> Iterator[None]:
    """On a CPU have vLLM make the module's kernel again, for it packs weights for it only then; and keep the first.

    Without that, its own `reload_weights` leaves unpacked weights there, which the kernel takes for packed ones.
    """
    if not importlib.import_module(PLATFORMS).current_platform.is_cpu():
        yield
        return
    method = module.quant_method
    kernel, config = method.moe_kernel, method.moe_quant_config
    method.moe_kernel = None
    try:
        yield
    finally:
        method.moe_kernel, method.moe_quant_config = kernel, config
