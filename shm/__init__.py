"""The bytes in memory: segments in named POSIX shared memory, and attaching to them.

from shm import attach
with attach("qwen3-30b-a3b") as weights:
    weights["model.layers.3.mlp.experts.7.gate_proj.weight"]
"""

from shm.attachment import Attachment, attach
from shm.block import ExpertKey
from shm.errors import HotspareError
from shm.manifest import Manifest

__all__ = ["Attachment", "ExpertKey", "HotspareError", "Manifest", "attach"]
