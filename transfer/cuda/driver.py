"""The few calls of the CUDA driver that copying needs, by ctypes: torch has no copy between plain addresses.

`libcuda.so.1` comes with the driver and has a stable interface, whatever runtime torch brought. The context is torch's.
"""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from transfer.errors import EngineError

HOST, DEVICE = 1, 2  # CUmemorytype
_CALLS = {
    "to_device": "cuMemcpyHtoDAsync_v2",
    "to_host": "cuMemcpyDtoHAsync_v2",
    "within": "cuMemcpyDtoDAsync_v2",
}
_KINDS = {"to_device": (HOST, DEVICE), "to_host": (DEVICE, HOST), "within": (DEVICE, DEVICE)}

Addresses = npt.NDArray[np.int64]


class DeviceFailed(EngineError):
    """A call of the CUDA driver failed; the message names it and its code."""


class _Matrix(ctypes.Structure):
    """CUDA_MEMCPY2D."""

    _fields_ = (
        ("source_x", ctypes.c_size_t), ("source_y", ctypes.c_size_t), ("source_kind", ctypes.c_uint),
        ("source_host", ctypes.c_void_p), ("source_device", ctypes.c_uint64), ("source_array", ctypes.c_void_p),
        ("source_pitch", ctypes.c_size_t),
        ("to_x", ctypes.c_size_t), ("to_y", ctypes.c_size_t), ("to_kind", ctypes.c_uint),
        ("to_host", ctypes.c_void_p), ("to_device", ctypes.c_uint64), ("to_array", ctypes.c_void_p),
        ("to_pitch", ctypes.c_size_t),
        ("width", ctypes.c_size_t), ("height", ctypes.c_size_t),
    )  # fmt: skip


class Stream:
    """A stream of its own. Any thread may queue copies on it."""

    def __init__(self, device: str) -> None:
        import torch

        self._device = device
        self._torch = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.handle = int(self._torch.cuda_stream)

    def follow(self) -> None:
        """Let what comes next wait for the device's default stream and the calling thread's. Raises DeviceFailed."""
        import torch

        try:
            self._torch.wait_stream(torch.cuda.current_stream(self._device))
            self._torch.wait_stream(torch.cuda.default_stream(self._device))
        except RuntimeError as error:
            raise DeviceFailed(f"{self._device} takes no more work: {error}") from error

    def wait(self) -> None:
        """Block until everything queued here by now is done. Raises DeviceFailed."""
        import torch

        try:
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # waits asleep: the cores take checksums
            done.record(self._torch)
            done.synchronize()
        except RuntimeError as error:
            raise DeviceFailed(f"a copy to {self._device} failed: {error}") from error


class Cuda:
    """One device's copies, all of them asynchronous, in a block of `current`. Every method raises DeviceFailed."""

    def __init__(self, device: str) -> None:
        import torch

        if not torch.cuda.is_available():
            raise DeviceFailed(f"slots are on {device}, and this process has no working CUDA device")
        self.device = device
        try:
            self._driver = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise DeviceFailed(f"the CUDA driver's library cannot be loaded: {error}") from error
        torch.cuda.synchronize(device)  # makes the context, if this is the first use

    @property
    def architecture(self) -> str:
        """What compilers call the device: sm_90."""
        import torch

        return "sm_{}{}".format(*torch.cuda.get_device_capability(self.device))

    def open_stream(self) -> Stream:
        return Stream(self.device)

    def current(self) -> AbstractContextManager[None]:
        """While entered, the device is the calling thread's, as `call` and what is built on it need.

        After that the thread's own is current again: it may be an engine's, which works on another device.
        """
        import torch

        return torch.cuda.device(self.device)

    def allocate(self, nbytes: int) -> tuple[int, Any]:
        """Page-locked host memory: its address, and what keeps it alive."""
        import torch

        try:
            memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            raise DeviceFailed(f"{nbytes:,} bytes of page-locked host memory could not be had: {error}") from error
        return memory.data_ptr(), memory

    def allocate_on_device(self, nbytes: int) -> tuple[int, Any]:
        """Device memory, from torch's own: its address, and what keeps it alive."""
        import torch

        try:
            memory = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        except RuntimeError as error:
            raise DeviceFailed(f"{nbytes:,} bytes on {self.device} could not be had: {error}") from error
        return memory.data_ptr(), memory

    def call(self, name: str, *arguments: Any) -> None:
        """Any other call of the driver, with arguments of ctypes' types."""
        self._check(name, self._driver[name](*arguments))

    def runs(self, way: str, to: Addresses, source: Addresses, sizes: Addresses, stream: Stream) -> None:
        """Copy runs; `way` is to_device, to_host or within. Arrays of one length, int64.

        One call a copy: cuMemcpyBatchAsync, which takes them all at once, was 5% slower with blocks of 40 MB.
        """
        function, handle = self._functions[way], ctypes.c_void_p(stream.handle)
        for one_to, one_source, size in zip(to.tolist(), source.tolist(), sizes.tolist(), strict=True):
            code = function(one_to, one_source, size, handle)
            if code:
                self._check(_CALLS[way], code)

    def rows(
        self, way: str, to: tuple[int, int], source: tuple[int, int], shape: tuple[int, int], stream: Stream
    ) -> None:
        """Copy a matrix of (rows, bytes a row); `to` and `source` are (address, bytes from row to row)."""
        source_kind, to_kind = _KINDS[way]
        matrix = _Matrix(
            source_kind=source_kind, source_host=source[0], source_device=source[0], source_pitch=source[1],
            to_kind=to_kind, to_host=to[0], to_device=to[0], to_pitch=to[1], width=shape[1], height=shape[0],
        )  # fmt: skip
        self.call("cuMemcpy2DAsync_v2", ctypes.byref(matrix), ctypes.c_void_p(stream.handle))

    @cached_property
    def _functions(self) -> dict[str, Any]:
        functions = {}
        for way, call in _CALLS.items():
            function = functions[way] = self._driver[call]
            function.argtypes = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p)
        return functions

    def _check(self, call: str, code: int) -> None:
        if code:
            raise DeviceFailed(f"{call} on {self.device} gave CUDA error {code}")
