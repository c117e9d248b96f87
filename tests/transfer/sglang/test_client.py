"""The SGLang drop-in against an oracle: what SGLang's own client would put where, worked out tensor by tensor."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.processes import DEADLINE_S
from transfer.checkpoint.synth import write_checkpoint
from transfer.sglang import plugin
from transfer.sglang.client import HotspareBackupClient, run_expert_backup_manager
from transfer.sglang.engine import EXPERT_LOCATION, RUNTIME_CONTEXT
from transfer.sglang.weights import load_from_memory, reload_from_memory, remember_model

pytestmark = pytest.mark.usefixtures("kept_engines")
NOBODY = "http://127.0.0.1:9"
NAME = re.compile(r"(?P<stem>.*\.layers\.(?P<layer>\d+)\.mlp\.experts)\.(?P<expert>\d+)\.(?P<part>\w+)\.(?P<kind>\w+)")
Stored = dict[str, torch.Tensor]
Placement = Mapping[int, Sequence[int]]


def read_experts(directory: Path) -> Stored:
    stored = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            stored.update({name: opened.get_tensor(name) for name in opened.keys() if NAME.fullmatch(name)})  # noqa: SIM118
    return stored


# -- a stand-in for SGLang: the objects it gives a client, and nothing more ----------------------------------------


class MethodOfNextYear:
    """The quantisation method: whatever it calls itself, bytes decide."""


class Runner:
    """A model runner, which constructs its backup client as its release does."""

    def __init__(self, model: torch.nn.Module, ep_rank: int, ep_size: int, reload: Callable[..., Any]) -> None:
        self.model = model
        self.model_config = types.SimpleNamespace(model_path="/the/model", revision=None)
        self.moe_ep_rank, self.moe_ep_size = ep_rank, ep_size
        self.server_args = types.SimpleNamespace(model_path="/the/model", load_format="auto")
        self.weight_updater = types.SimpleNamespace(update_weights_from_disk=reload)

    def client(self, release: str) -> HotspareBackupClient:
        ranks = {"moe_ep_size": self.moe_ep_size, "moe_ep_rank": self.moe_ep_rank}
        given: dict[str, Any] = {"model_config": self.model_config, "get_model": lambda: self.model}
        if release == "0.5.12":
            return HotspareBackupClient(self.server_args, self)
        if release == "0.5.18":
            return HotspareBackupClient(server_args=self.server_args, **given, **ranks)
        if release == "0.5.20":
            return HotspareBackupClient(**given, **ranks)
        assert release == "0.5.23"
        return HotspareBackupClient(**given)


class Rank:
    """A rank's parameters, loaded as they are placed, and a reload from disk that is written down."""

    def __init__(
        self,
        stored: Stored,
        placement: Placement,
        ep_rank: int = 0,
        ep_size: int = 1,
        *,
        shared: int = 0,
    ) -> None:
        self.stored, self.placement = stored, {layer: list(row) for layer, row in placement.items()}
        self.ep_rank, self.ep_size = ep_rank, ep_size
        self.logical = 1 + max(int(NAME.fullmatch(name)["expert"]) for name in stored)  # type: ignore[index]
        physical = len(next(iter(placement.values())))
        share = physical // ep_size
        root = torch.nn.Module()
        for name, tensor in stored.items():
            found = NAME.fullmatch(name)
            assert found
            if int(found["expert"]) == 0 and found["part"] != "up_proj":
                rows = tensor.shape[0] * (2 if found["part"] == "gate_proj" else 1)
                part = "w13" if found["part"] == "gate_proj" else "w2"
                like = torch.empty((share + shared, rows, *tensor.shape[1:]), dtype=tensor.dtype)
                noise = torch.randint(0, 256, (like.nbytes,), dtype=torch.uint8).view(like.dtype).view(like.shape)
                module = self._module(root, found["stem"])
                module.quant_method = MethodOfNextYear()
                module.register_parameter(f"{part}_{found['kind']}", torch.nn.Parameter(noise, requires_grad=False))
        self.runner = Runner(root, ep_rank, ep_size, self._from_disk)
        self.reloaded: list[set[str]] = []
        self.disk_answer: Any = (True, "")
        expect(self, self.parameters)

    def lose(self, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Noise in every slot of the experts that have such a tensor."""
        lost = {name: torch.randint(0, 256, (t.nbytes,), dtype=torch.uint8) for name, t in self.stored.items()}
        expect(self, self.parameters, wanted, {n: noise.view(self.stored[n].dtype) for n, noise in lost.items()})

    @staticmethod
    def _module(root: torch.nn.Module, path: str) -> torch.nn.Module:
        for part in path.split("."):
            if part not in dict(root.named_children()):
                root.add_module(part, torch.nn.Module())
            root = root.get_submodule(part)
        return root

    def _from_disk(self, path: str, load_format: str, *, weight_name_filter: Callable[[str], bool]) -> Any:
        assert (path, load_format) == ("/the/model", "auto")
        wanted = {name for name in self.stored if weight_name_filter(name)}
        self.reloaded.append(wanted)
        expect(self, self.parameters, lambda name: name in wanted)
        return self.disk_answer

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        return {name: p.data for name, p in self.runner.model.named_parameters()}

    @property
    def num_logical_experts(self) -> int:
        return self.logical

    @property
    def num_physical_experts(self) -> int:
        return len(next(iter(self.placement.values())))

    def logical_to_all_physical(self, layer: int, expert: int) -> list[int]:
        return [physical for physical, logical in enumerate(self.placement[layer]) if logical == expert]


def expect(
    rank: Rank,
    into: Mapping[str, torch.Tensor],
    wanted: Callable[[str], bool] = lambda name: True,
    stored: Stored | None = None,
) -> None:
    """The oracle: put every wanted tensor where SGLang's client would, gate above up."""
    share = len(next(iter(rank.placement.values()))) // rank.ep_size
    for name, right in rank.stored.items():
        tensor = right if stored is None else stored[name].view(right.shape)
        found = NAME.fullmatch(name)
        assert found
        if not wanted(name):
            continue
        part = "w2" if found["part"] == "down_proj" else "w13"
        for physical in rank.logical_to_all_physical(int(found["layer"]), int(found["expert"])):
            if physical // share != rank.ep_rank:
                continue
            slot = into[f"{found['stem']}.{part}_{found['kind']}"][physical % share]
            rows = tensor.shape[0]
            start = rows if found["part"] == "up_proj" else 0
            slot[start : start + rows] = tensor


def differing(rank: Rank, expected: Mapping[str, torch.Tensor]) -> list[str]:
    found = rank.parameters
    return [n for n, t in expected.items() if not torch.equal(found[n].view(torch.uint8), t.view(torch.uint8))]


def copies(rank: Rank) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in rank.parameters.items()}


