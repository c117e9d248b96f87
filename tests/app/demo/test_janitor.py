"""Who cleans up after the demo, whatever becomes of it."""

from __future__ import annotations

from pathlib import Path

from app.demo.janitor import sweep


def test_the_janitor_removes_its_own_and_nothing_else(tmp_path: Path, namespace: str) -> None:
    prefix = f"hotspare.{namespace}."
    ours, others = Path(f"/dev/shm/{prefix}m.a"), Path(f"/dev/shm/{prefix[:-1]}0.m.a")
    directory = tmp_path / "d"
    (directory / "deep").mkdir(parents=True)
    try:
        for path in (ours, others):
            path.write_bytes(b"x" * 333)
        assert sweep(prefix, str(directory))
        assert (ours.exists(), others.exists(), directory.exists()) == (False, True, False)
        assert not sweep(prefix, str(directory))
    finally:
        for path in (ours, others):
            path.unlink(missing_ok=True)
