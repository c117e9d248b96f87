"""What is done to the model in each rank of an engine: a module, so that vLLM's workers can be sent there."""

from __future__ import annotations

import os

import torch

from shm.checksum import checksum
from shm.errors import HotspareError
from transfer import Restorer
from transfer.slots import Slots
from transfer.vllm.experts import slots_of
from transfer.vllm.reload import modules_by_layer


def ident(model: torch.nn.Module) -> str:
    """What the memory that the ranks share is named for."""
    return os.environ.get("VLLM_DIST_IDENT", "")


def digests(model: torch.nn.Module) -> dict[str, str]:
    """What its parameters hold, by their names."""
    return {name: checksum(_bytes_of(p)).hex() for name, p in model.named_parameters() if p.numel()}


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def bind(model: torch.nn.Module, url: str) -> str:
    """What a Restorer says of its experts."""
    with Restorer(url) as restorer:
        try:
            return f"bound: {restorer.bind(Slots.fused(dict(model.named_parameters())))}"
        except HotspareError as error:
            return f"{type(error).__name__}: {error}"


def spoil(model: torch.nn.Module, lost: list[list[int]]) -> int:
    """Overwrite these (layer, expert) with noise; how many tensors."""
    count = 0
    for layer, module in modules_by_layer(model).items():
        for expert, slot in slots_of(module).items():
            for parameter in module.parameters() if [layer, expert] in lost else ():
                parameter.data[slot].normal_()
                count += 1
    return count