@pytest.fixture
def client(
    monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., Any]
) -> Iterator[Callable[..., HotspareBackupClient]]:
    """`client(rank, url, ready=…, release=…)` → a client made as SGLang makes it, waited for until it can be used."""
    made: list[HotspareBackupClient] = []
    monkeypatch.setattr("transfer.sglang.client.RETRY_INTERVAL_S", 0.2)

    def make(rank: Rank, url: str, *, ready: bool = True, release: str = "0.5.23") -> HotspareBackupClient:
        location, context = types.ModuleType(EXPERT_LOCATION), types.ModuleType(RUNTIME_CONTEXT)
        location.get_global_expert_location_metadata = lambda: rank  # type: ignore[attr-defined]
        if release == "0.5.23":  # others say it themselves
            context.get_parallel = lambda: rank.runner  # type: ignore[attr-defined]
        context.get_model = lambda: rank.runner.server_args  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, EXPERT_LOCATION, location)
        if release == "0.5.12":
            monkeypatch.delitem(sys.modules, RUNTIME_CONTEXT, raising=False)
        else:
            monkeypatch.setitem(sys.modules, RUNTIME_CONTEXT, context)
        monkeypatch.setenv("HOTSPARE_URL", url)
        made.append(rank.runner.client(release))
        if ready:
            wait_until(lambda: made[-1].use_backup, "bound")
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture(scope="module")
def moe(moe_checkpoint: Path) -> Stored:
    """DeepSeek's names, block fp8 with scales, 13 experts in layers 3, 4 and 5."""
    return read_experts(moe_checkpoint)


def same_everywhere(row: Sequence[int]) -> Placement:
    return dict.fromkeys((3, 4, 5), row)


