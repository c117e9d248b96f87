"""One scheduler rank of a real SGLang, as far as it goes without a GPU: its arguments, its process groups, its expert
modules and placement, its model runner's line that makes a backup client, its rebalance that calls one.

Run once for each rank, all at the same time. Fills the experts through SGLang's own client and manager, then through
Hotspare's in its place, and prints what differed as one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

import torch
import zmq
from sglang.srt import runtime_context
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import parallel_state
from sglang.srt.distributed.device_communicators.mooncake_transfer_engine import init_mooncake_transfer_engine
from sglang.srt.elastic_ep import expert_backup_manager
from sglang.srt.eplb import eplb_manager, expert_location
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.managers.io_struct import UpdateExpertBackupReq, sock_send
from sglang.srt.model_executor import model_runner
from sglang.srt.models.deepseek_v2 import DeepseekV3ForCausalLM
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs

from transfer.sglang import HotspareBackupClient

HOST = "127.0.0.1"
WAIT_S = 120.0
SUBSCRIBED_S = 1.0  # after its clients were made, a publisher of this host knows them

Parameters = dict[str, torch.Tensor]


class Model(torch.nn.Module):
    """Expert modules and nothing else; names of lost experts are told from others as SGLang's DeepSeek does."""

    generate_weight_name_filter = DeepseekV3ForCausalLM.generate_weight_name_filter
    routed_experts_weights_of_layer: dict[int, Any] = {}  # noqa: RUF012


