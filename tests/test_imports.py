"""The house: torch <- solvers <- core <- calibrate, baselines <- adapters <- plugins <- command <- benchmarks."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for top in ("solvers", "sencache", "benchmarks") for path in (ROOT / top).rglob("*.py"))
FLOORS = {  # the longest name that fits; a file on a floor imports from this floor and those below
    "solvers": 0,
    "sencache": 1,
    "sencache.calibrate": 2,
    "sencache.jacobian": 2,
    "sencache.baselines": 2,
    "sencache.plots": 2,
    "sencache.adapters": 3,
    "sencache.plugins": 4,
    "sencache.command": 5,
    "sencache.__main__": 5,
    "benchmarks": 6,
    "tests": 6,
}
ALLOWED = {  # from outside, besides the standard library
    "solvers": {"torch", "torchdiffeq"},
    "sencache": {"torch", "numpy", "scipy", "safetensors", "tqdm"},
    "sencache.plots": {"torch", "numpy", "matplotlib"},
    "sencache.adapters": {"torch"},
}


def longest(table: dict, module: str) -> str | None:
    names = [".".join(module.split(".")[:k]) for k in range(1, module.count(".") + 2)]
    return next((name for name in reversed(names) if name in table), None)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of everything that is imported, wherever in the file."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*package[: len(package) - node.level + 1], node.module or ""]) if node.level else node.module
            )
            for alias in node.names:  # `from sencache import cache` is an import of sencache.cache
                inner = f"{base}.{alias.name}"
                is_module = (ROOT / inner.replace(".", "/")).is_dir() or (
                    ROOT / f"{inner.replace('.', '/')}.py"
                ).exists()
                yield node.lineno, inner if is_module else base


def name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


over_files = pytest.mark.parametrize("path", FILES, ids=name)


@over_files
def test_nothing_imports_from_a_floor_above_its_own(path):
    if path == ROOT / "sencache/__init__.py":  # it lists the public names, from wherever they are
        return
    own = FLOORS[longest(FLOORS, name(path))]
    for line, module in imports(path):
        floor = longest(FLOORS, module)
        height = 3 if module == "sencache" else FLOORS.get(floor, 0)  # the package itself is everything in it
        assert height <= own, f"{path.relative_to(ROOT)}:{line} imports {module}"


@over_files
def test_only_what_its_floor_is_built_on_is_imported_from_outside(path):
    module = name(path)
    if longest({"sencache.plugins": 0, "benchmarks": 0}, module):
        return
    allowed = (
        ALLOWED[longest(ALLOWED, module)] | {"solvers"} | ({"sencache"} if module.startswith("sencache") else set())
    )
    for line, imported in imports(path):
        top = imported.split(".")[0]
        assert top in allowed or top in sys.stdlib_module_names, f"{path.relative_to(ROOT)}:{line} imports {imported}"


def test_solvers_knows_nothing_of_caches():
    for path in (ROOT / "solvers").rglob("*.py"):
        assert not any(module.split(".")[0] == "sencache" for _, module in imports(path))


def test_the_command_is_imported_only_when_it_is_typed_and_pictures_and_hosts_when_they_are_needed():
    for module, absent in (
        ("sencache", {"sencache.command", "matplotlib", "diffusers"}),
        ("sencache.command", {"matplotlib", "diffusers", "benchmarks"}),
    ):
        code = f"import {module}, sys; print({absent!r} & set(sys.modules))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
        assert done.stdout.strip() == "set()", module


def test_what_is_imported_is_a_dependency():
    """Of the installed package, without any extra: what `pip install sencache` brings must be enough to import it."""
    listed = (ROOT / "pyproject.toml").read_text().split("dependencies = [")[1].split("]")[0]
    for path in FILES:
        module = name(path)
        if module.startswith("benchmarks") or longest({"sencache.plots": 0, "sencache.plugins": 0}, module):
            continue
        for line, imported in imports(path):
            top = imported.split(".")[0]
            if top not in sys.stdlib_module_names and top not in ("solvers", "sencache"):
                assert f'"{top}>=' in listed, f"{path.relative_to(ROOT)}:{line} imports {top}, which is no dependency"


def test_a_relative_and_a_lazy_import_are_seen(tmp_path, monkeypatch):
    """A guard on the reader of imports."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / "sencache/adapters/wan.py"
    file.parent.mkdir(parents=True)
    (tmp_path / "sencache/cache.py").touch()
    file.write_text("from ..cache import A\nfrom sencache import cache\ndef f():\n    import diffusers.models\n")
    assert list(imports(file)) == [(1, "sencache.cache"), (2, "sencache.cache"), (4, "diffusers.models")]
