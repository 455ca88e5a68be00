"""The profile: sums of router statistics per MoE layer and domain, on disk as JSON plus safetensors. numpy only.

Every number is a sum (or a maximum) over routed tokens, so profiles of disjoint data merge exactly by adding. E×E
matrices are symmetric and stored as their lower half. Arrays are read when asked for, so that opening the profile of a
256-expert model costs nothing.

Shapes: D domains, P = D or 1 (pair matrices pooled), E experts, K top-k, H hidden.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from expertcut.calibrate.overlap import EVERY, Sketch
from expertcut.calibrate.stats import LayerStats
from expertcut.errors import DestinationError, ProfileError, UsageError
from expertcut.model.fingerprint import TOLERANCE, Fingerprint

SCHEMA: Literal["expertcut.profile/1"] = "expertcut.profile/1"
JSON, ARRAYS = "profile.json", "profile.safetensors"

SUMS_E = ("gate_sum", "gate_sq_sum", "norm_sum", "norm_sq_sum", "gated_norm_sum", "gated_norm_sq_sum")
MAXIMA_E = ("gated_norm_max", "act_max")
SUMS_K = ("topk_error", "topk_cross", "topk_sq", "lost_mass")
PAIRS = ("coact", "coenergy", "gram")
MIXED_E = ("gate_norm_sq_sum", "gate_sq_norm_sum")
"""(D, E), which the first profiles lack: Σ g‖f‖² and Σ g²‖f‖."""
CONTRIBUTION = "contribution_sum"
"""(D, E), where the experts' sum is plainly added to the residual stream."""
MOMENTS = ("out_sum", "out_sq_sum_h")
"""Optional (D, E, H): Σf and Σf² elementwise, for mean and variance of an expert's output."""
TEXT = "text/hashes"
"""(N,) uint64, ascending: which text the profile was made from, see `calibrate.overlap`. Absent in early profiles."""
LACKING = {
    CONTRIBUTION: "it was made before there was one, or the experts' sum is not plainly added to the residual stream",
    **dict.fromkeys(MIXED_E, "it was made before there was one"),
    **dict.fromkeys(MOMENTS, "it was made without --moments"),
}
"""Why a profile may lack a statistic."""
_AGAIN = {CONTRIBUTION: "use another --strategy, such as gated-norm-sum"} | dict.fromkeys(
    MOMENTS, "profile again with --moments"
)


class DataRecord(BaseModel):
    """Where the tokens of a profile came from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fingerprint: str
    tokens: dict[str, int]
    """Tokens per domain, padding not counted."""
    seq_len: int
    packed: bool
    seed: int
    sources: list[dict[str, Any]]


class BlockRecord(BaseModel):
    """One profiled MoE block."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefix: str
    layer: int


class ProfileMeta(BaseModel):
    """Content of `profile.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_: Literal["expertcut.profile/1"] = Field(alias="schema", default=SCHEMA)
    source: str
    fingerprint: Fingerprint
    tokenizer: str
    """sha256 of the tokenizer's file."""
    data: list[DataRecord]
    domains: list[str]
    experts: int
    top_k: int
    blocks: list[BlockRecord]
    pair_domains: bool
    """True if the E×E matrices are stored per domain, False if pooled."""
    moments: bool
    dtype: str
    """dtype of the forward pass."""
    versions: dict[str, str]

    def tokens(self) -> dict[str, int]:
        """Tokens per domain over all data."""
        return {d: sum(r.tokens.get(d, 0) for r in self.data) for d in self.domains}


