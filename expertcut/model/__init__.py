"""Families (a table of data) and geometry (the role of every tensor). No torch, no transformers."""

from expertcut.model.classify import read_geometry
from expertcut.model.families import BY_TYPE, FAMILIES, REFUSED, Family, resolve_family
from expertcut.model.fingerprint import Fingerprint, check_fingerprint, fingerprint, geometry_hash
from expertcut.model.geometry import (
    Edit,
    ExpertTensor,
    Geometry,
    MoeBlock,
    Remapped,
    Role,
    Sliced,
    Whole,
)

__all__ = [
    "BY_TYPE", "FAMILIES", "REFUSED", "Edit", "ExpertTensor", "Family", "Fingerprint", "Geometry", "MoeBlock",
    "Remapped", "Role", "Sliced", "Whole", "check_fingerprint", "fingerprint", "geometry_hash", "read_geometry",
    "resolve_family",
]  # fmt: skip
