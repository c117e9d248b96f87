from __future__ import annotations

import threading

from shm.block import ExpertKey
from transfer.progress import FailedBlock, Progress, RestoreState
from transfer.sources import SourceKind


def test_it_goes_from_pending_to_running_to_its_end() -> None:
    progress = Progress()
    assert progress.report().state is RestoreState.PENDING
    assert progress.report().started_at is None
    progress.start(7, 3333)
    running = progress.report()
    assert (running.state, running.blocks_total, running.bytes_total) == (RestoreState.RUNNING, 7, 3333)
    assert running.started_at is not None
    assert running.started_at >= running.created_at
    progress.finish(RestoreState.SUCCEEDED)
    ended = progress.report()
    assert ended.ok
    assert ended.finished_at is not None
    assert ended.started_at == running.started_at
    assert ended.finished_at >= ended.started_at


def test_it_ends_once() -> None:
    progress = Progress()
    progress.start(1, 1)
    progress.finish(RestoreState.FAILED, "the first word")
    progress.finish(RestoreState.SUCCEEDED)
    assert (progress.report().state, progress.report().error) == (RestoreState.FAILED, "the first word")


def test_one_that_was_cancelled_before_it_began_does_not_begin() -> None:
    progress = Progress()
    progress.finish(RestoreState.CANCELLED, "cancelled before it began")
    progress.start(7, 3333)
    assert progress.report().state is RestoreState.CANCELLED
    assert progress.report().started_at is None


def test_bytes_are_counted_by_source_and_add_up() -> None:
    progress = Progress()
    progress.start(3, 333)
    progress.done(SourceKind.PEER, 100)
    progress.done(SourceKind.DISK, 30)
    progress.done(SourceKind.PEER, 3)
    report = progress.report()
    assert report.bytes_by_source == {"local": 0, "peer": 103, "disk": 30}
    assert (report.blocks_done, report.bytes_done) == (3, 133)


def test_a_report_does_not_change_afterwards() -> None:
    progress = Progress()
    progress.start(2, 2)
    before = progress.report()
    progress.done(SourceKind.DISK, 1)
    progress.fail([FailedBlock(ExpertKey(3, 7), "gone")])
    assert (before.blocks_done, before.bytes_by_source["disk"], before.failed) == (0, 0, ())


def test_threads_lose_no_count() -> None:
    progress = Progress()
    progress.start(8 * 3333, 8 * 3333 * 7)

    def work() -> None:
        for _ in range(3333):
            progress.done(SourceKind.PEER, 7)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report = progress.report()
    assert (report.blocks_done, report.bytes_done) == (report.blocks_total, report.bytes_total)


def test_only_three_states_are_final() -> None:
    assert {s for s in RestoreState if s.is_final} == {
        RestoreState.SUCCEEDED,
        RestoreState.FAILED,
        RestoreState.CANCELLED,
    }
