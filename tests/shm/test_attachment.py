"""The reader's side: no copy, every dtype, one error for each thing that is wrong, and no daemon needed."""

from __future__ import annotations

import gc
import os
import re
import signal
import struct
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shm import ExpertKey, HotspareError, attach
from shm.attachment import _TORCH_NAMES, ExpertTensors, torch_dtype
from shm.block import DENSE, DTYPE_BITS, TensorEntry
from shm.checksum import checksum
from shm.errors import (
    BlockUnavailable,
    InvalidInput,
    SegmentAmbiguous,
    SegmentCorrupt,
    SegmentError,
    SegmentForbidden,
    SegmentForeign,
    SegmentNotFound,
    SegmentTooNew,
    SegmentTruncated,
    SegmentUnsealed,
)
from shm.layout import HEADER_NBYTES, SHM_DIRECTORY, SegmentName, copy_offset
from shm.manifest import FileSpec, Manifest
from shm.pinning import joined
from shm.segment import Segment

torch = pytest.importorskip("torch")

NOBODY = 65534

READER = """
import sys
from shm import attach
weights = attach("tiny", namespace=sys.argv[1])
total = sum(sum(weights.block(row)) for row in weights.rows().tolist())
print("read", total, flush=True)
sys.stdin.readline()
"""

OWNER = """
import os, sys
from shm.layout import SegmentName
from shm.segment import Segment
segment = Segment.claim(SegmentName(sys.argv[1], "tiny", "n0"))
print("owns", flush=True)
sys.stdin.readline()
"""


def path_of(name: SegmentName) -> Path:
    return Path(SHM_DIRECTORY, name.object_name)


def mappings(path: Path, pid: int | str = "self") -> list[tuple[int, int, str]]:
    """(start, end, permissions) of every mapping of the object in a process."""
    lines = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if str(path) in line]
    return [(*(int(number, 16) for number in line[0].split("-")), line[1]) for line in lines]  # type: ignore[misc]


# -- no copy -------------------------------------------------------------------------------------------------------


def test_tensors_are_the_pages_of_the_segment(sealed: Callable[..., Segment], namespace: str) -> None:
    segment = sealed()
    with attach("tiny", namespace=namespace) as weights:
        readable = [m for m in mappings(path_of(segment.name)) if m[2] == "r--s"]
        assert len(readable) == 1
        start, end, _ = readable[0]
        for name, tensor in weights.items():
            assert start <= tensor.data_ptr() < tensor.data_ptr() + tensor.nbytes <= end, name
        block = weights.expert(1, 2)["model.layers.1.mlp.experts.2.down_proj.weight"]
        before = block.clone()
        segment.block(7)[0] ^= 0x55  # the owner's mapping is another one, of the same pages
        assert not block.equal(before)


def pss(pid: int, path: Path) -> int:
    """Proportional set size of a process's mappings of the object, in bytes."""
    total, is_ours = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_ours = str(path) in line
        elif is_ours and line.startswith("Pss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_however_many_attach_the_weights_are_in_memory_once(
    python: Callable[..., Any],
    sealed: Callable[..., Segment],
    make_manifest: Callable[..., Manifest],
    namespace: str,
) -> None:
    segment = sealed(manifest=make_manifest(2, 5, rows=333, cols=777))
    path, nbytes = path_of(segment.name), segment.nbytes
    readers = [python(READER, namespace) for _ in range(4)]
    assert len({reader.expect("read") for reader in readers}) == 1
    shares = [pss(process, path) for process in (os.getpid(), *(reader.pid for reader in readers))]
    assert all(share > 0.1 * nbytes for share in shares), "each has read all of it"
    assert 0.9 * nbytes < sum(shares) <= 1.02 * nbytes


def test_attaching_needs_neither_the_daemon_nor_torch(
    python: Callable[..., Any], sealed: Callable[..., Segment], namespace: str
) -> None:
    sealed().close()
    owner = python(OWNER, namespace)
    owner.expect("owns")
    owner.kill()
    child = python(
        "import sys\nfrom shm import attach\nweights = attach('tiny', namespace=sys.argv[1])\n"
        "assert weights.verify() == []\nassert len(weights.experts()) == 10\nassert 'torch' not in sys.modules",
        namespace,
    )
    status, _, errors = child.wait()
    assert status == 0, errors


