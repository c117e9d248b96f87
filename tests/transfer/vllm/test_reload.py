"""Experts are loaded again as they were loaded first, or nothing changes: on ranks made like vLLM's, without vLLM.

With vLLM itself: tests/engines/vllm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shm.errors import InvalidInput
from tests.transfer.kept import NOBODY, Kept
from tests.transfer.vllm.rank import Experts, Model, Named
from transfer import Loader, Restorer
from transfer.errors import RestoreError
from transfer.slots import Slots
from transfer.slots.layouts import SlotMismatch
from transfer.vllm.reload import Reload, Reloaded, fill, modules_by_layer


@pytest.fixture
def kept(tiny_qwen3_moe: Path, keep: Callable[..., Kept]) -> Kept:
    return keep(tiny_qwen3_moe)


@pytest.fixture
def loader(kept: Kept) -> Iterator[Loader]:
    with kept.loader(None) as loader:
        yield loader


def started(loader: Loader, **options: Any) -> Model:
    model = Model(**options)
    model.start(loader.tensors(lambda name: ".experts." in name))
    return model


def as_at_start(module: Experts, tensors: list[Named]) -> None:
    module.take(tensors)


def unpacked(module: Experts, tensors: list[Named]) -> None:
    """What vLLM 0.32 does on a CPU."""
    module.is_packing = False
    module.take(tensors)
    module.is_packing = True


def test_binding_the_packed_experts_of_a_rank_is_refused_with_expert_and_tensor(kept: Kept, loader: Loader) -> None:
    """Same names, shapes and dtypes as those of a rank whose kernel keeps weights as they are."""
    model = started(loader)
    namespace = kept.name.namespace
    with Restorer(NOBODY, model="tiny", namespace=namespace, engine_host="127.0.0.1") as restorer:
        with pytest.raises(SlotMismatch) as refusal:
            restorer.bind(Slots.fused(dict(model.named_parameters())))
        said = str(refusal.value)
        assert "layer 0, expert 0: slot 0 of model.layers.0.mlp.experts.routed_experts.w" in said
        assert "does not hold model.layers.0.mlp.experts.0." in said
        assert "the same bytes in another order" in said
        with pytest.raises(InvalidInput, match="no slots are bound"):
            restorer.restore()


@pytest.mark.parametrize("ranks", [1, 2])
def test_lost_experts_come_back_as_the_kernel_has_them_and_no_other_layer_is_read(loader: Loader, ranks: int) -> None:
    model = started(loader, rank=0, ranks=ranks)
    right = model.held()
    lost = [(0, 2), (2, 0), (2, 4)]
    for key in lost:
        model.spoil(*key)
    done = Reload(modules_by_layer(model), as_at_start, loader).run([*lost, (2, 1)] if ranks == 2 else lost)
    assert all(torch.equal(held, right[name]) for name, held in model.held().items())
    mine = 5 if ranks == 1 else 3
    assert (done.experts, done.read, done.witnesses) == (3, 2 * mine, 2 * mine - 3)
    block = 3 * 48 * 40 * 2
    assert done.bytes_by_source == {"local": 2 * mine * block, "peer": 0, "disk": 0}


@pytest.mark.parametrize("harm", ["a kernel's packing left out", "an expert lost that was not named", "an error"])
def test_a_reload_that_would_do_harm_is_undone(loader: Loader, harm: str) -> None:
    model = started(loader)
    model.spoil(1, 3)
    if harm == "an expert lost that was not named":
        model.spoil(1, 0)
    before = model.held()
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}

    def fail(module: Experts, tensors: list[Named]) -> None:
        module.w13_weight = torch.nn.Parameter(torch.empty(0, device="meta"))
        module.w2_weight.data.zero_()
        raise RuntimeError("this build has no such kernel")

    rewrite = {"a kernel's packing left out": unpacked, "an error": fail}.get(harm, as_at_start)
    with pytest.raises((RestoreError, RuntimeError), match=r"not asked for|no such kernel"):
        Reload(modules_by_layer(model), rewrite, loader).run([(1, 3)])
    assert all(torch.equal(held, before[name]) for name, held in model.held().items())
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == places


def test_memory_that_is_another_afterwards_is_none_that_a_kernel_knows(loader: Loader) -> None:
    model = started(loader)
    before = dict(model.named_parameters())

    def anew(module: Experts, tensors: list[Named]) -> None:
        module.take(tensors)
        module.w2_weight = torch.nn.Parameter(module.w2_weight.data.clone(), requires_grad=False)

    with pytest.raises(RestoreError, match="layer 1: expert 0, 1, 2, 3, 4, not asked for"):
        Reload(modules_by_layer(model), anew, loader).run([(1, 3)])
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_a_layer_that_lost_all_is_loaded_after_one_that_shows_whether_it_is_right(loader: Loader) -> None:
    model = started(loader)
    right = model.held()
    layer = [(1, expert) for expert in range(5)]
    for key in layer:
        model.spoil(*key)
    before = model.held()
    with pytest.raises(RestoreError, match="layer 0: expert"):
        Reload(modules_by_layer(model), unpacked, loader).run(layer)
    assert all(torch.equal(held, before[name]) for name, held in model.held().items())
    done = Reload(modules_by_layer(model), as_at_start, loader).run(layer)
    assert all(torch.equal(held, right[name]) for name, held in model.held().items())
    assert (done.experts, done.read, done.witnesses) == (5, 10, 5)


def test_where_all_is_lost_nothing_is_loaded_unless_somebody_vouches(loader: Loader) -> None:
    model = started(loader)
    right = model.held()
    everything = [(layer, expert) for layer in range(3) for expert in range(5)]
    for key in everything:
        model.spoil(*key)
    before = model.held()
    reload = Reload(modules_by_layer(model), as_at_start, loader)
    with pytest.raises(RestoreError, match="nothing can show"):
        reload.run(everything)
    assert all(torch.equal(held, before[name]) for name, held in model.held().items())
    reload.run(everything, is_vouched=True)
    assert all(torch.equal(held, right[name]) for name, held in model.held().items())


def filled(model: Model, asked: list[tuple[int, int]], kept: Kept, content: str | None = None) -> Reloaded | None:
    with Restorer(NOBODY, model="tiny", namespace=kept.name.namespace, engine_host="127.0.0.1") as restorer:
        return fill(modules_by_layer(model), asked, restorer, content)


@pytest.mark.usefixtures("kept_engines")
@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (0, 2), (1, 2)])
def test_where_the_kernel_keeps_weights_as_they_are_only_lost_experts_are_read(
    kept: Kept, loader: Loader, rank: int, ranks: int
) -> None:
    model = started(loader, rank=rank, ranks=ranks, is_packing=False)
    right = model.held()
    lost = [(0, 2), (2, 0), (2, 4)] if rank == 0 else [(0, 1), (1, 3)]
    for key in lost:
        model.spoil(*key)
    done = filled(model, [*lost, (1, 2 if rank else 3)] if ranks == 2 else lost, kept)
    assert done is not None
    assert (done.experts, done.read) == (len(lost), len(lost))
    assert done.witnesses > 0
    assert done.bytes_by_source["local"] == len(lost) * 3 * 48 * 40 * 2
    assert all(torch.equal(held, right[name]) for name, held in model.held().items())


@pytest.mark.usefixtures("kept_engines")
def test_slots_that_a_kernel_rewrote_or_that_nothing_speaks_for_are_not_filled(kept: Kept, loader: Loader) -> None:
    packing, plain, scaled = started(loader), *(started(loader, is_packing=False) for _ in range(2))
    for module in modules_by_layer(scaled).values():
        scale = SimpleNamespace(scale=torch.ones(5, 1))  # made of the weights, where the kernel finds it
        module.quant_method = SimpleNamespace(moe_quant_config=SimpleNamespace(_w1=scale), moe_kernel=None)
    whole_layer = [(1, expert) for expert in range(5)]
    for model, lost in ((packing, [(1, 3)]), (plain, whole_layer), (scaled, [(1, 3)])):
        for key in lost:
            model.spoil(*key)
        before = model.held()
        assert filled(model, lost, kept) is None
        assert all(torch.equal(held, before[name]) for name, held in model.held().items())


@pytest.mark.usefixtures("kept_engines")
def test_weights_of_other_content_than_the_engine_was_started_with_are_not_put_there(
    kept: Kept, loader: Loader
) -> None:
    """A fine-tune may have changed the lost expert alone: none of the others would show it."""
    for is_packing in (True, False):
        model = started(loader, is_packing=is_packing)
        assert loader.content_digest is not None
        model.spoil(1, 3)
        before = model.held()
        assert filled(model, [(1, 3)], kept, content=32 * "0") is None
        with pytest.raises(RestoreError, match="other weights than the engine was started with"):
            Reload(modules_by_layer(model), as_at_start, loader, 32 * "0").run([(1, 3)])
        assert all(torch.equal(held, before[name]) for name, held in model.held().items())
        Reload(modules_by_layer(model), as_at_start, loader, loader.content_digest).run([(1, 3)])


def test_what_cannot_be_loaded_again_is_refused(loader: Loader) -> None:
    with pytest.raises(InvalidInput, match="layer 3 has no experts: those are layers 0, 1, 2"):
        Reload(modules_by_layer(started(loader)), as_at_start, loader).run([(3, 0)])
    with pytest.raises(RestoreError, match="EPLB"):
        modules_by_layer(Model(is_balanced=True))
    twice = torch.nn.ModuleDict({"one": Model(), "other": Model()})
    with pytest.raises(RestoreError, match="the layer of other"):
        modules_by_layer(twice)
    assert Reload(modules_by_layer(Model(rank=1, ranks=2)), as_at_start, loader).run([(1, 0)]).experts == 0
