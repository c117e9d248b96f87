"""A model's files on disk: which experts they hold, and where each tensor's bytes lie.

`checkpoint` reads config and headers into a manifest, by the naming of a family (`families`); `origin` tells two
checkpoints with the same headers apart; `synth` writes small ones like a real model's (`recipes`).
"""

from transfer.checkpoint.checkpoint import Checkpoint, changed_files, read_checkpoint

__all__ = ["Checkpoint", "changed_files", "read_checkpoint"]