# -- lifetime ------------------------------------------------------------------------------------------------------


def test_tensors_outlive_the_attachment_and_the_name(sealed: Callable[..., Segment], namespace: str) -> None:
    segment = sealed()
    weights = attach("tiny", namespace=namespace)
    tensor = weights["model.layers.1.mlp.experts.4.up_proj.weight"]
    expected = tensor.clone()
    weights.close()
    del weights
    segment.unlink()
    gc.collect()
    assert tensor.equal(expected)


def test_after_closing_nothing_is_mapped_and_nothing_is_served(sealed: Callable[..., Segment], namespace: str) -> None:
    segment = sealed()
    segment.close()
    gc.collect()
    path = path_of(segment.name)
    assert mappings(path) == []
    weights = attach("tiny", namespace=namespace)
    list(weights.values())
    assert mappings(path) != []
    weights.close()
    weights.close()
    gc.collect()
    assert mappings(path) == [], "although the closed attachment is still held"
    assert "closed" in repr(weights)
    assert len(weights.manifest) == 10
    for ask in (
        lambda: weights["model.layers.1.mlp.experts.4.up_proj.weight"],
        lambda: weights.block(0),
        lambda: weights.address(0),
        lambda: weights.expert(0, 0),
        weights.experts,
        weights.verify,
        weights.pin,
        lambda: list(weights),
    ):
        with pytest.raises(BlockUnavailable, match="is closed: attach again"):
            ask()


def test_a_segment_can_be_attached_to_many_times_without_leaking_descriptors(
    sealed: Callable[..., Segment], namespace: str
) -> None:
    sealed()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        attach("tiny", namespace=namespace).close()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize(
    "write",
    ["tensor.fill_(0)", "weights.block(0).obj and ctypes.memset(weights.address(0), 0, 1)"],
)
def test_writing_to_a_tensor_ends_the_writer_and_changes_nothing(
    python_with_torch: Callable[..., Any], sealed: Callable[..., Segment], namespace: str, write: str
) -> None:
    """The pages are read-only, whatever torch says of the tensor: SIGSEGV, in the process that wrote."""
    sealed()
    code = f"""
import ctypes, sys, torch
from shm import attach
weights = attach("tiny", namespace=sys.argv[1])
tensor = weights["model.layers.0.mlp.experts.0.up_proj.weight"]
tensor.clone().fill_(0)
print("writes", flush=True)
{write}
print("wrote", flush=True)
"""
    child = python_with_torch(code, namespace)
    child.expect("writes")
    status, said, _ = child.wait()
    assert status == -signal.SIGSEGV
    assert "wrote" not in said
    with attach("tiny", namespace=namespace) as weights:
        assert weights.verify() == []


def test_blocks_are_read_only_views(sealed: Callable[..., Segment], namespace: str) -> None:
    sealed()
    with attach("tiny", namespace=namespace) as weights:
        assert weights.block(0).readonly
        with pytest.raises(TypeError):
            weights.block(0)[0] = 1


# -- dtypes --------------------------------------------------------------------------------------------------------


