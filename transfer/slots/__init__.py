"""Where a rank's experts lie in its own tensors, and putting blocks there.

`slots` describes memory, in `layouts` that are known to be plain; `plan` compares it with a manifest, and gives the
copies of every block; `table` has those of all blocks at once; `host` carries them out in CPU memory, `transfer.cuda`
in a GPU's. Describing and planning import no torch.
"""

from transfer.slots.layouts import NO_EXPERT, SlotMismatch
from transfer.slots.slots import Range, SlotMap, SlotRef, Slots

__all__ = ["NO_EXPERT", "Range", "SlotMap", "SlotMismatch", "SlotRef", "Slots"]
