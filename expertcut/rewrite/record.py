"""`expertcut.json`: how a checkpoint was made. The same command writes the same bytes: no times, no absolute paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import expertcut
from expertcut.checkpoint import Checkpoint, load_json
from expertcut.choose.plan import Plan
from expertcut.errors import CheckpointError
from expertcut.rewrite.layout import RECORD, Layout


class Size(BaseModel):
    """Tensor bytes and experts per MoE layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    nbytes: int
    experts: int
    top_k: int


class Record(BaseModel):
    """What went in, what was done, what came out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal["expertcut.checkpoint/1"] = Field(default="expertcut.checkpoint/1", alias="schema")
    tool: str
    """Program and version."""
    source: str
    """Hub name or directory name of the model that the plan was applied to."""
    revision: str | None = None
    """Its commit on the Hub; None for a local directory."""
    before: Size
    after: Size
    plan: Plan
    """As applied; holds the fingerprint that the source was compared with."""

    @classmethod
    def of(cls, ckpt: Checkpoint, before: Size, layout: Layout, plan: Plan) -> Self:
        """Return the record of a rewrite."""
        after = Size(nbytes=layout.nbytes, experts=layout.experts, top_k=layout.top_k)
        tool = f"expertcut {expertcut.__version__}"
        return cls(
            tool=tool, source=ckpt.public_name, revision=ckpt.commit, before=before, after=after, plan=plan
        )  # fmt: skip

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the record of a checkpoint.

        Raises:
            CheckpointError: absent, or not of this schema.
        """
        path = folder / RECORD
        try:
            return cls.model_validate(load_json(path))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(step) for step in first["loc"])
            raise CheckpointError(f"{path}: {place}: {first['msg']}") from None

    def to_bytes(self) -> bytes:
        """Return the file's contents."""
        document = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
