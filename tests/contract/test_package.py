"""What the wheel carries, and what the source must never do."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("app", "shm", "transfer")
SERIALIZERS = {"pickle", "cPickle", "_pickle", "shelve", "marshal", "dill", "cloudpickle", "joblib", "jsonpickle"}


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Every module that a file imports, also by name: `import_module("x")` and `__import__("x")`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rsplit(".", 1)[-1]
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value)


def importers(module: str) -> list[str]:
    return [
        str(path.relative_to(ROOT))
        for path in sources()
        if any(name.split(".")[0] == module for name in imported_modules(ast.parse(path.read_text())))
    ]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel, built from this tree without network."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    build = subprocess.run([*command, "--wheel-dir", out, ROOT], capture_output=True, text=True, cwd=out)
    assert build.returncode == 0, build.stderr
    with zipfile.ZipFile(next(out.glob("hotspare-*.whl"))) as archive:
        yield archive


def test_the_wheel_carries_every_module_and_data_file(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert {str(path.relative_to(ROOT)) for path in sources()} <= names
    static = {str(p.relative_to(ROOT)) for p in (ROOT / "app" / "api" / "static").rglob("*") if p.is_file()}
    assert "app/api/static/swagger-ui/swagger-ui-bundle.js" in static
    assert static <= names
    assert {f"{package}/py.typed" for package in PACKAGES} <= names


def test_the_wheel_carries_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    assert not [name for name in wheel.namelist() if "__pycache__" in name]


def test_the_wheel_has_its_licence_command_and_extras(wheel: zipfile.ZipFile) -> None:
    info = next(name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name)
    assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    entry_points = wheel.read(f"{info}/entry_points.txt")
    assert b"[console_scripts]\nhotspare = app.cli.main:main" in entry_points
    assert b"[sglang.srt.plugins]\nhotspare = transfer.sglang.plugin:register" in entry_points
    metadata = wheel.read(f"{info}/METADATA").decode()
    for extra in ("cpu", "cuda12", "cuda13"):
        assert f"Provides-Extra: {extra}\n" in metadata
    plain = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert not [line for line in plain if "mooncake" in line]


def test_mooncake_is_imported_in_one_file_only() -> None:
    assert importers("mooncake") == ["transfer/engine/mooncake.py"]


@pytest.mark.parametrize("module", sorted(SERIALIZERS))
def test_nothing_is_pickled(module: str) -> None:
    assert importers(module) == []


def test_torch_and_numpy_never_load_files_that_may_hold_pickles() -> None:
    loaders = ("torch.load", "np.load", "numpy.load", "torch.save", "pd.read_pickle")
    calls = {
        f"{path.relative_to(ROOT)}: {ast.unparse(node.func)}"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in loaders
    }
    assert calls == set()


@pytest.mark.parametrize(
    "source", ["import mooncake.engine", "from mooncake import engine", "def f():\n    import mooncake",
               "import importlib\nimportlib.import_module('mooncake.engine')", "__import__('mooncake')"],
)  # fmt: skip
def test_the_scan_sees_every_way_to_import(source: str) -> None:
    assert "mooncake" in {name.split(".")[0] for name in imported_modules(ast.parse(source))}


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {_name(r) for r in (*project["dependencies"], *extras["cpu"], *extras["dev"])}
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if "==" not in line] == []
    assert wanted - {_name(line) for line in lines} == set()


def _name(requirement: str) -> str:
    for separator in ("==", ">="):
        requirement = requirement.split(separator)[0]
    return requirement.strip().lower().replace("_", "-")
