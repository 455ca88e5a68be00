"""Recipes: the shipped ones parse, mistakes are named, and they are found in a checkout and in an installed package."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from expertcut.calibrate import recipes
from expertcut.calibrate.recipes import BuiltinSource, FileSource, HubSource, Recipe, find_recipe, load_recipe
from expertcut.errors import DataError


def test_the_shipped_recipes_parse() -> None:
    names = recipes.recipe_names()
    assert {"general", "code", "math", "multilingual", "chat", "builtin", "builtin-heldout", "self"} == set(names)
    for name in names:
        recipe = find_recipe(name)
        assert recipe.description and recipe.sources


def test_builtin_recipes_name_all_shipped_text() -> None:
    for name, part in (("builtin", "calibration"), ("builtin-heldout", "heldout")):
        named = {s.domain for s in find_recipe(name).sources if isinstance(s, BuiltinSource) and s.part == part}
        assert named == {folder.name for folder in (recipes.calibration_dir() / "text" / part).iterdir()}


def test_files_become_recipes(tmp_path: Path) -> None:
    assert find_recipe(tmp_path / "x.jsonl") == Recipe(sources=(FileSource(kind="file", path=tmp_path / "x.jsonl"),))
    (tmp_path / "r.yaml").write_text("sources: [{kind: file, path: texts/x.txt}]")
    assert find_recipe(tmp_path / "r.yaml").sources[0] == FileSource(kind="file", path=tmp_path / "texts" / "x.txt")


_HUB = {"kind": "hub", "dataset": "a/b", "domain": "d", "field": "text"}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "sources: Field required"),
        ([], "the document: Input should be a valid dictionary"),
        ({"sources": []}, "sources: Tuple should have at least 1 item"),
        ({"sources": [{"kind": "web"}]}, r"sources\.0: Input tag 'web'"),
        ({"sources": [{**_HUB, "colour": "red"}]}, r"sources\.0\.hub\.colour: Extra inputs are not permitted"),
        ({"sources": [{**_HUB, "weight": 0}]}, r"sources\.0\.hub\.weight: Input should be greater than 0"),
        ({"sources": [{**_HUB, "weight": float("nan")}]}, r"weight: Input should be"),
        ({"sources": [{**_HUB, "template": "{{ x }}"}]}, "found field and template, expected one of"),
        ({"sources": [{**_HUB, "field": None}]}, "found none, expected one of"),
        ({"sources": [{"kind": "arithmetic", "part": "test"}]}, "'calibration' or 'heldout'"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, document: Any, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(DataError, match=message) as caught:
        load_recipe(path)
    assert caught.value.message.startswith(str(path)) and "\n" not in caught.value.message


def test_broken_yaml_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("sources:\n  - {kind: self\n  - {kind: self}\n")
    with pytest.raises(DataError, match=r"bad\.yaml:3: not YAML"):
        load_recipe(path)
    with pytest.raises(DataError, match="cannot read the recipe"):
        load_recipe(tmp_path / "absent.yaml")


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(DataError, match=r"unknown calibration source 'generl': expected one of builtin, .*general"):
        find_recipe("generl")


def test_unknown_builtin_domain_lists_the_known_ones(tmp_path: Path, demo_model: Path) -> None:
    from expertcut.calibrate.data import load_calibration
    from expertcut.calibrate.tokenizer import load_tokenizer

    path = tmp_path / "r.yaml"
    path.write_text("sources: [{kind: builtin, domain: latin}]")
    with pytest.raises(DataError, match="'latin': expected one of documentation, french, german, prose, python"):
        load_calibration([path], load_tokenizer(demo_model), tokens=None, seq_len=8)


def test_recipes_are_found_where_a_wheel_puts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "expertcut"
    shutil.copytree(recipes.calibration_dir(), package / "_calibration")
    monkeypatch.setattr(recipes, "__file__", str(package / "calibrate" / "recipes.py"))
    assert recipes.calibration_dir() == package / "_calibration"
    assert isinstance(find_recipe("code").sources[0], HubSource)
    shutil.rmtree(package)
    with pytest.raises(DataError, match="recipes are missing"):
        recipes.calibration_dir()


def test_the_documented_recipe_is_valid() -> None:
    text = (recipes.calibration_dir() / "README.md").read_text(encoding="utf-8")
    recipe = Recipe.model_validate(yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]))
    assert [source.kind for source in recipe.sources] == ["hub", "file", "builtin", "arithmetic", "self"]
