"""What holds for every command: wrong use, failures and help; and tracebacks, which only who asks for them sees."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from app.cli.main import main
from tests.processes import ROOT

Hotspare = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["serve", "--replicas", "many"],
        ["serve"],
        ["serve", "--model", "m", "--fill", "sideways"],
        ["serve", "--model", "m", "--listen", "nowhere"],
        ["serve", "--model", "m", "--listen", "0.0.0.0:0"],
        ["serve", "--model", "m", "--replicas", "3"],
        ["serve", "--model", "x" * 300],
        ["serve", "--model", "m", "--log-level", "loud"],
        ["serve", "--model", "m", "--config", "/does/not/exist.toml"],
        ["restore"],
        ["restore", "--node", "a", "--consumer", "b"],
        ["restore", "--node", "a", "--source", "tape"],
        ["restore", "--node", "a", "--read-back"],
        ["restore", "--node", "a", "--layer", "-1"],
        ["restore", "--node", "a", "--url", "not a url"],
        ["status", "--url", "ftp://a"],
        ["rm"],
        ["rm", "--all", "model"],
        ["synth", "/tmp/never-made"],
        ["synth", "/tmp/never-made", "--like", "no-such-model"],
        ["synth", "/tmp/never-made", "--like", "deepseek-v3", "--scale", "2"],
        ["demo", "--size-gib", "0"],
    ],
)
def test_wrong_use_is_a_line_on_stderr_and_exit_code_2(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["hotspare", *arguments])
    with pytest.raises(SystemExit) as exited:
        main()
    said = capsys.readouterr()
    assert exited.value.code == 2, said
    assert said.err
    assert "Traceback" not in said.err
    assert said.out == ""


def test_wrong_use_is_exit_code_2_of_the_process_too(hotspare_anew: Hotspare) -> None:
    done = hotspare_anew("serve")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_every_command_of_the_contract_has_help(hotspare: Hotspare) -> None:
    overview = hotspare("--help")
    for command in ("serve", "status", "restore", "ls", "rm", "verify", "synth", "demo"):
        assert command in overview.stdout
        done = hotspare(command, "--help")
        assert done.returncode == 0
        assert "Usage" in done.stdout


def test_a_traceback_is_shown_only_when_asked_for(hotspare: Hotspare) -> None:
    arguments = ["serve", "--model", "m", "--config", "/does/not/exist.toml"]
    assert "Traceback" not in hotspare(*arguments).stderr
    assert "Traceback" in hotspare(*arguments, HOTSPARE_DEBUG="1").stderr


def test_an_error_that_nobody_foresaw_is_named_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("3333")

    monkeypatch.setattr("app.cli.main.cli", fail)
    with pytest.raises(SystemExit) as exited:
        main()
    said = capsys.readouterr().err
    assert exited.value.code == 1
    assert "unexpected ZeroDivisionError: 3333; HOTSPARE_DEBUG=1 shows where" in said
    assert "Traceback" not in said


def test_the_version_is_told(hotspare: Hotspare) -> None:
    from app.version import VERSION

    assert hotspare("--version").stdout == f"hotspare {VERSION}\n"


def test_output_that_nobody_takes_is_a_failure_without_a_traceback() -> None:
    for redirection, code in ((">/dev/full", 1), (">/dev/full 2>&1", 1), (">&-", 0), ("2>&-", 0)):
        for arguments in ("ls", "--version"):
            done = subprocess.run(
                ["sh", "-c", f'"$@" {arguments} {redirection}', "sh", sys.executable, "-m", "app.cli"],
                capture_output=True, text=True, cwd=ROOT, check=False, env=os.environ | {"PYTHONUNBUFFERED": ""},
            )  # fmt: skip
            assert done.returncode == code, (redirection, arguments, done.stderr)
            assert "Traceback" not in done.stderr
            assert "Exception ignored" not in done.stderr