def one_block(entries: list[TensorEntry], model: str = "tiny") -> Manifest:
    files = [FileSpec("a.safetensors", 1 << 30, "0" * 32)]
    return Manifest.build(model, "f", "experts", files, {ExpertKey(0, 0): entries})


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_every_dtype_comes_out_with_its_own_bytes(
    sealed: Callable[..., Segment], content: Callable[..., bytes], namespace: str, dtype: str
) -> None:
    manifest = one_block([TensorEntry("l.{layer}.experts.{expert}.w", dtype, (3, 5, 8), 0, 8)])
    sealed(manifest=manifest)
    with attach("tiny", namespace=namespace) as weights:
        if not isinstance(getattr(torch, _TORCH_NAMES.get(dtype, ""), None), torch.dtype):
            with pytest.raises(BlockUnavailable, match=f"has no dtype for {dtype}: use a newer torch"):
                weights["l.0.experts.0.w"]
            return
        tensor = weights["l.0.experts.0.w"]
        elements_each = 2 if dtype == "F4" else 1
        assert tensor.shape == (3, 5, 8 // elements_each)
        assert tensor.dtype == torch_dtype(dtype)
        assert tensor.nbytes == DTYPE_BITS[dtype] * 120 // 8
        assert bytes(tensor.flatten().view(torch.uint8).numpy()) == content(0, tensor.nbytes)


def test_the_dtypes_of_all_families_are_in_this_torch() -> None:
    for dtype in ("F8_E4M3", "F8_E8M0", "BF16", "F16", "F32", "I32", "U8", "I64"):
        assert torch_dtype(dtype).is_floating_point == (dtype[0] in "FB")


def test_packed_rows_that_do_not_fill_bytes_are_refused(sealed: Callable[..., Segment], namespace: str) -> None:
    if not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("this torch has no F4")
    sealed(manifest=one_block([TensorEntry("w{layer}.{expert}", "F4", (2, 3), 0, 8)]))
    with attach("tiny", namespace=namespace) as weights, pytest.raises(BlockUnavailable, match="F4"):
        weights["w0.0"]


def test_scalars_and_empty_tensors_are_tensors(sealed: Callable[..., Segment], namespace: str) -> None:
    entries = [
        TensorEntry("s{layer}.{expert}", "F32", (), 0, 8),
        TensorEntry("t{layer}.{expert}", "BF16", (0, 7), 0, 16),
    ]
    sealed(manifest=one_block(entries))
    with attach("tiny", namespace=namespace) as weights:
        assert weights["s0.0"].shape == ()
        assert weights["t0.0"].shape == (0, 7)
        assert weights["t0.0"].dtype is torch.bfloat16
        assert weights.verify() == []


# -- names ---------------------------------------------------------------------------------------------------------

FUSED = "model.layers.{layer}.mlp.experts.gate_up_proj"


def fused_manifest() -> Manifest:
    files = [FileSpec("a.safetensors", 1 << 20, "0" * 32)]
    blocks = {
        ExpertKey(3, e): [
            TensorEntry(FUSED + "[{expert}]", "U8", (4, 7), 0, 100 * e + 8),
            TensorEntry("model.layers.{layer}.mlp.experts.{expert}.bias", "U8", (3,), 0, 5000 + 8 * e),
        ]
        for e in range(9)
    }
    dense = {
        ExpertKey(3, DENSE): [TensorEntry("model.layers.{layer}.norm.weight", "F32", (5,), 0, 9000)],
        ExpertKey(DENSE, DENSE): [TensorEntry("model.embed_tokens.weight", "F32", (3, 5), 0, 9100)],
    }
    return Manifest.build("tiny", "f", "all", files, blocks | dense)


def test_a_fused_slice_answers_to_the_checkpoint_s_name_and_to_its_own(
    sealed: Callable[..., Segment], namespace: str
) -> None:
    sealed(manifest=fused_manifest())
    with attach("tiny", namespace=namespace) as weights:
        expert = weights.expert(3, 7)
        whole = "model.layers.3.mlp.experts.gate_up_proj"
        assert sorted(expert) == ["model.layers.3.mlp.experts.7.bias", whole]
        assert expert[whole] is expert[f"{whole}[7]"]
        assert expert[whole].data_ptr() == weights[f"{whole}[7]"].data_ptr()
        assert f"{whole}[7]" in weights
        assert whole not in weights
        for wrong in (f"{whole}[8]", f"{whole}[7][7]", "x[7]", whole + "x"):
            with pytest.raises(KeyError):
                expert[wrong]
        for wrong in (whole, f"{whole}[9]"):
            with pytest.raises(BlockUnavailable):
                weights[wrong]


def test_list_and_lookup_agree(sealed: Callable[..., Segment], namespace: str) -> None:
    sealed(manifest=fused_manifest(), rows=[0, 1, 2, 5])
    with attach("tiny", namespace=namespace) as weights:
        names = list(weights)
        assert len(names) == len(set(names)) == len(weights) == 6
        assert all(name in weights for name in names)
        assert 3 not in weights
        assert weights.experts() == [(3, 0), (3, 3)]
        assert weights.get("nothing") is None
        assert list(weights.dense(3)) == ["model.layers.3.norm.weight"]
        assert list(weights.dense()) == ["model.embed_tokens.weight"]
        with pytest.raises(BlockUnavailable, match="expert 1 of layer 3 is not published"):
            weights.expert(3, 1)
        with pytest.raises(BlockUnavailable, match="no expert 9 in layer 3"):
            weights.expert(3, 9)


def test_expert_tensors_are_an_ordinary_dictionary_besides() -> None:
    tensors = ExpertTensors({"a": torch.zeros(1)}, 5)
    assert dict(tensors) == tensors
    assert tensors["a[5]"] is tensors["a"]
    with pytest.raises(KeyError):
        tensors["b[5]"]


# -- every refusal -------------------------------------------------------------------------------------------------


def test_no_segment_is_not_found_and_says_how_to_make_one(namespace: str) -> None:
    with pytest.raises(SegmentNotFound, match="hotspare serve --model tiny --checkpoint DIR"):
        attach("tiny", namespace=namespace)
    with pytest.raises(SegmentNotFound, match="hotspare ls"):
        attach("tiny", namespace=namespace, node="n0")


@pytest.mark.parametrize("model", ["", "x" * 300, "a\nb"])
def test_model_names_out_of_limits_are_refused(model: str) -> None:
    with pytest.raises(InvalidInput):
        attach(model)


def test_several_nodes_of_one_host_are_ambiguous_until_one_is_named(
    sealed: Callable[..., Segment], namespace: str
) -> None:
    sealed("n0"), sealed("n1", seed=1)
    with pytest.raises(SegmentAmbiguous, match=r"say node=… \(n0, n1\)"):
        attach("tiny", namespace=namespace)
    with attach("tiny", namespace=namespace, node="n1") as weights:
        assert weights.name.node == "n1"


def test_a_sealed_segment_is_found_beside_one_that_is_being_filled(
    sealed: Callable[..., Segment], namespace: str, make_manifest: Callable[..., Manifest]
) -> None:
    other = Segment.claim(SegmentName(namespace, "tiny", "n1"))
    other.allocate(make_manifest(), [0])
    sealed("n0")
    with attach("tiny", namespace=namespace) as weights:
        assert weights.name.node == "n0"
    other.unlink()


def test_names_with_slashes_and_dots_are_found(sealed: Callable[..., Segment], namespace: str) -> None:
    manifest = one_block([TensorEntry("w{layer}.{expert}", "U8", (3,), 0, 8)], "org/some.model-1 v2")
    sealed("node.a/b", manifest=manifest)
    for node in (None, "node.a/b"):
        with attach("org/some.model-1 v2", namespace=namespace, node=node) as weights:
            assert weights["w0.0"].shape == (3,)


@pytest.mark.parametrize("node", [None, "n0"])
@pytest.mark.parametrize("state", ["claimed", "filling"])
def test_an_unsealed_segment_is_refused(
    namespace: str, make_manifest: Callable[..., Manifest], state: str, node: str | None
) -> None:
    segment = Segment.claim(SegmentName(namespace, "tiny", "n0"))
    if state == "filling":
        segment.allocate(make_manifest(), [0])
    with pytest.raises(SegmentUnsealed, match="not filled yet: wait until its node is ready"):
        attach("tiny", namespace=namespace, node=node)
    segment.unlink()


def _damage(path: Path, *ats: int, by: bytes) -> None:
    """Both copies: one is not enough to be wrong."""
    with path.open("r+b") as file:
        for at in ats:
            file.seek(at)
            file.write(by)


def _of_header(at: int, by: bytes) -> Callable[[Path, Segment], None]:
    return lambda path, segment: _damage(path, at, at + HEADER_NBYTES, by=by)


def _manifest(path: Path, segment: Segment) -> None:
    at = segment.header.manifest_offset
    _damage(path, at + 40, copy_offset(at, segment.header.manifest_nbytes) + 40, by=b"\xff\x01")


WRONG: dict[str, tuple[Callable[[Path, Segment], object], type[SegmentError], str]] = {
    "foreign": (_of_header(0, b"SOMETHIN"), SegmentForeign, "does not begin with HOTSPARE"),
    "too new": (_of_header(8, struct.pack("<I", 3)), SegmentTooNew, "format 3"),
    "too old": (_of_header(8, struct.pack("<I", 1)), SegmentError, "format 1, .* start its node with this Hotspare"),
    "cut in the blocks": (lambda path, s: os.truncate(path, s.nbytes - 1), SegmentTruncated, "its header says"),
    "cut in the header": (lambda path, s: os.truncate(path, 3333), SegmentTruncated, "less than a header"),
    "emptied": (lambda path, s: os.truncate(path, 0), SegmentTruncated, "0 bytes"),
    "header": (_of_header(77, b"\xff\x01"), SegmentCorrupt, "does not match its checksum"),
    "manifest": (_manifest, SegmentCorrupt, "manifest does not match its digest"),
}


@pytest.mark.parametrize("node", [None, "n0"])
@pytest.mark.parametrize("fault", WRONG)
def test_what_is_wrong_with_a_segment_is_said(
    sealed: Callable[..., Segment], namespace: str, fault: str, node: str | None
) -> None:
    damage, error, said = WRONG[fault]
    segment = sealed()
    damage(path_of(segment.name), segment)
    with pytest.raises(error, match=said) as raised:
        attach("tiny", namespace=namespace, node=node)
    assert type(raised.value) is error


def test_a_bad_segment_beside_a_good_one_is_passed_over(sealed: Callable[..., Segment], namespace: str) -> None:
    bad = sealed("n0")
    _of_header(77, b"\xff\x01")(path_of(bad.name), bad)
    sealed("n1")
    with attach("tiny", namespace=namespace) as weights:
        assert weights.name.node == "n1"


def test_another_ones_segment_under_the_name_is_foreign(sealed: Callable[..., Segment], namespace: str) -> None:
    segment = sealed(manifest=one_block([TensorEntry("w{layer}.{expert}", "U8", (3,), 0, 8)], "other"))
    os.rename(path_of(segment.name), path_of(SegmentName(namespace, "tiny", "n0")))
    with pytest.raises(SegmentForeign, match="is the segment of other on node n0"):
        attach("tiny", namespace=namespace, node="n0")


def test_another_nodes_segment_under_the_name_is_foreign(sealed: Callable[..., Segment], namespace: str) -> None:
    segment = sealed("n1")
    os.rename(path_of(segment.name), path_of(SegmentName(namespace, "tiny", "n0")))
    with pytest.raises(SegmentForeign, match="is the segment of tiny on node n1"):
        attach("tiny", namespace=namespace, node="n0")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("node", ["None", "'n0'"])
def test_another_user_is_forbidden(
    python: Callable[..., Any], sealed: Callable[..., Segment], namespace: str, node: str
) -> None:
    sealed()
    code = f"""
import os, sys
import shm.inventory
from shm import HotspareError, attach
os.setgroups([]), os.setgid({NOBODY}), os.setuid({NOBODY})
try:
    attach("tiny", namespace=sys.argv[1], node={node})
except HotspareError as error:
    print(type(error).__name__, error)
"""
    _, said, errors = python(code, namespace).wait()
    assert said.startswith(SegmentForbidden.__name__), (said, errors)
    assert "run as the user who runs `hotspare serve`" in said


def test_every_refusal_is_a_hotspare_error() -> None:
    assert all(issubclass(error, HotspareError) for _, error, _ in WRONG.values())


# -- while the owner works -----------------------------------------------------------------------------------------


def test_attaching_while_the_owner_rewrites_its_header_never_fails(
    python: Callable[..., Any], sealed: Callable[..., Segment], namespace: str, wait_until: Callable[..., Any]
) -> None:
    sealed().close()
    writer = python(
        """
import os, sys
from shm.layout import SegmentName
from shm.segment import Segment
segment = Segment.claim(SegmentName(sys.argv[1], "tiny", "n0"))
print("rewrites", flush=True)
while True:
    segment.record_origin(os.urandom(16))
""",
        namespace,
    )
    writer.expect("rewrites")
    origins: set[bytes] = set()

    def attach_often() -> bool:
        for _ in range(50):
            with attach("tiny", namespace=namespace, node="n0") as weights:
                origins.add(weights._header.origin)
        return len(origins) > 333  # so many rewritings were met

    wait_until(attach_often)


# -- verifying -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["first", "last", "middle"])
def test_verify_finds_exactly_the_block_with_a_flipped_bit(
    sealed: Callable[..., Segment], namespace: str, where: str
) -> None:
    segment = sealed()
    with attach("tiny", namespace=namespace) as weights:
        for row in segment.published().tolist():
            block = segment.block(row)
            at = {"first": 0, "last": len(block) - 1, "middle": len(block) // 3}[where]
            block[at] ^= 8
            assert weights.verify() == [weights.manifest.keys[row]]
            block[at] ^= 8
        assert weights.verify() == []


def test_verify_says_nothing_of_blocks_that_are_being_mended(sealed: Callable[..., Segment], namespace: str) -> None:
    segment = sealed()
    segment.block(2)[0] ^= 1
    segment.quarantine(2)
    with attach("tiny", namespace=namespace) as weights:
        assert weights.verify() == []
        assert len(weights.experts()) == 9


def test_verify_takes_a_block_that_is_mended_meanwhile_for_no_fault(
    python: Callable[..., Any], sealed: Callable[..., Segment], namespace: str
) -> None:
    sealed().close()
    mender = python(
        """
import sys
from shm.layout import SegmentName
from shm.segment import Segment
segment = Segment.claim(SegmentName(sys.argv[1], "tiny", "n0"))
print("mends", flush=True)
known, block = segment.checksum(2), segment.block(2)
good = bytes(block)
while True:
    segment.quarantine(2)
    block[:] = bytes(len(good))
    block[:] = good
    segment.publish(2, known)
""",
        namespace,
    )
    mender.expect("mends")
    with attach("tiny", namespace=namespace) as weights:
        for _ in range(300):
            assert weights.verify() in ([], [ExpertKey(0, 2)])  # a race that is lost is rare, and never an error
    mender.kill()


def test_checksums_are_those_of_the_xxh128sum_program() -> None:
    # https://github.com/Cyan4973/xxHash prints this for an empty input with xxh128sum.
    assert checksum(b"").hex() == "99aa06d3014798d86001c324468d497f"


# -- pinning -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="this host has CUDA")
def test_pinning_without_cuda_says_that_everything_else_works(sealed: Callable[..., Segment], namespace: str) -> None:
    sealed()
    with attach("tiny", namespace=namespace) as weights:
        with pytest.raises(SegmentError, match="no CUDA device here"):
            weights.pin()
        assert not weights.is_pinned()
        assert weights.verify() == []


class FakeCudart:
    """cudaHostRegister and its opposite, as far as addresses go; the registration that is told to fails."""

    def __init__(self, fails_at: int = -1) -> None:
        self.pinned: dict[int, int] = {}
        self.flags: set[int] = set()
        self._fails_at = fails_at

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        if len(self.pinned) == self._fails_at:
            return 2
        self.pinned[address] = nbytes
        self.flags.add(flags)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


def test_pinning_covers_every_block_once_in_pieces_of_whole_blocks_and_closing_undoes_it(
    sealed: Callable[..., Segment],
    make_manifest: Callable[..., Manifest],
    namespace: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sealed(manifest=make_manifest(2, 5, rows=33, cols=57))  # blocks of three pages, two in a piece
    cudart = FakeCudart()
    monkeypatch.setattr("shm.pinning._cudart", lambda device: nullcontext((cudart, 0)))
    monkeypatch.setattr("shm.pinning.PIECE_NBYTES", 8 * 4096)
    weights = attach("tiny", namespace=namespace)
    weights.pin()
    weights.pin()
    assert weights.is_pinned()
    ends = [address + nbytes for address, nbytes in cudart.pinned.items()]
    assert [nbytes // 4096 for nbytes in cudart.pinned.values()] == [6] * 5
    assert list(cudart.pinned)[1:] == ends[:-1], "nothing between them"
    assert {address % 4096 for address in (*cudart.pinned, *ends)} == {0}
    for row in weights.rows().tolist():
        block = weights.address(row), weights.address(row) + len(weights.block(row))
        assert sum(a <= block[0] and block[1] <= a + n for a, n in cudart.pinned.items()) == 1, "no block in two pieces"
    assert weights.pinned_edges().tolist() == sorted({*cudart.pinned, *ends})
    assert cudart.flags == {1 | 8}
    weights.close()
    assert cudart.pinned == {}


def test_blocks_that_share_a_page_of_the_host_are_pinned_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a host with pages of 64 KiB CUDA refuses a page that is locked already."""
    monkeypatch.setattr("shm.pinning.PAGE_NBYTES", 65536)
    monkeypatch.setattr("shm.pinning.PIECE_NBYTES", 2 * 65536)
    base = 33 * 65536
    spans = [(base + at, nbytes) for at, nbytes in ((4096, 8192), (61440, 8192), (69632, 61440), (7 * 65536, 4096))]
    pieces = list(joined(spans))
    assert pieces == [(base, 2 * 65536), (base + 7 * 65536, 65536)]
    touching = [(base + at * 65536, 65536) for at in range(5)]
    assert [nbytes for _, nbytes in joined(touching)] == [2 * 65536, 2 * 65536, 65536]


def test_blocks_are_pinned_as_they_are_asked_for(
    sealed: Callable[..., Segment], namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed()
    cudart = FakeCudart()
    monkeypatch.setattr("shm.pinning._cudart", lambda device: nullcontext((cudart, 0)))
    with attach("tiny", namespace=namespace) as weights:
        rows = weights.rows().tolist()
        weights.pin(rows[1:3])
        assert weights.is_pinned(rows[1:3])
        assert not weights.is_pinned(rows[:2])
        assert list(cudart.pinned) == [weights.address(rows[1])], "blocks that touch are one piece"
        weights.pin([*rows[:2], len(weights.manifest) - 1])
        assert weights.is_pinned(rows[:3])
        assert list(cudart.pinned)[1] == weights.address(rows[0]), "and none is pinned twice"
        weights.pin()
        assert weights.is_pinned()
    assert cudart.pinned == {}


def test_a_failed_pinning_leaves_nothing_pinned_and_says_what_to_raise(
    sealed: Callable[..., Segment], namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed()
    cudart = FakeCudart(fails_at=2)
    monkeypatch.setattr("shm.pinning._cudart", lambda device: nullcontext((cudart, 0)))
    monkeypatch.setattr("shm.pinning.PIECE_NBYTES", 4096)
    with attach("tiny", namespace=namespace) as weights:
        with pytest.raises(SegmentError, match=r"gave error 2: raise the memory-lock limit"):
            weights.pin()
        assert cudart.pinned == {}
        assert not weights.is_pinned()


def test_addresses_differ_between_attachments_and_bytes_do_not(sealed: Callable[..., Segment], namespace: str) -> None:
    sealed()
    with attach("tiny", namespace=namespace) as one, attach("tiny", namespace=namespace) as other:
        assert one.address(3) != other.address(3)
        assert np.array_equal(np.frombuffer(one.block(3), np.uint8), np.frombuffer(other.block(3), np.uint8))
        assert one.generation == other.generation
