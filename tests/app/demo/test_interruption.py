"""Stopping the demo on a signal, where it is safe."""

from __future__ import annotations

import signal

import pytest

from app.demo.interruption import Interrupted, Interruption


def test_an_interruption_waits_for_a_safe_point_or_comes_at_once_where_allowed() -> None:
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted):
            interruption.check()
        with pytest.raises(Interrupted), interruption.at_once():
            pytest.fail("it had come before")
    with Interruption() as interruption, pytest.raises(Interrupted), interruption.at_once():
        signal.raise_signal(signal.SIGHUP)


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interruption():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
