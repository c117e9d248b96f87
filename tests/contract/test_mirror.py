"""Tests mirror modules: what a module promises is proved in the file of its name, where whoever changes it looks."""

from __future__ import annotations

from pathlib import PurePath

import pytest

from tests.processes import ROOT

# Modules that need no file of their own, since they are proved by what uses them: where.
PROVED_ELSEWHERE = {
    "*/errors.py": "tests/app/api/test_problems.py",
    "app/version.py": "tests/contract/test_package.py",
    "app/cli/__main__.py": "tests/app/cli/test_main.py",
    "app/cli/commands/connection.py": "tests/app/cli/commands/test_status.py",
    "app/cli/commands/demo.py": "tests/app/demo/test_story.py",
    "app/cli/commands/serve.py": "tests/app/cli/test_daemon.py",
    "app/demo/rank_process.py": "tests/app/demo/test_story.py",
    "app/api/context.py": "tests/app/api/test_application.py",
    "app/api/routes/*.py": "tests/contract/test_api.py",
    "app/cluster/cluster.py": "tests/app/cluster/test_prober.py",
    "app/restores/*.py": "tests/app/restores/test_store.py",
    "shm/block.py": "tests/shm/test_manifest.py",
    "shm/checksum.py": "tests/shm/test_segment.py",
    "shm/pinning.py": "tests/shm/test_attachment.py",
    "shm/posix.py": "tests/shm/test_segment.py",
    "shm/twin.py": "tests/shm/test_damage.py",
    "transfer/destination.py": "tests/app/node/test_destination.py",
    "transfer/standing.py": "tests/transfer/test_ledger.py",
    "transfer/checkpoint/recipes.py": "tests/transfer/checkpoint/test_synth.py",
    "transfer/client/*.py": "tests/transfer/client/test_restorer.py",
    "transfer/cuda/*.py": "tests/transfer/cuda/test_slots.py",
    "transfer/push/*.py": "tests/transfer/push/test_push.py",
    "transfer/sglang/*.py": "tests/transfer/sglang/test_client.py",
    "transfer/vllm/experts.py": "tests/transfer/vllm/test_reload.py",
    "transfer/vllm/worker.py": "tests/engines/vllm/test_release.py",
    "transfer/slots/layouts.py": "tests/transfer/slots/test_slots.py",
}
MODULES = sorted(
    path.relative_to(ROOT)
    for package in ("app", "shm", "transfer")
    for path in (ROOT / package).rglob("*.py")
    if path.name != "__init__.py"
)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_has_a_test_file_of_its_name_or_is_known_to_be_proved_elsewhere(module: PurePath) -> None:
    mirror = ROOT / "tests" / module.parent / f"test_{module.name}"
    elsewhere = [where for pattern, where in PROVED_ELSEWHERE.items() if module.match(pattern)]
    assert mirror.exists() or elsewhere, f"write {mirror.relative_to(ROOT)}"
    assert all((ROOT / where).exists() for where in elsewhere)