def shuffled(physical: int) -> Placement:
    """13 logical experts over so many slots, another order in each layer."""
    return {
        layer: [(index * step + layer) % 13 for index in range(physical)] for layer, step in ((3, 1), (4, 3), (5, 5))
    }


# -- the same bytes in the same places ---------------------------------------------------------------------------


def test_it_fills_the_same_places_as_sglangs_own_client_for_every_rank_and_placement(
    serve: Callable[..., Any],
    free_port: Callable[[], int],
    moe_checkpoint: Path,
    moe: Stored,
    client: Callable[..., HotspareBackupClient],
) -> None:
    url = serve("n0", {"n0": free_port()}, checkpoint=moe_checkpoint, fill="disk").wait_ready().url
    cases = [(shuffled(13), 1), (shuffled(16), 1), (shuffled(16), 2), (shuffled(16), 4), (shuffled(20), 4)]
    for placement, ep_size in cases:
        for ep_rank in range(ep_size):
            rank = Rank(moe, placement, ep_rank, ep_size)
            expected = copies(rank)
            backup = client(rank, url)
            rank.lose()
            assert differing(rank, expected)
            backup.update_weights()
            assert differing(rank, expected) == []
            assert rank.reloaded == []


def test_a_filter_of_checkpoint_names_leaves_other_experts_alone(
    serve: Callable[..., Any],
    free_port: Callable[[], int],
    moe_checkpoint: Path,
    moe: Stored,
    client: Callable[..., HotspareBackupClient],
) -> None:
    url = serve("n0", {"n0": free_port()}, checkpoint=moe_checkpoint, fill="disk").wait_ready().url
    rank = Rank(moe, shuffled(16), 1, 2)
    backup = client(rank, url)
    right = copies(rank)
    rank.lose(lambda name: ".experts.3." in name)
    expected = copies(rank)
    assert differing(rank, right)

    def wanted(name: str) -> bool:
        return ".layers.4.mlp.experts.7." in name or ".layers.5.mlp.experts.10." in name

    rank.lose(wanted)
    assert differing(rank, expected)
    backup.update_weights(wanted)
    assert differing(rank, expected) == []
    assert (rank.reloaded, backup.use_backup) == ([], True)


@pytest.mark.parametrize("moved", ["all", "some", "wrongly"])
def test_experts_that_were_placed_anew_are_proved_but_for_those_that_sglang_says_are_lost(
    serve: Callable[..., Any],
    free_port: Callable[[], int],
    moe_checkpoint: Path,
    moe: Stored,
    client: Callable[..., HotspareBackupClient],
    moved: str,
) -> None:
    url = serve("n0", {"n0": free_port()}, checkpoint=moe_checkpoint, fill="disk").wait_ready().url
    rank = Rank(moe, shuffled(16), 1, 2)
    backup = client(rank, url)
    rank.placement = {layer: row[::-1] for layer, row in rank.placement.items()}
    expected = copies(rank)
    expect(rank, expected)

    def wanted(name: str) -> bool:
        return moved == "all" or ".experts.3." in name or ".experts.12." in name

    if moved == "some":  # SGLang's ranks gave each other the experts that any of them had
        expect(rank, rank.parameters)
    rank.lose(wanted)
    backup.update_weights(None if moved == "all" else wanted)
    if moved == "wrongly":
        assert [{NAME.fullmatch(n)["expert"] for n in names} for names in rank.reloaded] == [{"3", "12"}]  # type: ignore[index]
    else:
        assert differing(rank, expected) == []
        assert (rank.reloaded, backup.use_backup) == ([], True)


@pytest.mark.parametrize(("was", "size"), [(2, 3), (3, 2), (2, 5)])
def test_ranks_that_came_or_went_since_the_start_change_whose_slots_these_are(
    serve: Callable[..., Any],
    free_port: Callable[[], int],
    moe_checkpoint: Path,
    moe: Stored,
    client: Callable[..., HotspareBackupClient],
    was: int,
    size: int,
) -> None:
    """SGLang widens its placement, and what a process was launched with stays as it was."""
    url = serve("n0", {"n0": free_port()}, checkpoint=moe_checkpoint, fill="disk").wait_ready().url
    rank = Rank(moe, shuffled(7 * was), 1, was)
    backup = client(rank, url)
    rank.placement, rank.ep_size = {layer: list(row) for layer, row in shuffled(7 * size).items()}, size
    expected = copies(rank)
    expect(rank, expected)
    rank.lose()
    backup.update_weights()
    assert differing(rank, expected) == []
    assert rank.reloaded == []


