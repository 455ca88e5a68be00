"""A plug-in of vLLM, for tests: expert parallelism on a CPU, where vLLM's kernel for experts (0.32) knows no ranks.

It would take an expert's number in the layer for its place on the rank, and reads past the end. Here numbers become
places before the kernel sees them, and experts of other ranks weigh nothing.
"""

# mypy: disable-error-code="import-not-found"

import functools
import inspect
from pathlib import Path
from typing import Any


def install(folder: Path) -> list[Path]:
    """Make the plug-in known to a Python that has these folders in its module path."""
    info = folder / "local_experts-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: local-experts\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nlocal_experts = local_experts:register\n")
    return [folder, Path(__file__).parent]


def register() -> None:
    """Called by vLLM in each of its processes."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    apply = CPUUnquantizedExperts.apply
    signature = inspect.signature(apply)

    @functools.wraps(apply)
    def local(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs)
        ids, places = given.arguments["topk_ids"], given.arguments["expert_map"]
        if places is not None:
            place = places[ids.long()]
            given.arguments["topk_weights"] = given.arguments["topk_weights"] * (place >= 0)
            given.arguments["topk_ids"] = place.clamp(min=0).to(ids.dtype)
        apply(*given.args, **given.kwargs)

    if not hasattr(apply, "__wrapped__"):
        CPUUnquantizedExperts.apply = local
