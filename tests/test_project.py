"""The project as a project: what a wheel carries, which versions are pinned, and which way imports point."""

import ast
import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import expertcut

TORCH_FREE = ("checkpoint", "model", "choose", "rewrite")
FLOW = ("errors", "checkpoint", "model", "calibrate", "choose", "rewrite", "measure", "runtimes", "share", "cli")


@pytest.fixture(scope="module")
def wheel(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return Path(next(WheelBuilder(str(repo)).build(directory=str(folder), versions=["standard"])))


def files_below(folder: Path) -> Iterator[str]:
    return (
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    )


def test_the_wheel_carries_the_whole_package_and_the_recipes(repo: Path, wheel: Path) -> None:
    carried = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {f"expertcut/{name}" for name in files_below(repo / "expertcut")}
    recipes = {f"expertcut/_calibration/{name}" for name in files_below(repo / "calibration")}
    assert carried == package | recipes
    assert "expertcut/py.typed" in carried
    assert any(name.endswith(".yaml") for name in recipes)


def test_the_wheel_names_the_command_and_the_licence(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = f"expertcut-{expertcut.__version__}.dist-info"
    assert "expertcut = expertcut.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    metadata = archive.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()


def test_recipes_and_the_built_in_model_work_from_an_installed_wheel(repo: Path, wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import expertcut, pathlib\n"
        "from expertcut.calibrate.recipes import find_recipe, recipe_names\n"
        "from expertcut.checkpoint import open_checkpoint\n"
        "from expertcut.model import read_geometry\n"
        "package = pathlib.Path(expertcut.__file__).parent\n"
        "recipes = [find_recipe(name) for name in recipe_names()]\n"
        "print(package, len(recipes), read_geometry(open_checkpoint(package / '_demo_model')).num_experts)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    recipes = len(list((repo / "calibration").glob("*.yaml")))
    assert run.stdout.split() == [str(site / "expertcut"), str(recipes), "32"], run.stderr


def test_every_dependency_is_pinned_to_a_version_that_its_range_allows(repo: Path) -> None:
    project = tomllib.loads((repo / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = [*project["project"]["dependencies"], *extras["dev"], *extras["docs"], *extras["eval"]]
    lines = (repo / "scripts/constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pins.items()}
    assert len(pinned) == len([line for line in lines if not line.startswith("#")])
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def modules(*stages: str) -> list[str]:
    root = Path(expertcut.__file__).parent
    found = [path for stage in stages for path in sorted((root / stage).rglob("*.py"))]
    return [
        ".".join(("expertcut", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
        for path in found
    ]


def test_planning_and_rewriting_import_neither_torch_nor_transformers() -> None:
    names = [*modules(*TORCH_FREE), "expertcut.calibrate.profile", "expertcut.cli"]
    code = f"import {', '.join(names)}, sys; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "[]\n", run.stderr


@pytest.mark.parametrize("stage", FLOW[1:])
def test_imports_point_backwards_along_the_flow(stage: str) -> None:
    for name in modules(stage):
        path = Path(expertcut.__file__).parents[1].joinpath(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            imported = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for target in filter(lambda module: module.startswith("expertcut."), imported):
                assert FLOW.index(target.split(".")[1]) <= FLOW.index(stage), f"{name} imports {target}"
