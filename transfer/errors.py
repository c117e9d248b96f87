"""What can go wrong while bytes move; branches of `shm.errors.HotspareError`.

HotspareError
├── CheckpointError            a file, index, header or name that cannot be used: names file, tensor and reason
├── EngineError
│   ├── EngineMissing          no Mooncake wheel, or one that does not load: says which to install
│   ├── EngineRefused          the engine would not start, or would not register a range
│   └── TransferFailed         a batch that came back with an error; `timed_out` if bytes may still land
├── SomeLost                   a batch of which some blocks came and others did not
└── RestoreError
    └── NothingToRestore       the request names no block that the model has
"""

from __future__ import annotations

from collections.abc import Mapping

from shm.errors import HotspareError


class CheckpointError(HotspareError):
    """A checkpoint that cannot be used. The message names the file, the tensor and the reason."""


class EngineError(HotspareError):
    """The transfer engine failed."""


class EngineMissing(EngineError):
    """Mooncake is not installed, or does not load."""


class EngineRefused(EngineError):
    """The engine would not start, or would not register a range."""


class TransferFailed(EngineError):
    """A batch failed. With `timed_out`, bytes may land in its destinations later.

    With `is_destination_gone`, what is to be filled does not answer: it makes no difference who brings the bytes.
    `lost` are the numbers of the copies that failed, where all others came and nothing lands later; else it is empty.
    """

    def __init__(
        self,
        message: str,
        *,
        timed_out: bool = False,
        is_destination_gone: bool = False,
        lost: frozenset[int] = frozenset(),
    ) -> None:
        super().__init__(message)
        self.timed_out = timed_out
        self.is_destination_gone = is_destination_gone
        self.lost = lost


class SomeLost(HotspareError):
    """Of a batch, the blocks in `lost` did not come, by manifest row, each with its reason; the others did.

    `came` has the checksums of those that were taken on the way, by row. Nothing lands later.
    """

    def __init__(self, lost: Mapping[int, str], came: Mapping[int, bytes]) -> None:
        super().__init__(f"{len(lost)} blocks did not come; first: {next(iter(lost.values()))}")
        self.lost = lost
        self.came = came


class RestoreError(HotspareError):
    """A restore that cannot be done as asked."""


class NothingToRestore(RestoreError):
    """No block of the model matches the request."""


def told(error: Exception) -> str:
    """Our own errors say what is wrong; of others the class is half the message."""
    return str(error) if isinstance(error, HotspareError) else f"{type(error).__name__}: {error}"