def test_a_rank_that_joins_later_has_the_share_that_its_modules_name(
    serve: Callable[..., Any],
    free_port: Callable[[], int],
    moe_checkpoint: Path,
    moe: Stored,
    client: Callable[..., HotspareBackupClient],
) -> None:
    """It was launched as the only one of its kind, with an offset."""
    url = serve("n0", {"n0": free_port()}, checkpoint=moe_checkpoint, fill="disk").wait_ready().url
    rank = Rank(moe, shuffled(24), 2, 3)
    rank.runner.moe_ep_rank, rank.runner.moe_ep_size = 0, 1
    for module in rank.runner.model.modules():
        if hasattr(module, "w13_weight"):
            module._expert_storage_rank = 2
    expected = copies(rank)
    backup = client(rank, url)
    rank.lose()
    backup.update_weights()
    assert differing(rank, expected) == []
    assert rank.reloaded == []


def test_weights_without_scales_go_the_same_way(
    serve: Callable[..., Any],
    free_port: Callable[[], int],
    tmp_path: Path,
    client: Callable[..., HotspareBackupClient],
) -> None:
    directory = tmp_path / "bf16"
    write_checkpoint(directory, "qwen3-30b-a3b", layers=2, experts=7, scale=0.05, seed=9)
    stored = read_experts(directory)
    assert not any("scale" in name for name in stored)
    url = serve("n0", {"n0": free_port()}, checkpoint=directory, fill="disk").wait_ready().url
    for ep_rank in (0, 1):
        rank = Rank(stored, {layer: [6, 5, 4, 3, 2, 1, 0, 6] for layer in (0, 1)}, ep_rank, 2)
        expected = copies(rank)
        backup = client(rank, url)
        rank.lose()
        backup.update_weights(None)
        assert differing(rank, expected) == []


def test_slots_past_a_ranks_share_hold_shared_experts_and_are_left_alone(
    serve: Callable[..., Any],
    free_port: Callable[[], int],
    moe_checkpoint: Path,
    moe: Stored,
    client: Callable[..., HotspareBackupClient],
) -> None:
    url = serve("n0", {"n0": free_port()}, checkpoint=moe_checkpoint, fill="disk").wait_ready().url
    rank = Rank(moe, shuffled(16), 1, 2, shared=1)
    expected = copies(rank)
    backup = client(rank, url)
    rank.lose()
    backup.update_weights(None)
    assert differing(rank, expected) == []


# -- where SGLang's own client fails -----------------------------------------------------------------------------


def test_experts_that_do_not_divide_among_nodes_a_dead_node_and_a_late_rank_are_no_trouble(
    serve: Callable[..., Any],
    free_port: Callable[[], int],
    moe_checkpoint: Path,
    moe: Stored,
    client: Callable[..., HotspareBackupClient],
    wait_until: Callable[..., Any],
) -> None:
    ports = {name: free_port() for name in ("n0", "n1", "n2")}  # 13 experts a layer, on 3 nodes
    nodes = [serve(name, ports, checkpoint=moe_checkpoint, fill="disk", replicas=2) for name in ports]
    for node in nodes:
        node.wait_ready()
    wait_until(lambda: nodes[0].get("/v1/coverage")["total"]["by_replicas"]["2"] == 39, "every map")
    first, late = (Rank(moe, shuffled(16), ep_rank, 2) for ep_rank in (0, 1))
    expected = copies(first)
    backup = client(first, nodes[0].url)
    first.lose()
    backup.update_weights()
    assert differing(first, expected) == []

    nodes[2].kill()
    expected = copies(late)
    backup = client(late, nodes[0].url)  # its client did not exist when the nodes became ready
    late.lose()
    backup.update_weights()
    assert differing(late, expected) == []
    assert first.reloaded == late.reloaded == []


