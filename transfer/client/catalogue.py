"""The tensors of a checkpoint by their own names, and the blocks that they come from.

Blocks are made for experts: of a fused tensor each has its expert's share. Whoever loads a model asks for the tensor as
the checkpoint has it, so its shares are found again by the part of their names that they have in common.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from shm.attachment import shaped, torch_dtype
from shm.block import COMMON, SHARE, TensorTemplate, fill_template, whole_name
from shm.manifest import Manifest

if TYPE_CHECKING:
    import torch


class Part(NamedTuple):
    """What a block has of a tensor: all of it, or one expert's share."""

    name: str
    template: TensorTemplate
    expert: int | None
    """The share's index on the tensor's first axis; None where it is the whole tensor."""


class Catalogue:
    """Of those tensors of a manifest whose names are wanted. Immutable."""

    def __init__(self, manifest: Manifest, wanted: Callable[[str], bool]) -> None:
        self.parts: dict[int, tuple[Part, ...]] = {}
        """Manifest row → what is wanted of the block; blocks of which nothing is are left out."""
        self.shares: dict[str, int] = defaultdict(int)
        """Fused tensor → how many shares it has."""
        asked: dict[str, bool] = {}
        for row, key in enumerate(manifest.keys):
            parts = []
            for template in manifest.schema(row).tensors:
                is_share = template.name.endswith(SHARE)
                name = fill_template(whole_name(template.name), key)
                if name not in asked:
                    asked[name] = wanted(name)
                elif template.name.endswith(COMMON):
                    continue  # another expert's block has it too, and one is enough
                if asked[name]:
                    parts.append(Part(name, template, key.expert if is_share else None))
                    if is_share:
                        self.shares[name] += 1
            if parts:
                self.parts[row] = tuple(parts)
        self.all_names: frozenset[str] = frozenset(asked)
        """Of tensors that are not wanted, too."""


class Assembler:
    """Makes tensors of parts, as blocks come. Holds the fused ones that are not complete yet."""

    def __init__(self, catalogue: Catalogue, device: str) -> None:
        self._catalogue = catalogue
        self._device = device
        self._begun: dict[str, tuple[torch.Tensor, set[int]]] = {}

    def add(self, row: int, block: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors that are complete with this block, uint8 [bytes]: views of it, or put together from shares."""
        for part in self._catalogue.parts[row]:
            begin, nbytes = part.template.offset, part.template.nbytes
            tensor = shaped(block[begin : begin + nbytes], part.template)
            if part.expert is None:
                yield part.name, tensor
            elif (whole := self._with_share(part, part.expert, tensor)) is not None:
                yield part.name, whole

    def _with_share(self, part: Part, expert: int, share: torch.Tensor) -> torch.Tensor | None:
        import torch

        count = self._catalogue.shares[part.name]
        if part.name not in self._begun:
            shape = (count, *share.shape)
            self._begun[part.name] = (
                torch.empty(shape, dtype=torch_dtype(part.template.dtype), device=self._device),
                set(),
            )
        whole, there = self._begun[part.name]
        _bytes_of(whole[expert]).copy_(_bytes_of(share))
        there.add(expert)
        if len(there) < count:
            return None
        del self._begun[part.name]
        return whole


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes, since torch copies no elements of half a byte."""
    import torch

    return tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor.reshape(1).view(torch.uint8)


def windows(manifest: Manifest, rows: Iterable[int], nbytes: int) -> Iterator[list[int]]:
    """The rows in as few groups as fit into `nbytes` bytes each; a block that is larger is alone."""
    window: list[int] = []
    total = 0
    for row in rows:
        size = int(manifest.nbytes[row])
        if window and total + size > nbytes:
            yield window
            window, total = [], 0
        window.append(row)
        total += size
    if window:
        yield window
