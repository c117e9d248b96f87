"""Models of the transformers library are built from memory, on the segment's pages, and answer as from their files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from shm.attachment import attach
from shm.errors import InvalidInput
from transfer.errors import RestoreError
from transfer.transformers import load_model

TOKENS = torch.arange(11)[None]
EXPERTS_MADE_ANEW = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
FUSED = {f"mlp.experts.{part}{kind}" for part in ("gate_up_proj", "down_proj") for kind in ("", "_bias")}
CASES = [
    # family, whether the checkpoint has the library's own names, and which parameters of a layer are copies
    ("qwen3_moe", False, EXPERTS_MADE_ANEW),
    ("deepseek_v3", False, EXPERTS_MADE_ANEW),
    ("mixtral", False, EXPERTS_MADE_ANEW),
    ("gpt_oss", True, FUSED),
]


@pytest.fixture
def bare_of(tmp_path: Path) -> Callable[[Path], Path]:
    """`bare_of(directory)` → one with its configuration, and no weights."""

    def make(directory: Path) -> Path:
        bare = tmp_path / "bare"
        shutil.copytree(directory, bare, ignore=shutil.ignore_patterns("*.safetensors*"))
        return bare

    return make


@pytest.fixture
def pages(serve: Callable[..., Any], free_port: Callable[[], int], namespace: str) -> Callable[..., Any]:
    """`pages(directory, include)` → the URL of a node that keeps it, and whether a tensor lies in its segment."""

    def start(directory: Path, include: str = "all") -> tuple[str, Callable[[torch.Tensor], bool]]:
        node = serve("n0", {"n0": free_port()}, checkpoint=directory, include=include).wait_ready()
        name = attach("moe", namespace=namespace).name.object_name
        return node.url, lambda tensor: is_mapped(tensor.data_ptr(), name)

    return start


def is_mapped(address: int, object_name: str) -> bool:
    """Whether this process has that object of /dev/shm at the address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= address < end:
            return line.endswith(f"/dev/shm/{object_name}")
    return False


@pytest.mark.parametrize(("family", "is_fused", "copies"), CASES, ids=[case[0] for case in CASES])
def test_a_model_is_built_on_the_segments_pages_and_answers_as_from_its_files(
    family: str,
    is_fused: bool,
    copies: set[str],
    tiny_checkpoint: Callable[..., Path],
    pages: Callable[..., Any],
    bare_of: Callable[[Path], Path],
) -> None:
    directory = tiny_checkpoint(family, is_fused=is_fused)
    url, is_on_page = pages(directory)
    model = load_model(bare_of(directory), url)
    right = type(model).from_pretrained(directory, dtype="auto")
    assert torch.equal(model(TOKENS).logits, right(TOKENS).logits)
    copied = {name.split(".", 3)[-1] for name, p in model.named_parameters() if not is_on_page(p)}
    assert copied <= copies, "nothing else"
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert (model.dtype, model.training) == (right.dtype, False)
    assert model.generation_config.to_dict() == right.generation_config.to_dict()


def test_dense_tensors_come_from_the_files_where_the_nodes_keep_experts_alone(
    tiny_qwen3_moe: Path, pages: Callable[..., Any], bare_of: Callable[[Path], Path]
) -> None:
    url, _ = pages(tiny_qwen3_moe, "experts")
    right = transformers.Qwen3MoeForCausalLM.from_pretrained(tiny_qwen3_moe, dtype="auto")
    assert torch.equal(load_model(tiny_qwen3_moe, url)(TOKENS).logits, right(TOKENS).logits)
    with pytest.raises(RestoreError, match="the nodes keep experts alone"):
        load_model(bare_of(tiny_qwen3_moe), url)


def test_a_class_that_the_library_lacks_has_to_be_given(tiny_qwen3_moe: Path, bare_of: Callable[[Path], Path]) -> None:
    bare = bare_of(tiny_qwen3_moe)
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps({**config, "architectures": ["OfNextYear"]}))
    with pytest.raises(InvalidInput, match="give the class"):
        load_model(bare, "http://127.0.0.1:9")
    model = load_model(tiny_qwen3_moe, "http://127.0.0.1:9", kind=transformers.Qwen3MoeModel)
    assert isinstance(model, transformers.Qwen3MoeModel)