def test_more_ranges_than_one_tcp_batch_takes_come_from_another_node(
    serve: Callable[..., Any],
    free_port: Callable[[], int],
    tmp_path: Path,
    client: Callable[..., HotspareBackupClient],
) -> None:
    directory = tmp_path / "many"
    write_checkpoint(directory, "deepseek-v3", layers=7, experts=101, scale=0.001, seed=1)
    stored = read_experts(directory)
    assert len(stored) > 2048
    ports = {name: free_port() for name in ("n0", "n1")}
    holder = serve("n1", ports, checkpoint=directory, fill="disk", replicas=2)
    empty = serve("n0", ports, checkpoint=directory, fill="none", replicas=2)  # this host's node holds nothing yet
    holder.wait_ready()
    empty.wait_live().wait_alive("n1")
    rank = Rank(stored, {layer: list(range(101)) for layer in (3, 4, 5, 6)})
    expected = copies(rank)
    backup = client(rank, empty.url)
    rank.lose()
    backup.update_weights(None)
    assert differing(rank, expected) == []
    assert rank.reloaded == []


# -- what is missing comes from disk, as before ------------------------------------------------------------------


@pytest.mark.parametrize("release", ["0.5.12", "0.5.18", "0.5.20", "0.5.23"])
def test_experts_that_no_node_has_are_the_only_ones_reloaded_from_disk(
    serve: Callable[..., Any],
    free_port: Callable[[], int],
    moe_checkpoint: Path,
    moe: Stored,
    client: Callable[..., HotspareBackupClient],
    release: str,
) -> None:
    ports = {name: free_port() for name in ("n0", "n1")}
    here, gone = (serve(name, ports, checkpoint=moe_checkpoint, fill="disk", replicas=1) for name in ports)
    gone.wait_ready()
    here.wait_ready().wait_alive("n1")
    rank = Rank(moe, shuffled(13))
    backup = client(rank, here.url, release=release)
    held = {(e["layer"], e["expert"]) for e in here.get("/v1/shard-map?scope=node")["experts"]}
    gone.kill()
    expected = copies(rank)
    rank.lose()
    backup.update_weights()
    assert differing(rank, expected) == []
    keys = {(int(m["layer"]), int(m["expert"])) for n in rank.reloaded[0] if (m := NAME.fullmatch(n))}
    assert keys == {(layer, expert) for layer in (3, 4, 5) for expert in range(13)} - held
    assert backup.use_backup

    rank.disk_answer = (False, "the disk is gone too")
    with pytest.raises(RuntimeError, match="the disk is gone too"):
        backup.update_weights()


def test_experts_that_no_node_has_are_read_from_the_models_files_where_those_are_there(
    serve: Callable[..., Any],
    free_port: Callable[[], int],
    moe_checkpoint: Path,
    moe: Stored,
    client: Callable[..., HotspareBackupClient],
    caplog: pytest.LogCaptureFixture,
) -> None:
    ports = {name: free_port() for name in ("n0", "n1")}
    here = serve("n0", ports, checkpoint=moe_checkpoint, fill="disk", replicas=1).wait_live()  # n1 is never there
    held = {(e["layer"], e["expert"]) for e in here.wait_ready().get("/v1/shard-map?scope=node")["experts"]}
    assert 0 < len(held) < 39
    rank = Rank(moe, shuffled(16))
    rank.runner.model_config.model_path = str(moe_checkpoint)
    expected = copies(rank)
    backup = client(rank, here.url)
    rank.lose()
    with caplog.at_level("INFO", "hotspare.sglang"):
        backup.update_weights()
    assert differing(rank, expected) == []
    assert rank.reloaded == []
    assert "39 of 39 experts" in caplog.text
    assert "'disk': 0" not in caplog.text


def test_without_a_node_sglang_reloads_itself_until_one_is_there(
    serve: Callable[..., Any],
    free_port: Callable[[], int],
    moe_checkpoint: Path,
    moe: Stored,
    client: Callable[..., HotspareBackupClient],
    wait_until: Callable[..., Any],
) -> None:
    port = free_port()
    rank = Rank(moe, shuffled(13))
    backup = client(rank, f"http://127.0.0.1:{port}", ready=False)
    assert backup.use_backup is False
    expected = copies(rank)
    rank.lose()
    backup.update_weights()  # a caller that did not look is served all the same
    assert differing(rank, expected) == []
    assert rank.reloaded == [set(moe)]
    serve("n0", {"n0": port}, checkpoint=moe_checkpoint, fill="disk").wait_ready()
    wait_until(lambda: backup.use_backup, "found the node")