class Runner:
    """What `ModelRunner.maybe_init_expert_backup_client` touches of a model runner."""

    def __init__(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        self.model = model
        self.model_config = model_config
        self.expert_backup_client: Any = None
        self.reloads = 0
        self.weight_updater = types.SimpleNamespace(update_weights_from_disk=self._reload)

    def make_client(self) -> Any:
        model_runner.ModelRunner.maybe_init_expert_backup_client(self)
        return self.expert_backup_client

    def _reload(self, *_: Any, **__: Any) -> tuple[bool, str]:
        self.reloads += 1
        return False, "this runner has no loader"


def arguments_of(options: argparse.Namespace, world: int) -> ServerArgs:
    return ServerArgs(
        model_path=str(options.checkpoint),
        device="cpu",
        tp_size=world,
        ep_size=world,
        skip_tokenizer_init=True,
        elastic_ep_backend="mooncake",
        enable_elastic_expert_backup=True,
        enable_eplb=True,
        ep_num_redundant_experts=options.redundant,
        moe_runner_backend="triton",
        attention_backend="torch_native",
    )


def start_manager(options: argparse.Namespace) -> Any:
    """SGLang's backup process. It publishes its map once, when as many clients as there are ranks said that they are
    ready, and a client says so before it is sure to hear the answer: for more ranks than there are, it waits for us."""
    return expert_backup_manager.run_expert_backup_manager(arguments_of(options, 2 * options.world), None)


def let_manager_publish(options: argparse.Namespace) -> None:
    """Say that the ranks which there are not are ready, now that all others listen."""
    torch.distributed.barrier()
    time.sleep(SUBSCRIBED_S)
    if options.rank == 0:
        ready = zmq.Context.instance().socket(zmq.PUSH)
        ready.connect(f"tcp://{HOST}:{expert_backup_manager.PORT_BASE}")
        for _ in range(options.world):
            sock_send(ready, UpdateExpertBackupReq())


def start_groups(options: argparse.Namespace) -> None:
    parallel_state.init_distributed_environment(
        backend="gloo",
        world_size=options.world,
        rank=options.rank,
        local_rank=options.rank,
        distributed_init_method=f"tcp://{HOST}:{options.port}",
    )
    init_mooncake_transfer_engine(hostname=HOST, gpu_id=0, ib_device=None)


def build_model(model_config: ModelConfig, redundant: int) -> torch.nn.Module:
    """The expert modules of each layer, where the model has them; their weights are whatever memory holds."""
    config = model_config.hf_config
    experts = getattr(config, "n_routed_experts", None) or config.num_experts
    quantisation = model_runner_quantisation(model_config)
    root = Model()
    root.model = torch.nn.Module()
    root.model.layers = torch.nn.ModuleList()
    for layer in range(config.num_hidden_layers):
        block = torch.nn.Module()
        if layer >= getattr(config, "first_k_dense_replace", 0):
            block.mlp = torch.nn.Module()
            block.mlp.experts = FusedMoE(
                num_experts=experts + redundant,
                hidden_size=config.hidden_size,
                intermediate_size=config.moe_intermediate_size,
                layer_id=layer,
                top_k=config.num_experts_per_tok,
                params_dtype=torch.bfloat16,
                quant_config=quantisation,
                prefix=f"model.layers.{layer}.mlp.experts",
            )
        root.model.layers.append(block)
    return root


def model_runner_quantisation(model_config: ModelConfig) -> Any:
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    found = getattr(model_config.hf_config, "quantization_config", None)
    return None if found is None else Fp8Config.from_config(found)


def place(model_config: ModelConfig, rank: int, seed: int) -> None:
    """Another placement, each logical expert at least once."""
    config = expert_location.ModelConfigForExpertLocation.from_model_config(model_config)
    chosen = torch.Generator().manual_seed(seed)
    logical = config.num_logical_experts
    redundant = runtime_context.get_exec().moe.ep_num_redundant_experts
    rows = []
    for _ in range(config.num_layers):
        spare = torch.randint(0, logical, (redundant,), generator=chosen)
        everyone = torch.cat([torch.arange(logical), spare])
        rows.append(everyone[torch.randperm(logical + redundant, generator=chosen)])
    placed = expert_location.ExpertLocationMetadata.init_by_mapping(model_config, torch.stack(rows), moe_ep_rank=rank)
    expert_location.set_global_expert_location_metadata(placed, allow_overwrite=True)


def parameters_of(model: torch.nn.Module) -> Parameters:
    return {name: p.data.view(torch.uint8) for name, p in model.named_parameters()}


def spoil(model: torch.nn.Module, seed: int) -> Parameters:
    """Overwrite everything with noise, and return it."""
    noise = torch.Generator().manual_seed(seed)
    for tensor in parameters_of(model).values():
        tensor.random_(0, 256, generator=noise)
    return snapshot(model)


def snapshot(model: torch.nn.Module) -> Parameters:
    return {name: tensor.clone() for name, tensor in parameters_of(model).items()}


def differing(one: Parameters, other: Parameters) -> int:
    """Bytes that differ."""
    return sum(int((tensor != other[name]).sum()) for name, tensor in one.items())


def wait_for(client: Any) -> None:
    """Until it can be used. SGLang's own says so before its thread has registered any memory."""
    deadline = time.monotonic() + WAIT_S
    receiving = getattr(client, "_receive_thread", None)
    while not client.use_backup or (receiving is not None and receiving.is_alive()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{type(client).__name__} was not ready within {WAIT_S:.0f} s")
        time.sleep(0.05)


def recover(runner: Runner, client: Any, lost: dict[int, list[int]]) -> None:
    """SGLang's own rebalance, with an updater that finds these experts of these layers on no rank that lives."""
    eplb_manager.update_expert_location_with_recovery(
        expert_location_updater=types.SimpleNamespace(update=lambda *_, **__: lost),
        model=runner.model,
        new_expert_location_metadata=expert_location.get_global_expert_location_metadata(),
        update_layer_ids=[],
        tp_rank=runtime_context.get_parallel().tp_rank,
        expert_backup_client=client,
        update_weights_from_disk_callable=runner.weight_updater.update_weights_from_disk,
        ep_dispatch_algorithm="static",
        init_lplb_solvers_callable=lambda: None,
    )


def compare(runner: Runner, theirs: Any, ours: Any, lost: dict[int, list[int]]) -> dict[str, int]:
    """Lose and recover experts with one client and with the other: bytes that were recovered, and that differ."""
    filled = []
    for client in (theirs, ours):
        noise = spoil(runner.model, seed=7)
        recover(runner, client, lost)
        filled.append(snapshot(runner.model))
    return {"recovered": differing(filled[0], noise), "differing": differing(filled[0], filled[1])}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path, required=True)
    for name in ("--rank", "--world", "--port", "--redundant"):
        parser.add_argument(name, type=int, required=True)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)

    arguments = arguments_of(options, options.world)
    runtime_context.publish(arguments, role="scheduler", ranks=runtime_context.SpawnRanks(world_rank=options.rank))
    # In a deployment a launcher starts it, which has no transfer engine of its own that would be forked.
    manager = start_manager(options) if options.rank == 0 else None
    try:
        start_groups(options)
        model_config = ModelConfig.from_server_args(arguments)
        runner = Runner(build_model(model_config, options.redundant), model_config)
        theirs = runner.make_client()
        load_plugins()  # a scheduler does so first of all, which leaves no client of SGLang's own to compare with
        place(model_config, options.rank, seed=0)
        assert expert_backup_manager.run_expert_backup_manager(arguments, None) is None
        let_manager_publish(options)
        wait_for(theirs)
        # An engine has loaded its weights by then, and ours binds to nothing else: SGLang's own client loads them here.
        logical = expert_location.get_global_expert_location_metadata().num_logical_experts
        layers = range(model_config.hf_config.num_hidden_layers)
        recover(runner, theirs, {layer: list(range(logical)) for layer in layers})
        ours = runner.make_client()
        assert isinstance(ours, HotspareBackupClient)
        wait_for(ours)

        found: dict[str, Any] = {"parameters": sum(t.nbytes for t in parameters_of(runner.model).values())}
        found["all"] = compare(runner, theirs, ours, {layer: list(range(logical)) for layer in layers})
        place(model_config, options.rank, seed=1)
        found["placed anew"] = compare(runner, theirs, ours, {layer: list(range(logical)) for layer in layers})
        some = {layer: [(layer + step) % logical for step in (0, 5, 6)] for layer in layers}
        found["some"] = compare(runner, theirs, ours, some)

        torch.distributed.barrier()
        if manager is not None:
            manager.kill()
            manager.join()
        torch.distributed.barrier()
        try:
            recover(runner, theirs, some)
            found["without its manager"] = "recovered"
        except RuntimeError as error:
            found["without its manager"] = str(error)
        noise = spoil(runner.model, seed=8)
        recover(runner, ours, some)
        found["without their manager"] = differing(noise, snapshot(runner.model))
        found["reloads"] = runner.reloads
        ours.close()
        sys.stdout.write(json.dumps(found) + "\n")
        torch.distributed.barrier()
    finally:
        if manager is not None:
            manager.kill()
            manager.join()
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # SGLang's client has threads that never end
