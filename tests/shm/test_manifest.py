"""Manifests: round trips, names to blocks, and one error for every way to be wrong."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shm import manifest as module
from shm.block import DENSE, DTYPE_BITS, NBYTES_MAX, TENSOR_ALIGNMENT, ExpertKey, TensorEntry, tensor_nbytes
from shm.errors import BlockUnavailable, InvalidInput, ManifestError
from shm.manifest import NAME_CHARS_MAX, TENSOR_NAME_CHARS_MAX, FileSpec, Manifest

PER_EXPERT = "model.layers.{layer}.mlp.experts.{expert}.w1.weight"
FUSED = "model.layers.{layer}.mlp.experts.gate_up_proj[{expert}]"
IN_LAYER = "model.layers.{layer}.self_attn.q_proj.weight"
APPENDED = "mtp.experts.{expert}.w1.weight"
OUTSIDE = "model.embed_tokens.weight"

File = FileSpec("model-1.safetensors", 100_003, "ab" * 16)


def manifest_of(blocks: dict[tuple[int, int], list[TensorEntry]], **fields: Any) -> Manifest:
    whole = {"model": "m", "family": "f", "include": "all", "files": [File], **fields}
    return Manifest.build(**whole, blocks={ExpertKey(*key): entries for key, entries in blocks.items()})


def entry(template: str, offset: int = 8, dtype: str = "BF16", shape: tuple[int, ...] = (3, 5), file: int = 0) -> Any:
    return TensorEntry(template, dtype, shape, file, offset)


@pytest.fixture
def mixed() -> Manifest:
    """Every shape of name: per expert, fused, dense in a layer and outside, and an appended stack."""
    blocks: dict[tuple[int, int], list[TensorEntry]] = {(DENSE, DENSE): [entry(OUTSIDE, shape=(7, 3))]}
    blocks |= {(layer, DENSE): [entry(IN_LAYER, 100 * layer + 50)] for layer in range(3)}
    blocks |= {(layer, e): [entry(PER_EXPERT, 1000 * layer + 100 * e + 8)] for layer in (1, 2) for e in range(11)}
    blocks |= {(3, e): [entry(FUSED, 20_000 + 100 * e)] for e in range(8)}
    blocks |= {(61, e): [entry(APPENDED, 30_000 + 100 * e)] for e in range(3)}
    return manifest_of(blocks)


# -- layout and round trips ----------------------------------------------------------------------------------------

whole_dtypes = sorted(name for name, bits in DTYPE_BITS.items() if bits % 8 == 0)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    numbers = st.integers(0, 1 << 20)
    keys = draw(st.sets(st.builds(ExpertKey, numbers, st.integers(DENSE, 1 << 20)), min_size=1, max_size=9))
    n_files = draw(st.integers(1, 3))
    word = st.text(min_size=1, max_size=9).filter(lambda text: "{" not in text and text < "\ud800")
    kinds = [
        [(f"{template}{word_}", dtype, shape) for word_, dtype, shape in kind]
        for template, kind in zip(
            (PER_EXPERT, FUSED, "x.{layer}."),
            draw(
                st.lists(
                    st.lists(
                        st.tuples(word, st.sampled_from(whole_dtypes), st.tuples(st.integers(0, 9), st.integers(0, 9))),
                        min_size=1, max_size=4, unique_by=lambda t: t[0],
                    ),
                    min_size=3, max_size=3,
                )
            ),
            strict=True,
        )
    ]  # fmt: skip
    blocks = {}
    for key in keys:
        kind = draw(st.sampled_from(kinds[:2])) if key.is_expert else kinds[2]
        where = st.tuples(st.integers(0, n_files - 1), st.integers(0, 1 << 40))
        blocks[key] = [TensorEntry(name, dtype, shape, *draw(where)) for name, dtype, shape in kind]
    files = [FileSpec(f"{i}.safetensors", (1 << 40) + 9999, f"{i:032x}") for i in range(n_files)]
    name = st.text("abcXYZ/._- äß", min_size=1, max_size=NAME_CHARS_MAX).filter(lambda text: text == text.strip())
    return Manifest.build(draw(name), "f", draw(st.sampled_from(["experts", "all"])), files, blocks)


@settings(max_examples=30, deadline=None)
@given(manifests())
def test_both_forms_read_back_to_an_equal_manifest_with_the_same_digest(manifest: Manifest) -> None:
    for again in (
        Manifest.from_bytes(manifest.to_bytes()),
        Manifest.from_bytes(manifest.to_bytes(), manifest.digest),
        Manifest.from_json(manifest.to_json()),
    ):
        assert again == manifest
        assert again.to_bytes() == manifest.to_bytes()
        assert again.keys == manifest.keys
        assert [again.block(i) for i in range(len(again))] == [manifest.block(i) for i in range(len(manifest))]


@settings(max_examples=30, deadline=None)
@given(manifests())
def test_tensors_of_a_block_are_aligned_in_order_of_name_and_never_overlap(manifest: Manifest) -> None:
    for index in range(len(manifest)):
        block = manifest.block(index)
        assert [t.name for t in block.tensors] == sorted(t.name for t in block.tensors)
        end = 0
        for tensor in block.tensors:
            assert tensor.offset % TENSOR_ALIGNMENT == 0
            assert end <= tensor.offset < end + TENSOR_ALIGNMENT
            assert tensor.nbytes == tensor_nbytes(tensor.dtype, tensor.shape)
            end = tensor.offset + tensor.nbytes
        assert block.nbytes == end == manifest.nbytes[index]


@settings(max_examples=30, deadline=None)
@given(manifests())
def test_every_name_leads_to_its_own_block_and_tensor(manifest: Manifest) -> None:
    for index in range(len(manifest)):
        for name in manifest.tensor_names(index):
            row, tensor = manifest.find(name)
            assert row == index
            assert module.fill_template(tensor.name, manifest.keys[index]) == name


def test_the_order_in_which_blocks_and_tensors_are_given_is_no_part_of_the_manifest() -> None:
    tensors = [entry(PER_EXPERT, 8), entry(PER_EXPERT + "_scale", 90)]
    one = manifest_of({(0, 0): tensors, (0, 1): tensors, (1, 0): tensors})
    other = manifest_of({(1, 0): tensors[::-1], (0, 1): tensors, (0, 0): tensors[::-1]})
    assert one.digest == other.digest


def test_alike_blocks_share_a_schema(make_manifest: Callable[..., Manifest]) -> None:
    assert len(make_manifest(4, 9).schemas) == 1


def _changes() -> dict[str, Callable[[], Manifest]]:
    blocks = {(0, 0): [entry(PER_EXPERT, 8)], (0, 1): [entry(PER_EXPERT, 90)]}

    def changed(tensor: TensorEntry | None = None, key: tuple[int, int] = (0, 1), **fields: Any) -> Manifest:
        return manifest_of({(0, 0): blocks[0, 0], key: [tensor or blocks[0, 1][0]]}, **fields)

    return {
        "nothing": changed,
        "model": lambda: changed(model="n"),
        "family": lambda: changed(family="g"),
        "include": lambda: changed(include="experts"),
        "file name": lambda: changed(files=[FileSpec("b.safetensors", File.nbytes, File.header_digest)]),
        "file size": lambda: changed(files=[FileSpec(File.name, File.nbytes + 1, File.header_digest)]),
        "file header": lambda: changed(files=[FileSpec(File.name, File.nbytes, "cd" * 16)]),
        "another file": lambda: changed(files=[File, FileSpec("b.safetensors", 9, "cd" * 16)]),
        "key": lambda: changed(key=(0, 2)),
        "layer": lambda: changed(key=(1, 1)),
        "offset": lambda: changed(entry(PER_EXPERT, 91)),
        "dtype": lambda: changed(entry(PER_EXPERT, 90, "F16")),
        "shape": lambda: changed(entry(PER_EXPERT, 90, shape=(5, 3))),
        "tensor name": lambda: changed(entry(PER_EXPERT + "x", 90)),
    }


def test_the_digest_changes_with_anything() -> None:
    digests = {what: make().digest for what, make in _changes().items()}
    assert len(set(digests.values())) == len(digests)
    assert _changes()["nothing"]().digest == digests["nothing"]


# -- finding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("model.layers.2.mlp.experts.10.w1.weight", (2, 10)),
        ("model.layers.1.mlp.experts.0.w1.weight", (1, 0)),
        ("model.layers.3.mlp.experts.gate_up_proj[7]", (3, 7)),
        ("model.layers.0.self_attn.q_proj.weight", (0, DENSE)),
        ("model.embed_tokens.weight", (DENSE, DENSE)),
        ("mtp.experts.2.w1.weight", (61, 2)),
    ],
)
def test_names_of_every_kind_are_found(mixed: Manifest, name: str, key: tuple[int, int]) -> None:
    row, _ = mixed.find(name)
    assert mixed.keys[row] == key
    assert name in mixed.tensor_names(row)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "model.layers.2.mlp.experts.11.w1.weight",  # no such expert
        "model.layers.3.mlp.experts.0.w1.weight",  # a layer whose experts are fused
        "model.layers.1.mlp.experts.gate_up_proj[7]",  # a layer whose experts are not
        "model.layers.3.mlp.experts.gate_up_proj",  # the whole fused tensor is no block's
        "model.layers.3.mlp.experts.gate_up_proj[8]",
        "model.layers.02.mlp.experts.10.w1.weight",
        "model.layers.2.mlp.experts.010.w1.weight",
        "model.layers.-1.self_attn.q_proj.weight",
        "model.layers.99999999999999999999.self_attn.q_proj.weight",
        "xmodel.embed_tokens.weight",
        "model.embed_tokens.weight.x",
        "model.layers.{layer}.mlp.experts.{expert}.w1.weight",
        "modelxlayers.2.mlp.experts.10.w1.weight",  # a dot of the template is a dot
        "model.layers.٢.mlp.experts.3.w1.weight",  # digits of another script
        "mtp.experts.3.w1.weight",
    ],
)
def test_names_that_are_near_but_not_there_are_refused(mixed: Manifest, name: str) -> None:
    with pytest.raises(BlockUnavailable, match="has no tensor"):
        mixed.find(name)


def test_an_expert_that_is_not_there_is_refused_by_number(mixed: Manifest) -> None:
    assert mixed.keys[mixed.index(3, 7)] == (3, 7)
    with pytest.raises(BlockUnavailable, match="no expert 8 in layer 3"):
        mixed.index(3, 8)


def test_an_unavailable_block_is_a_key_error_that_prints_its_message() -> None:
    assert isinstance(BlockUnavailable("x"), KeyError)
    assert str(BlockUnavailable("say 'this'")) == "say 'this'"


# -- every way to be malformed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", " m", "m ", "a\nb", "a\0b", "x" * 300, "x" * (NAME_CHARS_MAX + 1)])
def test_model_names_out_of_limits_are_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match=f"give 1 to {NAME_CHARS_MAX} printable"):
        manifest_of({(0, 0): [entry(PER_EXPERT)]}, model=name)


@pytest.mark.parametrize(
    ("dtype", "shape", "said"),
    [
        ("BF15", (3,), "dtype 'BF15' is not one of"),
        ("BF16", (3, -1), "not a whole number of 0 or more"),
        ("BF16", (3, 1.5), "not a whole number of 0 or more"),
        ("F4", (3, 3), "36 bits: not whole bytes"),
        ("U8", (NBYTES_MAX + 1,), "beyond"),
        ("F64", (1 << 70, 1 << 70), "beyond"),
    ],
)
def test_tensors_of_no_size_are_refused(dtype: str, shape: Any, said: str) -> None:
    with pytest.raises(ManifestError, match=said):
        tensor_nbytes(dtype, shape)


@pytest.mark.parametrize(
    ("blocks", "fields", "said"),
    [
        ({}, {}, "0 blocks: a manifest has 1 to"),
        ({(0, 0): []}, {}, "a block of 0 tensors"),
        ({(0, 0): [entry(PER_EXPERT)]}, {"files": []}, "0 files"),
        ({(0, 0): [entry(PER_EXPERT), entry(PER_EXPERT)]}, {}, "ascending order of name, each once"),
        ({(0, 0): [entry("x" * (TENSOR_NAME_CHARS_MAX + 1))]}, {}, "longer than"),
        ({(-2, 0): [entry(PER_EXPERT)]}, {}, "ascending order of .layer, expert."),
        ({(0, -2): [entry(PER_EXPERT)]}, {}, "ascending order of .layer, expert."),
        ({(0, 0): [entry(PER_EXPERT, file=1)]}, {}, "a file that is not there"),
        ({(0, 0): [entry(PER_EXPERT, File.nbytes - 29)]}, {}, "past the end of its file"),
        ({(0, 0): [entry(PER_EXPERT, (1 << 64) - 8)]}, {}, "past the end of its file"),
        ({(0, 0): [entry(PER_EXPERT, NBYTES_MAX + 1)]}, {}, "past the end of its file"),
    ],
)
def test_what_build_refuses(blocks: Any, fields: Any, said: str) -> None:
    with pytest.raises(ManifestError, match=said):
        manifest_of(blocks, **fields)


def test_a_tensor_may_end_with_its_file() -> None:
    assert manifest_of({(0, 0): [entry(PER_EXPERT, File.nbytes - 30)]}).nbytes.tolist() == [30]


@pytest.mark.parametrize("limit", ["BLOCKS_MAX", "SCHEMAS_MAX", "FILES_MAX"])
def test_numbers_beyond_a_limit_are_refused(limit: str, mixed: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    document = mixed.to_json()
    monkeypatch.setattr(module, limit, {"BLOCKS_MAX": 36, "SCHEMAS_MAX": 4, "FILES_MAX": 0}[limit])
    with pytest.raises(ManifestError, match=f"{limit[:-4].lower()}: a manifest has 1 to"):
        Manifest.from_json(document)


def _set(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        at: Any = document
        for step in path[:-1]:
            at = at[step]
        at[path[-1]] = to

    return change


def _swap_blocks(document: dict[str, Any]) -> None:
    document["blocks"][0], document["blocks"][1] = document["blocks"][1], document["blocks"][0]


MALFORMED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    **{
        f"no {field}": (lambda document, field=field: document.pop(field), "not a manifest: KeyError")
        for field in ("model", "family", "include", "files", "schemas", "blocks")
    },
    "no digest": (lambda document: document.pop("digest"), "does not match its digest"),
    "other digest": (_set("digest", to="0" * 64), "does not match its digest"),
    "digest of no text": (_set("digest", to=None), "does not match its digest"),
    "model too long": (_set("model", to="x" * 300), "model name"),
    "other model": (_set("model", to="n"), "does not match its digest"),
    "files no list": (_set("files", to=3), "not a manifest"),
    "file no object": (_set("files", 0, to="a"), "not a manifest"),
    "file size no number": (_set("files", 0, "nbytes", to="much"), "not a manifest"),
    "file size negative": (_set("files", 0, "nbytes", to=-1), "of -1 bytes: it has 0 to"),
    "file size endless": (_set("files", 0, "nbytes", to=1 << 80), "bytes: it has 0 to"),
    "file size infinite": (_set("files", 0, "nbytes", to=float("inf")), "not a manifest"),
    "no files": (_set("files", to=[]), "0 files"),
    "no schemas": (_set("schemas", to=[]), "0 schemas|not a manifest"),
    "no blocks": (_set("blocks", to=[]), "0 blocks"),
    "schema without tensors": (_set("schemas", 0, "tensors", to=[]), "a block of 0 tensors"),
    "tensor without name": (lambda d: d["schemas"][0]["tensors"][0].pop("name"), "not a manifest: KeyError"),
    "unknown dtype": (_set("schemas", 0, "tensors", 0, "dtype", to="BF15"), "dtype 'BF15' is not one of"),
    "shape no list": (_set("schemas", 0, "tensors", 0, "shape", to=7), "not a manifest: TypeError"),
    "shape of texts": (_set("schemas", 0, "tensors", 0, "shape", to=["3"]), "not a whole number"),
    "shape endless": (_set("schemas", 0, "tensors", 0, "shape", to=[1 << 70]), "beyond"),
    "layer no number": (_set("blocks", 0, "layer", to="x"), "not a manifest"),
    "layer endless": (_set("blocks", 0, "layer", to=1 << 40), "not a manifest"),
    "expert below dense": (_set("blocks", 0, "expert", to=-2), "ascending order of .layer, expert."),
    "blocks out of order": (_swap_blocks, "ascending order of .layer, expert."),
    "block twice": (lambda d: d["blocks"].insert(0, d["blocks"][0]), "ascending order of .layer, expert."),
    "block no object": (_set("blocks", 0, to=[]), "not a manifest"),
    "schema not there": (_set("blocks", 0, "schema", to=99), "a schema that is not there"),
    "one schema too far": (lambda d: d["blocks"][0].update(schema=len(d["schemas"])), "a schema that is not there"),
    "schema negative": (_set("blocks", 0, "schema", to=-1), "not a manifest"),
    "range missing": (lambda d: d["blocks"][0]["ranges"].pop(), "do not add up"),
    "range too many": (lambda d: d["blocks"][0]["ranges"].append([0, 8]), "do not add up"),
    "range too many at the end": (lambda d: d["blocks"][-1]["ranges"].append([0, 8]), "do not add up"),
    "range of one number": (_set("blocks", 0, "ranges", 0, to=[0]), "not a manifest"),
    "offset negative": (_set("blocks", 0, "ranges", 0, to=[0, -8]), "not a manifest"),
    "offset past the file": (_set("blocks", 0, "ranges", 0, to=[0, File.nbytes]), "past the end of its file"),
    "file not there": (_set("blocks", 0, "ranges", 0, to=[7, 8]), "a file that is not there"),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_document_that_is_malformed_is_refused(fault: str, mixed: Manifest) -> None:
    damage, said = MALFORMED[fault]
    document = copy.deepcopy(mixed.to_json())
    damage(document)
    with pytest.raises(ManifestError, match=said):
        Manifest.from_json(document)


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 80), 1 << 80) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    steps: Any = ()
    if isinstance(value, dict):
        steps = value.items()
    elif isinstance(value, list):
        steps = enumerate(value)
    return [path] * bool(path) + list(itertools.chain.from_iterable(_paths(v, (*path, s)) for s, v in steps))


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_any_value_anywhere_in_a_document_is_refused_or_harmless(data: st.DataObject) -> None:
    manifest = manifest_of({(0, 0): [entry(PER_EXPERT, 8)], (0, 1): [entry(PER_EXPERT, 90)]})
    document = copy.deepcopy(manifest.to_json())
    path = data.draw(st.sampled_from(_paths(document)))
    _set(*path, to=data.draw(json_values))(document)
    try:
        assert Manifest.from_json(document) == manifest
    except ManifestError:
        return


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: b"", "not a manifest"),
        (lambda data: data[:23], "not a manifest"),
        (lambda data: b"\xff" * 8 + data[8:], "not a manifest"),  # head of 2^64 - 1 bytes
        (lambda data: data[:8] + b"\xff" * 8 + data[16:], "not a manifest"),  # as many rows
        (lambda data: data[:16] + b"\xff" * 8 + data[24:], "not a manifest"),  # as many ranges
        (lambda data: data[:-1], "not a manifest"),
        (lambda data: data + b"\0", "not a manifest"),
        (lambda data: data[:24] + b"[" + data[25:], "not a manifest"),
        (lambda data: data[:24] + b"[" * len(data[24:]), "not a manifest"),
        (lambda data: data.replace(b'"model":"m"', b'"madel":"m"'), "not a manifest"),
        (lambda data: data.replace(b'"model":"m"', b'"model":"\\n'), "not a manifest"),
        (lambda data: data.replace(b'"model":"m","family"', b'"model": "","family"'), "model name|not a manifest"),
    ],
)
def test_bytes_that_build_would_not_have_written_are_refused(
    change: Callable[[bytes], bytes], said: str, mixed: Manifest
) -> None:
    data = mixed.to_bytes()
    assert change(data) != data
    with pytest.raises(ManifestError, match=said):
        Manifest.from_bytes(change(data))


# What is written into the two tables, by field and row, and the error's words.
TABLES: dict[str, tuple[str, str, int, int, str]] = {
    "a key out of order": ("rows", "layer", 5, 0, "ascending order of .layer, expert."),
    "a key below dense": ("rows", "expert", 0, -2, "ascending order of .layer, expert."),
    "a schema that is not there": ("rows", "schema", 3, 99, "a schema that is not there"),
    "an absurd schema": ("rows", "schema", 3, 0xFFFFFFFF, "a schema that is not there"),
    "a range of another block": ("rows", "first_range", 3, 7, "do not add up"),
    "a file that is not there": ("ranges", "file", 3, 1, "a file that is not there"),
    "an absurd offset": ("ranges", "offset", 3, (1 << 64) - 1, "past the end of its file"),
    "reserved bytes": ("ranges", "reserved", 3, 1 << 31, "reserved bytes of a file range are not zero"),
}


@pytest.mark.parametrize("fault", TABLES)
def test_a_right_digest_does_not_save_bytes_that_make_no_sense(fault: str, mixed: Manifest) -> None:
    table, field, row, value, said = TABLES[fault]
    tables = {"rows": mixed.rows.copy(), "ranges": mixed.ranges.copy()}
    tables[table][field][row] = value
    data = replace(mixed, **tables).to_bytes()
    for digest in (None, hashlib.sha256(data).hexdigest()):
        with pytest.raises(ManifestError, match=said):
            Manifest.from_bytes(data, digest)


def test_the_same_manifest_in_other_bytes_is_refused(mixed: Manifest) -> None:
    data = mixed.to_bytes()
    other = data.replace(b'"family":"f","include":"all"', b'"include":"all","family":"f"')
    assert len(other) == len(data)
    with pytest.raises(ManifestError, match="not in the same bytes"):
        Manifest.from_bytes(other, hashlib.sha256(other).hexdigest())


def test_bytes_without_their_digest_are_refused(mixed: Manifest) -> None:
    data = bytearray(mixed.to_bytes())
    data[-20] ^= 1
    with pytest.raises(ManifestError, match="does not match its digest"):
        Manifest.from_bytes(bytes(data), mixed.digest)


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_any_damage_to_the_bytes_is_refused_or_another_manifest(data: st.DataObject) -> None:
    good = manifest_of({(0, 0): [entry(PER_EXPERT, 8)], (0, 1): [entry(PER_EXPERT, 90)]}).to_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    bad = good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :]
    try:
        assert Manifest.from_bytes(bad).to_bytes() == bad
    except ManifestError:
        return


def test_tables_are_mapped_not_copied(mixed: Manifest) -> None:
    data = np.frombuffer(mixed.to_bytes(), np.uint8)
    again = Manifest.from_bytes(memoryview(data), mixed.digest)
    assert np.shares_memory(again.rows, data)
    assert np.shares_memory(again.ranges, data)