def test_weights_that_a_kernel_rewrote_after_binding_are_loaded_by_sglang_from_then_on(
    serve: Callable[..., Any],
    free_port: Callable[[], int],
    moe_checkpoint: Path,
    moe: Stored,
    client: Callable[..., HotspareBackupClient],
) -> None:
    url = serve("n0", {"n0": free_port()}, checkpoint=moe_checkpoint, fill="disk").wait_ready().url
    rank = Rank(moe, shuffled(13))
    backup = client(rank, url)
    next(rank.runner.model.parameters()).format_ue8m0 = True
    backup.update_weights()
    assert rank.reloaded == [set(moe)]
    assert backup._preparing is not None
    backup._preparing.join(DEADLINE_S)
    assert backup.use_backup, "so that we are asked"
    backup.update_weights(lambda name: ".experts.3." in name)
    assert rank.reloaded[1:] == [{name for name in moe if ".experts.3." in name}]


@pytest.mark.parametrize("rewritten", ["rows in turn", "other weights", "one bit"])
def test_slots_that_do_not_hold_the_models_bytes_are_never_filled_but_loaded_by_sglang(
    serve: Callable[..., Any],
    free_port: Callable[[], int],
    moe_checkpoint: Path,
    moe: Stored,
    client: Callable[..., HotspareBackupClient],
    caplog: pytest.LogCaptureFixture,
    rewritten: str,
) -> None:
    url = serve("n0", {"n0": free_port()}, checkpoint=moe_checkpoint, fill="disk").wait_ready().url
    rank = Rank(moe, shuffled(13))
    name, w13 = next((name, p.view(torch.uint8)) for name, p in rank.parameters.items() if name.endswith("w13_weight"))
    if rewritten == "rows in turn":
        w13.copy_(torch.stack(w13.clone().chunk(2, 1), 2).reshape(w13.shape))
    elif rewritten == "other weights":
        rank.lose()
    else:
        w13[-1, -1, -1] ^= 1
    backup = client(rank, url, ready=False)
    assert backup._preparing is not None
    backup._preparing.join(20)
    assert not backup._preparing.is_alive()
    before = copies(rank)
    backup.update_weights(lambda name: ".experts.7." in name)
    assert backup.use_backup
    assert {name for names in rank.reloaded for name in names} == {name for name in moe if ".experts.7." in name}
    expect(rank, before, lambda name: ".experts.7." in name)
    assert differing(rank, before) == []
    assert f"slot 12 of {name} does not hold" in caplog.text or rewritten != "one bit"
    assert "the same bytes in another order" in caplog.text or rewritten != "rows in turn"


