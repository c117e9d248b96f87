"""Breaking code on purpose: what is noticed, what is not, and when nothing can be said."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from tests.processes import ROOT
from tools import mutate
from tools.mutate import MUTATIONS, Mutation, Outcome, Unusable, broken, chosen, copy_of_the_checkout, try_out

ENTRY = """
[[mutation]]
name = "half"
promise = "a half is less than the whole"
file = "sums.py"
old = "n / 2"
new = "n * 2"
tests = ["test_sums.py"]
"""
HALF = Mutation("half", "a half is less than the whole", "sums.py", "n / 2", "n * 2", ("test_sums.py",))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A module, a test that sees what becomes of it, and one that does not."""
    (tmp_path / "sums.py").write_text("def half(n):\n    return n / 2\n")
    (tmp_path / "test_sums.py").write_text("import sums\ndef test_half():\n    assert sums.half(6) == 3\n")
    (tmp_path / "test_blind.py").write_text("import sums\ndef test_nothing():\n    sums.half(6)\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_whole.py").write_text("import sums\ndef test_half():\n    assert sums.half(8) == 4\n")
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\npythonpath = ['.']\n")
    return tmp_path


def test_the_list_fits_the_code() -> None:
    """Mend tools/mutations.toml where this fails: code has moved."""
    wrong = []
    for each in mutate.read_mutations(MUTATIONS.read_text()):
        path = ROOT / each.file
        if (path.read_text() if path.is_file() else "").count(each.old) != 1:
            wrong.append(f"{each.name}: {each.file} does not have its old text once")
        files = {test.partition("::")[0] for test in each.tests}
        wrong += [f"{each.name}: there is no {file}" for file in files if not (ROOT / file).exists()]
    assert wrong == []


def test_an_edit_that_a_test_notices_is_killed_by_it(checkout: Path) -> None:
    outcome = try_out(checkout, HALF, whole=False)
    assert (outcome.verdict, outcome.error) == ("test_sums.py::test_half", "")
    assert "n / 2" in (checkout / "sums.py").read_text(), "it is put back"


def test_an_edit_that_kills_the_tests_own_process_is_noticed(checkout: Path) -> None:
    fatal = Mutation(**{**vars(HALF), "new": "__import__('os').abort()"})
    assert try_out(checkout, fatal, whole=False).verdict == "died of SIGABRT"


def test_an_edit_that_no_test_notices_survives_until_the_whole_suite_is_asked(checkout: Path) -> None:
    blind = Mutation(**{**vars(HALF), "tests": ("test_blind.py",)})
    assert try_out(checkout, blind, whole=False).verdict == "SURVIVED"
    assert try_out(checkout, blind, whole=True).verdict == "tests/test_whole.py::test_half"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"old": "n / 3"}, "has its old text 0 times"),
        ({"old": "n"}, "has its old text 3 times"),
        ({"file": "products.py"}, "has its old text 0 times"),
        ({"tests": ("test_products.py",)}, "there is no test_products.py"),
        ({"new": "n / / 2"}, "pytest ended with 2"),
    ],
    ids=["text gone", "text not alone", "no file", "no test", "no Python any more"],
)
def test_an_edit_that_proves_nothing_is_an_error_and_no_kill(
    checkout: Path, changes: dict[str, object], says: str
) -> None:
    outcome = try_out(checkout, Mutation(**{**vars(HALF), **changes}), whole=False)  # type: ignore[arg-type]
    assert says in outcome.error
    assert outcome.killed_by == ""
    assert mutate.report([outcome]) == 1


def test_the_file_is_put_back_whatever_happens(checkout: Path) -> None:
    with suppress(ZeroDivisionError), broken(checkout, HALF):
        assert "n * 2" in (checkout / "sums.py").read_text()
        raise ZeroDivisionError
    assert "n / 2" in (checkout / "sums.py").read_text()


def test_only_a_list_without_survivors_is_a_success(capsys: pytest.CaptureFixture[str]) -> None:
    killed, survivor = Outcome("a", "test_a"), Outcome("b")
    assert mutate.report([killed]) == 0
    assert mutate.report([killed, survivor]) == 1
    assert "score: 1 of 2 edits were noticed\n  b: SURVIVED\n" in capsys.readouterr().out


def test_a_list_is_read_and_its_entries_chosen_by_name() -> None:
    (read,) = mutate.read_mutations(ENTRY)
    assert read == HALF
    assert chosen([read], []) == chosen([read], ["half"]) == [HALF]
    with pytest.raises(Unusable, match="there is no whole"):
        chosen([read], ["whole"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (ENTRY + ENTRY, "given twice: half"),
        (ENTRY.replace('file = "sums.py"\n', ""), "half: it needs file, name"),
        (ENTRY + "why = 3\n", "half: it needs file, name"),
    ],
    ids=["a name twice", "a field less", "a field more"],
)
def test_a_list_that_is_not_right_is_refused(text: str, says: str) -> None:
    with pytest.raises(Unusable, match=says):
        mutate.read_mutations(text)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a checkout")
def test_the_copy_has_what_git_knows_and_nothing_else() -> None:
    with copy_of_the_checkout() as copy:
        tracked = subprocess.check_output(["git", "ls-files", "shm"], cwd=ROOT, text=True).splitlines()
        assert {path.as_posix() for path in (copy / "shm").iterdir()} == {str(copy / name) for name in tracked}
        assert not (copy / ".git").exists()
        assert not (copy / ".venv").exists()
    assert not copy.exists()