class Profile:
    """A profile in memory or on disk; see the module's docstring for the arrays."""

    def __init__(self, meta: ProfileMeta, arrays: Mapping[str, np.ndarray]) -> None:
        self.meta = meta
        self.arrays = arrays

    @classmethod
    def load(cls, directory: str | Path) -> Profile:
        """Open a profile directory; arrays stay on disk until used.

        Raises:
            ProfileError: missing, damaged or of another schema.
        """
        directory = Path(directory)
        try:
            meta = ProfileMeta.model_validate_json((directory / JSON).read_bytes())
            arrays = _LazyArrays(directory / ARRAYS)
        except FileNotFoundError as error:
            raise ProfileError(f"{directory}: no profile here ({Path(error.filename or '').name} is missing)",
                               "expertcut profile MODEL -o " + str(directory)) from error  # fmt: skip
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "content"
            raise ProfileError(f"{directory / JSON}: {where}: {first['msg']}") from error
        except (SafetensorError, OSError) as error:
            raise ProfileError(f"{directory / ARRAYS}: {error}") from error
        profile = cls(meta, arrays)
        profile._check(directory)
        return profile

    def save(self, directory: str | Path) -> None:
        """Write both files, each replaced atomically."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        part = directory / f".{ARRAYS}.part"
        save_file({k: np.ascontiguousarray(self.arrays[k]) for k in sorted(self.arrays)}, part)
        os.replace(part, directory / ARRAYS)
        part = directory / f".{JSON}.part"
        part.write_text(self.meta.model_dump_json(indent=2, by_alias=True) + "\n", encoding="utf-8")
        os.replace(part, directory / JSON)

    @property
    def prefixes(self) -> list[str]:
        """Profiled MoE blocks, in layer order."""
        return [block.prefix for block in self.meta.blocks]

    def digest(self) -> str:
        """Return a sha256 over the metadata (the data's and the model's fingerprints included) and token counts."""
        text = hashlib.sha256(self.meta.model_dump_json(by_alias=True).encode())
        for prefix in self.prefixes:
            text.update(np.ascontiguousarray(self.arrays[f"{prefix}/count"]).tobytes())
        return text.hexdigest()

    @property
    def sketch(self) -> Sketch | None:
        """The sketch of the calibration text; None if the profile has none."""
        return Sketch(self.meta.tokenizer, EVERY, self.arrays[TEXT]) if TEXT in self.arrays else None

    def domain_weights(self, weights: Mapping[str, float] | None) -> np.ndarray:
        """Return one factor per domain, (D,); absent domains count 0, None means 1 for all.

        Raises:
            UsageError: an unknown domain, a negative weight, or nothing left.
        """
        if weights is None:
            return np.ones(len(self.meta.domains))
        for name, weight in weights.items():
            if name not in self.meta.domains:
                raise UsageError(f"domain {name!r} is not in the profile; it has {', '.join(self.meta.domains)}")
            if not weight >= 0:
                raise UsageError(f"weight of domain {name!r} is {weight}, expected 0 or more")
        factors = np.array([weights.get(d, 0.0) for d in self.meta.domains])
        if not factors.any():
            raise UsageError("all domain weights are 0")
        return factors

    def layer(self, prefix: str, weights: Mapping[str, float] | None = None) -> LayerStats:
        """Pool one block's statistics over domains, each sum multiplied by its domain's weight.

        Maxima are taken over domains of positive weight. What is read on access may raise, too: a ProfileError if the
        profile lacks it, or if it was stored pooled, so that weights that differ cannot act on it.

        Raises:
            ProfileError: the block was not profiled.
        """
        by_prefix = {block.prefix: block.layer for block in self.meta.blocks}
        if prefix not in by_prefix:
            raise ProfileError(f"{prefix} is not in the profile; it has {', '.join(by_prefix)}")
        factors = self.domain_weights(weights)

        def pooled(stat: str) -> np.ndarray:
            return np.tensordot(factors, self.arrays[f"{prefix}/{stat}"].astype(np.float64), axes=1)

        def largest(stat: str) -> np.ndarray:
            values: np.ndarray = self.arrays[f"{prefix}/{stat}"][factors > 0].max(axis=0)
            return values

        return LayerStats(
            prefix=prefix, layer=by_prefix[prefix], tokens=float(pooled("tokens")), count=pooled("count"),
            **{stat: pooled(stat) for stat in SUMS_E}, **{stat: largest(stat) for stat in MAXIMA_E},
            rank_count=pooled("rank_count"), rank_mass=pooled("rank_mass"),
            **{stat: pooled(stat) for stat in SUMS_K}, out_sq=float(pooled("out_sq")), entropy=float(pooled("entropy")),
            lazy=_Lazy(self, prefix, factors),
        )  # fmt: skip

    def _check(self, where: Path) -> None:
        d, e, k = len(self.meta.domains), self.meta.experts, self.meta.top_k
        p = d if self.meta.pair_domains else 1
        shapes: dict[str, tuple[int, ...]] = {"tokens": (d,), "out_sq": (d,), "entropy": (d,)}
        shapes |= dict.fromkeys(("count", *SUMS_E, *MAXIMA_E), (d, e))
        shapes |= dict.fromkeys(("rank_count", "rank_mass"), (d, e, k)) | dict.fromkeys(SUMS_K, (d, k))
        shapes |= dict.fromkeys(PAIRS, (p, e * (e + 1) // 2)) | dict.fromkeys((*MIXED_E, CONTRIBUTION), (d, e))
        for prefix in self.prefixes:
            for stat, shape in shapes.items():
                name = f"{prefix}/{stat}"
                if name not in self.arrays:
                    if stat in LACKING:
                        continue
                    raise ProfileError(f"{where / ARRAYS}: {name} is missing")
                found = self.arrays.shape(name) if isinstance(self.arrays, _LazyArrays) else self.arrays[name].shape
                if tuple(found) != shape:
                    raise ProfileError(f"{where / ARRAYS}: {name} has shape {list(found)}, expected {list(shape)}")


def refuse_existing(directory: Path, force: bool) -> None:
    """Keep a complete profile from being replaced by mistake.

    Raises:
        DestinationError: there is one, and no `force`; or what is there is no directory.
    """
    if os.path.lexists(directory) and not directory.is_dir():
        raise DestinationError(f"{directory}: not a directory", "name a new directory for the profile")
    if (directory / JSON).exists() and not force:
        raise DestinationError(f"{directory}: holds a profile", "name a new directory, or replace it with --force")


def merge(first: Profile, second: Profile) -> Profile:
    """Return the profile of both profiles' data together; exact, in any order.

    Raises:
        ProfileError: other models, tokenizers or settings, or the same data twice.
    """
    a, b = first.meta, second.meta
    _check_mergeable(a, b)
    domains = [*a.domains, *(d for d in b.domains if d not in a.domains)]
    moments = a.moments and b.moments
    pair_domains = a.pair_domains and b.pair_domains
    arrays = {}
    for name in sorted(set(first.arrays) & set(second.arrays)):
        if name == TEXT:
            arrays[name] = np.union1d(first.arrays[name], second.arrays[name])
            continue
        stat = name.rpartition("/")[2]
        pair = stat in PAIRS
        if stat in MOMENTS and not moments:
            continue
        parts = []
        for profile in (first, second):
            values = profile.arrays[name]
            if pair and not pair_domains:
                parts.append(values.sum(axis=0, keepdims=True))
            else:
                parts.append(_spread(values, profile.meta.domains, domains))
        arrays[name] = np.maximum(*parts) if stat in MAXIMA_E else parts[0] + parts[1]
    meta = a.model_copy(
        update={
            "data": sorted([*a.data, *b.data], key=lambda r: r.fingerprint),
            "domains": domains,
            "moments": moments,
            "pair_domains": pair_domains,
        }
    )
    return Profile(meta, arrays)


def _check_mergeable(a: ProfileMeta, b: ProfileMeta) -> None:
    for what in ("tokenizer", "experts", "top_k", "blocks", "dtype"):
        if getattr(a, what) != getattr(b, what):
            raise ProfileError(f"the profiles cannot be merged: their {what} differs")
    if a.fingerprint.geometry != b.fingerprint.geometry or any(
        np.abs(np.subtract(a.fingerprint.sketch[p], b.fingerprint.sketch[p])).max() > TOLERANCE
        for p in a.fingerprint.sketch
    ):
        raise ProfileError(f"the profiles cannot be merged: made from different models ({a.source}, {b.source})")
    twice = {r.fingerprint for r in a.data} & {r.fingerprint for r in b.data}
    if twice:
        raise ProfileError(
            f"the profiles cannot be merged: both hold the data {sorted(twice)[0][:12]}, which would count twice"
        )


def _spread(values: np.ndarray, own: list[str], domains: list[str]) -> np.ndarray:
    """Place rows of `own` domains at their place among `domains`; the others are zero."""
    out = np.zeros((len(domains), *values.shape[1:]), values.dtype)
    out[[domains.index(d) for d in own]] = values
    return out


class _LazyArrays(Mapping[str, np.ndarray]):
    """Arrays of a safetensors file, read on access."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise FileNotFoundError(2, "missing", str(path))
        file: Any = safe_open(path, framework="np")
        self._file, self._names = file, tuple(sorted(file.keys()))  # noqa: SIM118

    def __contains__(self, name: object) -> bool:
        return name in self._names  # a mapping's own way reads the array

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an array, from the header."""
        return tuple(self._file.get_slice(name).get_shape())

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        array: np.ndarray = self._file.get_tensor(name)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Lazy(Mapping[str, np.ndarray]):
    """What is large or not in every profile, of one block: domains pooled, pairs unpacked from their halves."""

    def __init__(self, profile: Profile, prefix: str, factors: np.ndarray) -> None:
        self._profile, self._prefix, self._factors = profile, prefix, factors

    def __getitem__(self, stat: str) -> np.ndarray:
        if stat not in (*PAIRS, *LACKING):
            raise KeyError(stat)
        name, arrays = f"{self._prefix}/{stat}", self._profile.arrays
        if name not in arrays:
            again = "profile again: expertcut profile MODEL -o PROFILE"
            raise ProfileError(f"the profile has no {name}: {LACKING[stat]}", _AGAIN.get(stat, again))
        stored = arrays[name].astype(np.float64)
        if stat not in PAIRS:
            return np.tensordot(self._factors, stored, axes=1)
        e = self._profile.meta.experts
        full = np.zeros((e, e))
        full[np.tril_indices(e)] = np.tensordot(self._pair_factors(name), stored, axes=1)
        return full + np.tril(full, -1).T

    def _pair_factors(self, name: str) -> np.ndarray:
        if self._profile.meta.pair_domains:
            return self._factors
        if len({*self._factors.tolist()}) > 1:
            raise ProfileError(
                f"{name}: statistics of pairs are pooled over domains, so that domain weights cannot act on them",
                "profile again with --pair-domains",
            )
        return self._factors[:1]

    def __iter__(self) -> Iterator[str]:
        return (stat for stat in (*PAIRS, *LACKING) if f"{self._prefix}/{stat}" in self._profile.arrays)

    def __len__(self) -> int:
        return len(list(iter(self)))
