"""Calibration recipes: which texts, from where, in which shares. YAML in, validated sources out; reads no text.

A name given to `--calibration` is a shipped recipe (`general`, `builtin` …), a recipe file (`.yaml`) or a text file
(`.txt`, `.jsonl`, `.parquet`). All of them become a `Recipe`, so that everything after this knows recipes only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from expertcut.calibrate.arithmetic import Part
from expertcut.errors import DataError

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
RECIPE_SUFFIXES = (".yaml", ".yml")

Name = Annotated[str, Field(min_length=1)]
Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HubSource(_Model):
    """A dataset of the Hub, streamed; or a local folder that `datasets` can load.

    Text is one field, a jinja2 template over the row's fields, or messages: the name of a field that holds a list of
    messages (`role` and `content`, or `from` and `value`, or either as JSON), or a mapping from role to field.
    """

    kind: Literal["hub"]
    dataset: Name
    config: str | None = None
    split: Name = "train"
    revision: str | None = None
    """Commit, tag or branch; default: the newest."""
    domain: Name
    weight: Weight = 1.0
    field: Name | None = None
    template: Name | None = None
    messages: Name | dict[Name, Name] | None = None
    chat_template: bool = True
    """Render messages with the tokenizer's chat template; otherwise, or if it has none, join their contents."""

    @model_validator(mode="after")
    def _one_text(self) -> HubSource:
        given = [name for name in ("field", "template", "messages") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"found {' and '.join(given) or 'none'}, expected one of field, template, messages")
        return self


class FileSource(_Model):
    """A local file: `.txt` is one document; `.jsonl` and `.parquet` have `text` and optionally `domain` per row."""

    kind: Literal["file"]
    path: Path
    """Relative to the recipe's folder."""
    domain: Name | None = None
    """Overrides the rows' domains; without either, the file's stem. Several domains in a file share its weight."""
    weight: Weight = 1.0


class BuiltinSource(_Model):
    """One domain of the shipped text."""

    kind: Literal["builtin"]
    domain: Name
    part: Part = "calibration"
    weight: Weight = 1.0


class ArithmeticSource(_Model):
    """Generated arithmetic: so many documents of forty lines."""

    kind: Literal["arithmetic"]
    domain: Name = "arithmetic"
    part: Part = "calibration"
    documents: int = Field(default=8, gt=0)
    weight: Weight = 1.0


class SelfSource(_Model):
    """Text sampled from the model that is calibrated."""

    kind: Literal["self"]
    domain: Name = "self"
    weight: Weight = 1.0


Source = HubSource | FileSource | BuiltinSource | ArithmeticSource | SelfSource


class Recipe(_Model):
    """A list of sources; their weights are relative to each other."""

    description: str = ""
    sources: tuple[Annotated[Source, Field(discriminator="kind")], ...] = Field(min_length=1)


def calibration_dir() -> Path:
    """Find the shipped recipes and text: in the installed package, else in the checkout. Raises: DataError."""
    package = Path(__file__).resolve().parents[1]
    candidates = (package / "_calibration", package.parent / "calibration")
    for folder in candidates:
        if (folder / "builtin.yaml").is_file():
            return folder
    raise DataError(
        f"the shipped calibration recipes are missing: no {' and no '.join(str(c) for c in candidates)}",
        hint="reinstall expertcut",
    )


def recipe_names() -> list[str]:
    """List the shipped recipes, sorted."""
    return sorted(path.stem for path in calibration_dir().glob("*.yaml"))


def find_recipe(name: str | Path) -> Recipe:
    """Turn a shipped recipe's name, a recipe file or a text file into a recipe. Raises: DataError."""
    path = Path(name)
    if path.suffix in TEXT_SUFFIXES:
        return Recipe(sources=(FileSource(kind="file", path=path),))
    if path.suffix in RECIPE_SUFFIXES:
        return load_recipe(path)
    if str(name) in recipe_names():
        return load_recipe(calibration_dir() / f"{name}.yaml")
    raise DataError(
        f"unknown calibration source {str(name)!r}: expected one of {', '.join(recipe_names())}, "
        f"or a file ending in {', '.join((*TEXT_SUFFIXES, *RECIPE_SUFFIXES))}",
        hint="to use a dataset of the Hub, name it in a recipe: a .yaml file with a source of kind hub",
    )


def load_recipe(path: Path) -> Recipe:
    """Read and validate a recipe; its file paths become relative to its folder. Raises: DataError naming the field."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read the recipe: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise DataError(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or error}") from error
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the document"
        raise DataError(f"{path}: {place}: {first['msg']}") from error
    return recipe.model_copy(update={"sources": tuple(_anchor(source, path.parent) for source in recipe.sources)})


def _anchor(source: Source, folder: Path) -> Source:
    if isinstance(source, FileSource):
        return source.model_copy(update={"path": folder / source.path})
    return source
