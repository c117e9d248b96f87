"""Kernels compiled for the device that is there, by the NVRTC library that torch brings along."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transfer.cuda.driver import Cuda, DeviceFailed, Stream

LOG_NBYTES_MAX = 2000  # of the compiler's words, in an error


class Kernels:
    """A source's kernels, loaded on one device. Every method raises DeviceFailed."""

    def __init__(self, cuda: Cuda, source: str, names: Sequence[str]) -> None:
        self._cuda = cuda
        self._module = ctypes.c_void_p()
        self._functions: dict[str, ctypes.c_void_p] = {}
        code = _compile(source, cuda.architecture)
        cuda.call("cuModuleLoadData", ctypes.byref(self._module), code)
        for name in names:
            function = self._functions[name] = ctypes.c_void_p()
            cuda.call("cuModuleGetFunction", ctypes.byref(function), self._module, name.encode())

    def launch(self, name: str, grid: tuple[int, int], threads: int, arguments: Sequence[int], stream: Stream) -> None:
        """Queue a kernel that takes 64-bit arguments: addresses or numbers."""
        values = (ctypes.c_uint64 * len(arguments))(*arguments)
        step = ctypes.sizeof(ctypes.c_uint64)
        pointers = (ctypes.c_void_p * len(arguments))(
            *(ctypes.addressof(values) + step * number for number in range(len(arguments)))
        )
        none = ctypes.c_void_p()
        self._cuda.call(
            "cuLaunchKernel", self._functions[name], *grid, 1, threads, 1, 1, 0, ctypes.c_void_p(stream.handle),
            pointers, none,
        )  # fmt: skip


@functools.cache
def _compile(source: str, architecture: str) -> bytes:
    """Machine code for `architecture`, as in sm_90."""
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    if code := nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None):
        raise DeviceFailed(f"NVRTC took no source (error {code})")
    try:
        options = (ctypes.c_char_p * 1)(f"--gpu-architecture={architecture}".encode())
        if code := nvrtc.nvrtcCompileProgram(program, len(options), options):
            log = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
            said = log[:LOG_NBYTES_MAX].decode(errors="replace").strip("\0\n ")
            raise DeviceFailed(f"NVRTC could not compile for {architecture} (error {code}): {said}")
        return _read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(size_of: Any, read: Any, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    if code := size_of(program, ctypes.byref(size)):
        raise DeviceFailed(f"NVRTC gave nothing back (error {code})")
    into = ctypes.create_string_buffer(size.value)
    if code := read(program, into):
        raise DeviceFailed(f"NVRTC gave nothing back (error {code})")
    return into.raw


def _nvrtc() -> Any:
    """Torch's libcaffe2_nvrtc is linked against the NVRTC that fits it, wherever that lies."""
    import torch

    major = (torch.version.cuda or "").split(".")[0]
    beside = Path(torch.__file__).with_name("lib") / "libcaffe2_nvrtc.so"
    for name in (str(beside), f"libnvrtc.so.{major}", "libnvrtc.so"):
        try:
            library = ctypes.CDLL(name)
            library.nvrtcGetCUBIN  # noqa: B018 - is it one, and not too old?
        except (OSError, AttributeError):
            continue
        return library
    raise DeviceFailed("the library libnvrtc, which comes with CUDA builds of torch, is not found")
