"""Machines for the cost model: a preset's name or a file in, data sheet and fitted constants out.

A machine is `count` devices of one kind, joined by links. Numbers of the data sheet are upper limits; the constants say
what an engine makes of them and are to be fitted to measurements (see `cost_fit`), five a machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from expertcut.errors import UsageError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1, strict=True)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Constants(_Record):
    """What an engine makes of a machine; all five are fitted together."""

    bandwidth: Share
    """Share of the data sheet's memory bandwidth that kernels reach."""
    compute: Share
    """Share of the data sheet's FLOP/s that kernels reach."""
    layer_us: Positive
    """Per decoder layer and step, whatever the load: launches, normalisation, the latency of collectives."""
    moe_us: Positive
    """The least that the routed experts of a layer take in a step, however few they are."""
    sequence_us: Positive
    """Per sequence that gets a token in a step: scheduling, sampling, detokenising."""


class Machine(_Record):
    """`count` devices; sizes in 10⁹ bytes, rates in 10⁹ bytes/s and 10¹² FLOP/s, all of one device."""

    name: str
    count: Count = 1
    memory_gb: Positive
    bandwidth_gb_s: Positive
    bf16_tflops: Positive
    fp8_tflops: Positive | None = None
    """None: FP8 weights are computed with in BF16."""
    link_gb_s: Positive
    """From one device to the others, one direction."""
    constants: Constants
    fitted: str = ""
    """What the constants were fitted to; empty: to nothing."""
    tp: Count | None = None
    """Devices that share attention and dense layers; the others hold copies of them. None: all."""
    ep: Count = 1
    """Devices over which whole experts are spread; what is left of `count` slices them."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        for name, size in (("tp", self.tp or self.count), ("ep", self.ep)):
            if self.count % size:
                raise ValueError(f"{name} {size} does not divide the {self.count} devices")
        return self

    @property
    def shards(self) -> int:
        """Devices that share attention and dense layers."""
        return self.tp or self.count

    @property
    def copies(self) -> int:
        """Copies of attention and dense layers, each of which serves its part of the sequences."""
        return self.count // self.shards

    def flops(self, fp8: bool) -> float:
        """Return the FLOP/s that one device reaches, with FP8 weights or others."""
        peak = self.fp8_tflops if fp8 and self.fp8_tflops else self.bf16_tflops
        return peak * 1e12 * self.constants.compute

    @property
    def bandwidth(self) -> float:
        """Bytes/s that one device reaches."""
        return self.bandwidth_gb_s * 1e9 * self.constants.bandwidth

    def save(self, path: Path) -> None:
        """Write the machine as JSON, for `read_machine`."""
        path.write_text(self.model_dump_json(indent=2, exclude_none=True) + "\n", encoding="utf-8")


_LITE = Constants(bandwidth=0.82, compute=0.32, layer_us=64.5, moe_us=8.7, sequence_us=23.4)
_V3 = Constants(bandwidth=0.73, compute=0.363, layer_us=99.5, moe_us=93, sequence_us=66.8)
UNFITTED = Constants(bandwidth=0.75, compute=0.4, layer_us=80, moe_us=30, sequence_us=40)
"""What constants are guessed to be, and where every fit starts."""
_LITE_ROWS = "DeepSeek-V2-Lite on 2 A800, SGLang 0.4.4, arXiv 2505.03531"
_V3_ROWS = "DeepSeek-V3 on 8 H200, SGLang 0.4.4, arXiv 2505.03531"


def _preset(
    name: str, memory: float, bandwidth: float, bf16: float, fp8: float | None, link: float,
    constants: Constants = UNFITTED, fitted: str = "",
) -> Machine:  # fmt: skip
    return Machine(name=name, memory_gb=memory, bandwidth_gb_s=bandwidth, bf16_tflops=bf16, fp8_tflops=fp8,
                   link_gb_s=link, constants=constants, fitted=fitted)  # fmt: skip


PRESETS = {
    machine.name: machine
    for machine in (
        _preset("a100", 80, 2039, 312, None, 300, _LITE, _LITE_ROWS),
        _preset("a800", 80, 2039, 312, None, 200, _LITE, _LITE_ROWS),
        _preset("h100", 80, 3350, 989, 1979, 450, _V3, _V3_ROWS),
        _preset("h200", 141, 4800, 989, 1979, 450, _V3, _V3_ROWS),
        _preset("b200", 180, 8000, 2250, 4500, 900, _V3, _V3_ROWS),
        _preset("mi300x", 192, 5300, 1307, 2615, 448),
        _preset("rtx4090", 24, 1008, 165, 330, 32),
        _preset("cpu", 512, 307, 115, None, 48),
    )
}
"""By name, one device each; where the numbers come from is in docs/estimate.md."""


def read_machine(text: str, *, tp: int | None = None, ep: int | None = None) -> Machine:
    """Return the machine that `NAME`, `NAMExCOUNT` or a YAML or JSON file describes.

    Raises:
        UsageError: no such preset or file, a wrong, missing or unknown field, or sizes that do not divide the devices.
    """
    name, x, count = text.lower().rpartition("x")
    if text.lower() in PRESETS:  # some names have an x themselves
        found = PRESETS[text.lower()].model_dump()
    elif x and name in PRESETS and count.isdecimal():
        found = PRESETS[name].model_dump() | {"count": int(count)}
    elif Path(text).is_file():
        found = _load(Path(text))
    else:
        raise UsageError(f"{text}: no such hardware and no such file; there are {', '.join(PRESETS)}",
                         "for example --hardware h200x8, or a file as in docs/estimate.md")  # fmt: skip
    found |= {key: size for key, size in (("tp", tp), ("ep", ep)) if size is not None}
    try:
        return Machine.model_validate(found)
    except ValidationError as error:
        raise UsageError(f"{text}: {first_error(error)}", "the fields are listed in docs/estimate.md") from error


def _load(path: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: neither YAML nor JSON: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path}: found {type(found).__name__}, expected the fields of a machine")
    return {"name": path.stem, **found}


def first_error(error: ValidationError) -> str:
    """Return `field: what is wrong, found …` of a validation's first finding."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(map(str, first["loc"]))
    found = "" if first["type"] == "missing" or not place else f", found {json.dumps(first['input'], default=str)[:40]}"
    return (f"{place}: " if place else "") + first["msg"].removeprefix("Value error, ") + found
