"""What tests of a node's parts share: a holding, with no node around it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from app.cluster.placement import Placement
from app.node.holding import Holding
from app.node.proofs import Proofs
from shm.manifest import Manifest
from shm.segment import Segment


@pytest.fixture
def holding(sealed: Callable[..., Segment], make_manifest: Callable[..., Manifest]) -> Holding:
    """A small segment, sealed, that a node alone has."""
    manifest = make_manifest()
    placement = Placement.compute(manifest, ("n0",), 1)
    segment = sealed("n0", manifest)
    return Holding("n0", segment, manifest, placement, bytes(16), None, Proofs(len(manifest)), ())
