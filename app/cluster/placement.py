"""Placement: which nodes keep which expert block. Pure, and the same on every node from the same inputs.

Every node scores every block with a hash of both names, and a block goes to the `replicas` nodes that score it
highest (rendezvous hashing): a node that joins or leaves changes no score but its own, so little moves. Chance leaves
some nodes with more bytes than others. Such a node gets a *price*, taken off all its scores: it loses the blocks it
won most narrowly, to the runners-up. A few rounds of this bring every node within UNEVEN_PERCENT of even, and because
prices follow the load, two clusters that differ by one node have nearly the same prices. Where there are too few
blocks for prices to be fine enough, single blocks then go from the fullest node to the emptiest.

Only integers are compared: the answer does not depend on platform, hash seed or the order of the inputs.

Figures at DeepSeek-V3's size, 58 layers of 256 blocks of 44,050,944 bytes, 1 to 3 replicas (docs/placement.md has more,
and the command): bytes a node at most 2.0% from even, up to 64 nodes; bytes moved, as a multiple of the least that any
even placement must move, at most: 3→4 1.02, 8→9 1.03, 8→7 1.04, 16→15 1.08, 63→64 1.4.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import xxhash

from shm.block import DENSE
from shm.errors import InvalidInput
from shm.manifest import Manifest, check_name

NODES_MAX = 256
UNEVEN_PERCENT = 2  # how far a node's bytes may be from even; a smaller number moves more when the nodes change
PRICE_ROUNDS_MAX = 16  # 64 nodes with 14,848 blocks take 11 at most
MOVES_MAX = 1 << 14  # of single blocks, after that
PLACED_NBYTES_MAX = 1 << 60  # of all copies, so that sums stay within 64 bits
ROWS_AT_ONCE = 1 << 14  # whose scores are held at a time: with NODES_MAX nodes, 8 bytes each, 32 MiB
ALGORITHM = 1  # part of the digest: raise it when the same inputs would give another answer

_NODE_BITS = 8  # the low bits of a score: the node's number, so that no two scores of a row are equal
_SCORE_BITS = 61  # two scores and two prices add up within 64 bits
_PRICE_MAX = 1 << (_SCORE_BITS - 1)

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]


def _mixed(x: UInt64s) -> UInt64s:
    """Spread every bit over all 64: shifts and odd multipliers of the splitmix64 generator (Steele et al., 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: UInt64s = x ^ (x >> np.uint64(31))
    return mixed


def _row_seeds(manifest: Manifest) -> UInt64s:
    """One number a row, of its key alone: the same block scores the same in every manifest."""
    layer = manifest.rows["layer"].astype(np.int64).astype(np.uint64)
    expert = manifest.rows["expert"].astype(np.uint32).astype(np.uint64)
    return _mixed((layer << np.uint64(32)) + expert + np.uint64(0x9E3779B97F4A7C15))


def _node_seeds(nodes: tuple[str, ...]) -> UInt64s:
    return np.array([xxhash.xxh3_64_intdigest(node.encode()) for node in nodes], dtype=np.uint64)


def _scores(rows: UInt64s, seeds: UInt64s, numbers: Int64s) -> Int64s:
    """How well rows suit nodes, for seeds and numbers of nodes of any shape that broadcasts; within _SCORE_BITS."""
    high = _mixed(rows[:, None] ^ seeds) >> np.uint64(64 - _SCORE_BITS + _NODE_BITS)
    scores: Int64s = (high.astype(np.int64) << _NODE_BITS) | numbers
    return scores


@dataclass(frozen=True)
class _Market:
    """The blocks to place and the nodes that want them. `nbytes` and `rows` (seeds) are one a block."""

    nbytes: Int64s
    rows: UInt64s
    nodes: UInt64s
    replicas: int

    def bids(self, part: slice | Int64s, prices: Int64s, nodes: slice | list[int] = slice(None)) -> Int64s:
        """[blocks of `part`, nodes]: scores less prices. All of a row are distinct."""
        numbers = np.arange(len(self.nodes))[nodes]
        return _scores(self.rows[part], self.nodes[nodes], numbers) - prices[nodes]

    def best(self, prices: Int64s) -> Int64s:
        """[blocks, replicas]: the nodes that bid most, in no order."""
        chosen = np.empty((len(self.rows), self.replicas), dtype=np.int64)
        for first in range(0, len(self.rows), ROWS_AT_ONCE):
            part = slice(first, first + ROWS_AT_ONCE)
            chosen[part] = np.argpartition(self.bids(part, prices), -self.replicas)[:, -self.replicas :]
        return chosen

    def surplus(self, chosen: Int64s) -> list[int]:
        """Bytes a node above even, times the number of nodes: whole numbers, that add up to 0."""
        load = np.zeros(len(self.nodes), dtype=np.int64)
        np.add.at(load, chosen, self.nbytes[:, None])
        return [nbytes * len(self.nodes) - self.total for nbytes in load.tolist()]

    @cached_property
    def total(self) -> int:
        """Bytes of all copies."""
        return int(self.nbytes.sum()) * self.replicas

    @property
    def slack(self) -> int:
        """The surplus that is let be."""
        return self.total * UNEVEN_PERCENT // 100


def _clear(market: _Market) -> tuple[Int64s, Int64s]:
    """The most even choice that prices reach, [blocks, replicas], and those prices."""
    count = len(market.nodes)
    prices, best = np.zeros(count, dtype=np.int64), None
    enough = max(market.slack, count * int(market.nbytes.max(initial=0)))  # no price can split a block
    for _ in range(PRICE_ROUNDS_MAX):
        chosen = market.best(prices)
        surplus = market.surplus(chosen)
        uneven = max(map(abs, surplus))
        if best is None or uneven < best[0]:
            best = uneven, chosen, prices
        if uneven <= enough:
            break
        # A price of a fraction f of the score range costs a node about f of all blocks. Half a step, for all take
        # theirs at once: whole ones swing past even.
        steps = [(extra * market.replicas << _SCORE_BITS) // (2 * market.total * count) for extra in surplus]
        wanted = [price + step for price, step in zip(prices.tolist(), steps, strict=True)]
        bounded = [min(max(price, -_PRICE_MAX), _PRICE_MAX) >> _NODE_BITS << _NODE_BITS for price in wanted]
        prices = np.array(bounded, dtype=np.int64)
    assert best is not None
    return best[1], best[2]


def _even_out(market: _Market, chosen: Int64s, prices: Int64s) -> None:
    """Move single blocks, in `chosen` itself, until even enough or no block is small enough to help."""
    surplus = market.surplus(chosen)
    for _ in range(MOVES_MAX):
        full, empty = surplus.index(max(surplus)), surplus.index(min(surplus))
        if max(surplus[full], -surplus[empty]) <= market.slack:
            return
        gap = (surplus[full] - surplus[empty]) // len(market.nodes)
        movable = (chosen == full).any(axis=1) & (chosen != empty).all(axis=1) & (market.nbytes < gap)
        blocks = np.flatnonzero(movable)
        if not len(blocks):
            return
        bids = market.bids(blocks, prices, [full, empty])
        block = int(blocks[(bids[:, 0] - bids[:, 1]).argmin()])
        chosen[block, chosen[block] == full] = empty
        surplus[full] -= int(market.nbytes[block]) * len(market.nodes)
        surplus[empty] += int(market.nbytes[block]) * len(market.nodes)


def _in_order(chosen: Int64s, rows: UInt64s, nodes: UInt64s) -> Int64s:
    """Each row's nodes by falling score, so that first replicas spread over the nodes too."""
    return np.take_along_axis(chosen, np.argsort(-_scores(rows, nodes[chosen], chosen), axis=1), axis=1)


def _checked(manifest: Manifest, nodes: Iterable[str], replicas: int) -> tuple[str, ...]:
    distinct = tuple(sorted({check_name("node", node) for node in nodes}))
    if not 0 < len(distinct) <= NODES_MAX:
        raise InvalidInput(f"{len(distinct)} nodes to place {manifest.model} on: name 1 to {NODES_MAX}")
    if not 0 < replicas <= len(distinct):
        raise InvalidInput(
            f"{replicas} replicas on {len(distinct)} nodes ({', '.join(distinct[:8])}"
            f"{', …' if len(distinct) > 8 else ''}): ask for 1 to {len(distinct)}, or add nodes"
        )
    if sum(manifest.nbytes.tolist()) * replicas > PLACED_NBYTES_MAX:
        raise InvalidInput(f"{replicas} replicas of {manifest.model} are more than {PLACED_NBYTES_MAX} bytes")
    return distinct


@dataclass(frozen=True, eq=False)
class Placement:
    """Where every block of a manifest belongs. Build with `Placement.compute`.

    Dense blocks belong on every node, experts on `replicas` distinct ones.
    """

    nodes: tuple[str, ...]
    """Sorted, distinct."""
    replicas: int
    digest: str
    """xxh3-128, hex, of the inputs and the answer: equal on two nodes exactly if they place alike."""
    _chosen: Int64s = field(repr=False)
    _dense: npt.NDArray[np.bool_] = field(repr=False)
    _row_seeds: UInt64s = field(repr=False)

    @classmethod
    def compute(cls, manifest: Manifest, nodes: Iterable[str], replicas: int) -> Placement:
        """Place every block of `manifest`.

        Raises InvalidInput without nodes, with more than NODES_MAX, and for `replicas` outside 1 … number of nodes.
        """
        distinct = _checked(manifest, nodes, replicas)
        rows, node_seeds = _row_seeds(manifest), _node_seeds(distinct)
        dense = manifest.rows["expert"] == DENSE
        experts = np.flatnonzero(~dense)
        market = _Market(manifest.nbytes[experts], rows[experts], node_seeds, replicas)
        placed, prices = _clear(market)
        _even_out(market, placed, prices)
        chosen = np.full((len(manifest), replicas), -1, dtype=np.int64)
        chosen[experts] = _in_order(placed, rows[experts], node_seeds)
        chosen.setflags(write=False)
        inputs = json.dumps([ALGORITHM, manifest.digest, distinct, replicas]).encode()
        digest = xxhash.xxh3_128_hexdigest(inputs + chosen.astype("<i8").tobytes())
        return cls(distinct, replicas, digest, chosen, dense, rows)

    def nodes_of(self, index: int) -> tuple[str, ...]:
        """The nodes that keep manifest row `index`, the best first, each once; raises InvalidInput for no such row."""
        if not 0 <= index < len(self._chosen):
            raise InvalidInput(f"row {index} is not in the manifest, which has rows 0 to {len(self._chosen) - 1}")
        if self._dense[index]:
            everywhere = np.arange(len(self.nodes))[None, :]
            order = _in_order(everywhere, self._row_seeds[index : index + 1], _node_seeds(self.nodes))
            return tuple(self.nodes[i] for i in order[0].tolist())
        return tuple(self.nodes[i] for i in self._chosen[index].tolist())

    def rows_of(self, node: str) -> Int64s:
        """The manifest rows placed on `node`, ascending; raises InvalidInput for a node that is not placed on."""
        if node not in self.nodes:
            raise InvalidInput(f"node {node!r} is not among those placed on: {', '.join(self.nodes)}")
        return np.flatnonzero(self._dense | (self._chosen == self.nodes.index(node)).any(axis=1))
