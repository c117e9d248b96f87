"""Who is asked for which block where replicas agree, where they disagree, and where we know better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from transfer.offers import Holder, Offers, offers
from transfer.plan import Offer

A, B, C = (letter * 16 for letter in (b"a", b"b", b"c"))


@dataclass(frozen=True, eq=False)
class Place:
    name: str


def sort_out(has: Mapping[str, bytes | None], expected: bytes | None = None) -> tuple[Offers, dict[str, Place]]:
    """Of one row, 7, which each of these holders has with that checksum."""
    places = {name: Place(name) for name in has}
    holders = [Holder(places[name], {7: (33, checksum)}) for name, checksum in has.items()]
    return offers([7], holders, {} if expected is None else {7: expected}), places


def taken(found: Offers) -> list[str]:
    return [offer.source.name for offer in found.by_row[7]]  # type: ignore[attr-defined]


def test_replicas_that_agree_are_all_taken_and_tell_the_checksum() -> None:
    found, places = sort_out({"x": A, "y": A, "disk": None})
    assert found.by_row[7] == [Offer(place, 33) for place in places.values()]
    assert (found.expected, found.aside) == ({7: A}, {})


def test_what_is_on_our_own_record_decides_against_any_number() -> None:
    found, _ = sort_out({"x": B, "y": B, "z": A, "disk": None}, expected=A)
    assert taken(found) == ["z", "disk"]
    assert found.expected == {7: A}
    assert found.aside == {7: ("x", "y")}


def test_the_content_that_more_than_half_have_is_taken() -> None:
    found, _ = sort_out({"x": A, "y": B, "z": A})
    assert taken(found) == ["x", "z"]
    assert found.expected == {7: A}
    assert found.left_aside == {"y": 1}
    assert found.reasons == {7: "left aside, for other content than is wanted: y"}


def test_where_no_content_has_more_than_half_only_the_disk_serves_and_gives_the_checksum() -> None:
    for has in ({"x": A, "y": B}, {"x": A, "y": A, "z": B, "w": C}, {"x": A, "y": B, "z": C}):
        found, _ = sort_out({**has, "disk": None})
        assert taken(found) == ["disk"]
        assert found.expected == {}
        assert found.aside == {7: tuple(has)}


def test_the_disk_alone_has_no_say() -> None:
    found, _ = sort_out({"disk": None})
    assert taken(found) == ["disk"]
    assert found.expected == {}


def test_a_row_that_nobody_has_has_no_offers_and_keeps_what_we_know_of_it() -> None:
    found = offers([3, 4], [], {3: A})
    assert (found.by_row, found.expected, found.aside) == ({3: [], 4: []}, {3: A}, {})


def test_two_holders_of_one_name_are_two_sources() -> None:
    """A node may be called `disk`."""
    node, disk = Place("disk"), Place("disk")
    found = offers([7], [Holder(node, {7: (1, A)}), Holder(disk, {7: (2, None)})], {})
    assert found.by_row[7] == [Offer(node, 1), Offer(disk, 2)]
    assert found.by_row[7][0].source is not found.by_row[7][1].source


@given(st.lists(st.sampled_from([A, B, C, None]), max_size=7), st.sampled_from([None, A, B]))
def test_whatever_they_say_one_content_is_offered_at_most_and_nobody_is_passed_over_in_silence(
    said: list[bytes | None], expected: bytes | None
) -> None:
    found, _ = sort_out({str(number): checksum for number, checksum in enumerate(said)}, expected)
    checksums = {said[int(name)] for name in taken(found)} - {None}
    assert len(checksums) <= 1
    assert checksums <= set(found.expected.values())
    assert sorted([*taken(found), *found.aside.get(7, ())]) == sorted(str(n) for n in range(len(said)))
    if expected is not None:
        assert found.expected == {7: expected}