def test_experts_that_were_being_moved_while_they_were_looked_at_are_looked_at_again(
    serve: Callable[..., Any],
    free_port: Callable[[], int],
    moe_checkpoint: Path,
    moe: Stored,
    client: Callable[..., HotspareBackupClient],
    wait_until: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("transfer.sglang.client.MISMATCHES_MAX", 3333)
    url = serve("n0", {"n0": free_port()}, checkpoint=moe_checkpoint, fill="disk").wait_ready().url
    rank = Rank(moe, shuffled(13))
    rank.lose(lambda name: ".experts.5." in name)
    backup = client(rank, url, ready=False)
    wait_until(lambda: "1 of 39" in caplog.text or "3 of 39" in caplog.text, "seen")
    assert backup.use_backup is False
    expect(rank, rank.parameters)
    wait_until(lambda: backup.use_backup, "bound")


@pytest.mark.parametrize("breaking", ["a marked parameter", "ranks", "no experts", "a draft's layer", "other memory"])
def test_what_cannot_be_filled_is_loaded_by_sglang(
    moe: Stored, client: Callable[..., HotspareBackupClient], wait_until: Callable[..., Any], breaking: str
) -> None:
    rank = Rank(moe, shuffled(16), 0, 2)
    if breaking == "a marked parameter":
        next(rank.runner.model.parameters()).is_shuffled = True
    elif breaking == "ranks":
        rank.ep_size = 3
    elif breaking == "a draft's layer":
        rank.runner.model.model.decoder = rank.runner.model.model.layers.get_submodule("3")
        del rank.runner.model.model.layers._modules["3"]
    elif breaking == "other memory":
        next(m for m in rank.runner.model.modules() if hasattr(m, "w13_weight")).register_buffer(
            "alphas", torch.ones(8)
        )
    elif breaking == "no experts":
        rank.runner.model = torch.nn.Linear(3, 3)
    backup = client(rank, NOBODY, ready=False)
    assert backup._preparing is not None
    backup._preparing.join(DEADLINE_S)
    assert not backup._preparing.is_alive()  # it does not try again
    assert backup.use_backup, "SGLang asks us, and we ask it: of a load that failed it would say nothing itself"
    rank.disk_answer = (False, "there are no files either")
    if breaking not in ("no experts", "a draft's layer"):  # which the stand-in for SGLang does not know how to load
        with pytest.raises(RuntimeError, match="there are no files either"):
            backup.update_weights()


@pytest.mark.parametrize(
    ("arguments", "keywords"),
    [
        ((), {}),
        ((types.SimpleNamespace(), types.SimpleNamespace()), {}),
        ((), {"model_config": None, "get_model": lambda: None}),
        ((), {"of_next_year": 1}),
    ],
    ids=["nothing", "a runner without ranks", "no SGLang around it", "new arguments"],
)
def test_a_process_that_is_not_sglang_as_known_gets_no_exception(
    arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    backup = HotspareBackupClient(*arguments, **keywords)
    assert backup.use_backup is False
    with pytest.raises(RuntimeError, match="reload them from disk"):
        backup.update_weights()
    backup.close()


@pytest.mark.parametrize("url", [None, "", "http://127.0.0.1:8470"])
def test_the_plugin_changes_sglang_only_where_a_node_is_named(monkeypatch: pytest.MonkeyPatch, url: str | None) -> None:
    replaced: dict[str, Any] = {}
    hooks = types.ModuleType(plugin.HOOK_REGISTRY)
    hooks.HookType = types.SimpleNamespace(REPLACE="replace", AROUND="around")  # type: ignore[attr-defined]
    hooks.HookRegistry = types.SimpleNamespace(  # type: ignore[attr-defined]
        register=lambda target, hook, kind: replaced.update({target: (hook, kind)})
    )
    monkeypatch.setitem(sys.modules, plugin.HOOK_REGISTRY, hooks)
    monkeypatch.delenv("HOTSPARE_URL", raising=False)
    if url is not None:
        monkeypatch.setenv("HOTSPARE_URL", url)
    plugin.register()
    assert replaced == (
        {
            plugin.CLIENT: (HotspareBackupClient, "replace"),
            plugin.MANAGER: (run_expert_backup_manager, "replace"),
            plugin.WEIGHTS: (load_from_memory, "around"),
            plugin.ALL_WEIGHTS: (remember_model, "around"),
            f"{plugin.RUNNER}.update_weights_from_disk": (reload_from_memory, "around"),  # here is no SGLang at all
        }
        if url
        else {}
    )


def test_sglang_starts_no_backup_process_of_its_own_and_none_of_it_is_imported(python: Callable[..., Any]) -> None:
    assert run_expert_backup_manager(None, None) is None  # type: ignore[func-returns-value]
    code, out, _ = python(
        "import sys, transfer.sglang.client; print([m for m in sys.modules if m[:6] == 'sglang'])"
    ).wait()
    assert (code, out.strip()) == (0, "[]")


@pytest.mark.parametrize("release", ["0.5.18", "0.5.23"])
def test_slots_that_belong_to_sglangs_weight_cache_are_left_alone(
    moe: Stored, client: Callable[..., HotspareBackupClient], caplog: pytest.LogCaptureFixture, release: str
) -> None:
    """Its daemon owns them, and other engines read them: what is written there, all of them see."""
    rank = Rank(moe, same_everywhere(range(13)))
    rank.runner.server_args.weight_cache_mode = "client"
    before = copies(rank)
    made = client(rank, NOBODY, ready=False, release=release)
    assert (made.use_backup, made._preparing) == (False, None)
    assert "weight cache" in caplog.text
    with pytest.raises(RuntimeError):
        made.update_weights(None)
    assert differing(rank, before) == []
