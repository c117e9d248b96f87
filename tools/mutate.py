"""Breaks the code on purpose, one promise at a time, and sees whether a test notices.

A test that cannot fail proves nothing, and a suite that is green says little before it has been red. What is edited is
listed in tools/mutations.toml: each edit takes one promise of the docs or of a docstring away, and names the tests that
should object. It is made in a copy of the checkout, never in the working tree; one at a time, since tests need the
machine for themselves.

    python tools/mutate.py             every edit, against the tests that it names; minutes
    python tools/mutate.py --whole     what survives those, against the whole suite too
    python tools/mutate.py --only NAME --only NAME
    python tools/mutate.py --list

It ends with 1 if an edit survives, or cannot be made: code moves, and a list that no longer fits it must be mended.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MUTATIONS = Path(__file__).with_name("mutations.toml")
TEST_TIMEOUT_S = 90  # of one test: broken code may wait for what never comes
RUN_TIMEOUT_S = 1200  # of one run of pytest
FIRST_FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)
GREEN, RED = 0, 1  # pytest's exit codes; any other means that nothing was proved


class Unusable(Exception):
    """The list does not fit the code, or the tests cannot tell anything. Says what to mend."""


@dataclass(frozen=True)
class Mutation:
    """One edit: the old text, which the file has exactly once, becomes the new one."""

    name: str
    promise: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of an edit: the first test that failed, or none; or why nothing was learnt."""

    name: str
    killed_by: str = ""
    error: str = ""
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        return self.error or self.killed_by or "SURVIVED"


def read_mutations(text: str) -> list[Mutation]:
    """The list in TOML. Raises Unusable for an entry that is incomplete or has another's name."""
    found: list[Mutation] = []
    known = {each.name for each in fields(Mutation)}
    for entry in tomllib.loads(text)["mutation"]:
        if entry.keys() != known:
            raise Unusable(f"{entry.get('name', entry)}: it needs {', '.join(sorted(known))}, and nothing else")
        found.append(Mutation(**(entry | {"tests": tuple(entry["tests"])})))
    names = [each.name for each in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise Unusable(f"names are given twice: {', '.join(sorted(twice))}")
    return found


def chosen(mutations: Sequence[Mutation], names: Iterable[str]) -> list[Mutation]:
    """Those of these names, or all. Raises Unusable for a name that none has."""
    wanted = set(names)
    if missing := wanted - {each.name for each in mutations}:
        raise Unusable(f"there is no {', '.join(sorted(missing))}: --list shows what there is")
    return [each for each in mutations if not wanted or each.name in wanted]


@contextmanager
def copy_of_the_checkout() -> Iterator[Path]:
    """A directory with all that git knows or would take, as it is now; removed at the end."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    with tempfile.TemporaryDirectory(prefix="hotspare-mutate-") as directory:
        for name in filter(None, listed.stdout.decode().split("\0")):
            source, to = ROOT / name, Path(directory, name)
            if source.is_file() and not source.is_symlink():
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, to)
        yield Path(directory)


@contextmanager
def broken(checkout: Path, mutation: Mutation) -> Iterator[None]:
    """The file with the edit, until the end. Raises Unusable where the old text is not there exactly once."""
    path = checkout / mutation.file
    before = path.read_text() if path.is_file() else ""
    if (count := before.count(mutation.old)) != 1:
        raise Unusable(f"could not apply: {mutation.file} has its old text {count} times")
    path.write_text(before.replace(mutation.old, mutation.new))
    try:
        yield
    finally:
        path.write_text(before)


def run_tests(checkout: Path, tests: Sequence[str]) -> str:
    """The first test that fails, or nothing. Raises Unusable where pytest could not say."""
    if missing := [each for each in tests if not (checkout / each.partition("::")[0]).exists()]:
        raise Unusable(f"could not run: there is no {', '.join(missing)}")
    command = [sys.executable, "-m", "pytest", "-x", "-rfE", "--tb=no", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, f"--timeout={TEST_TIMEOUT_S}", *tests], cwd=checkout, capture_output=True, text=True,
            timeout=RUN_TIMEOUT_S, check=False,
            env={**os.environ, "PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Unusable(f"could not run: no end within {RUN_TIMEOUT_S} s") from None
    if done.returncode == GREEN:
        return ""
    if done.returncode < 0:  # the tests' own process was to be hurt, say by a read past the end of memory
        return f"died of {signal.Signals(-done.returncode).name}"
    if done.returncode == RED and (
        failed := re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    ):
        return failed[1]
    raise Unusable(f"could not run: pytest ended with {done.returncode}: {done.stdout[-500:]}{done.stderr[-500:]}")


def try_out(checkout: Path, mutation: Mutation, *, whole: bool) -> Outcome:
    """Make the edit, and run its tests; if it survives them and `whole`, every test."""
    started = time.monotonic()
    try:
        with broken(checkout, mutation):
            killed_by = run_tests(checkout, mutation.tests) or (run_tests(checkout, ["tests"]) if whole else "")
    except Unusable as error:
        return Outcome(mutation.name, error=str(error))
    return Outcome(mutation.name, killed_by, seconds=time.monotonic() - started)


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def report(outcomes: Sequence[Outcome]) -> int:
    """The score, and again what needs work; the exit status."""
    tried = [each for each in outcomes if not each.error]
    killed = [each for each in tried if each.killed_by]
    say(f"\nscore: {len(killed)} of {len(tried)} edits were noticed")
    for each in outcomes:
        if each not in killed:
            say(f"  {each.name}: {each.verdict}")
    return 0 if len(killed) == len(outcomes) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="only this one; may be repeated")
    parser.add_argument("--whole", action="store_true", help="run the whole suite on what survives its own tests")
    parser.add_argument("--list", action="store_true", help="say what would be broken, and break nothing")
    options = parser.parse_args()
    mutations = chosen(read_mutations(MUTATIONS.read_text()), options.only)
    width = max(len(each.name) for each in mutations)
    if options.list:
        for each in mutations:
            say(f"{each.name:{width}}  {each.file}: {each.promise}")
        return 0
    outcomes = []
    with copy_of_the_checkout() as checkout:
        tests = sorted({test for each in mutations for test in each.tests})
        if failed := run_tests(checkout, tests):
            raise Unusable(f"{failed} fails before anything is broken: mend it first")
        for each in mutations:
            outcomes.append(outcome := try_out(checkout, each, whole=options.whole))
            say(f"{outcome.name:{width}}  {outcome.seconds:5.1f} s  {outcome.verdict}")
    return report(outcomes)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Unusable as error:
        sys.exit(f"mutate: {error}")
