"""What vLLM refuses and what it holds, run by the interpreter of its environment; it starts once for all questions.

    python inside.py REQUEST.json ANSWER.json

REQUEST names tasks and what they get, ANSWER what they return:
versions: a model whose layers differ; what is raised in other versions of vLLM.
refusals: cases by name, `{model, arguments, settings}`, where `settings` are set on the finished config; what vLLM
raises while it builds and loads the model, null if nothing.
buffers: models by name; for each layer with experts their count, and whether every expert's buffers hold exactly the
bytes that the checkpoint has for it.
"""

# mypy: disable-error-code="import-not-found"

import functools
import json
import logging
import operator
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from generate import ENVIRONMENT, ROTARY

FIXED = {
    "max_model_len": 128, "max_num_seqs": 4, "skip_tokenizer_init": True, "enforce_eager": True,
    "compilation_config": {"custom_ops": ROTARY},
}  # fmt: skip


def engine(model: str, arguments: dict[str, Any], settings: dict[str, Any]) -> Any:
    """An engine with its weights loaded."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    config = EngineArgs(model=model, **FIXED | arguments).create_engine_config()
    for path, value in settings.items():
        owner, _, name = path.rpartition(".")
        setattr(operator.attrgetter(owner)(config), name, value)
    return LLMEngine.from_vllm_config(config)


def raised(action: Callable[[], object]) -> str | None:
    """What an action raises, by class and message."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def refusals(cases: dict[str, dict[str, Any]]) -> dict[str, str | None]:
    return {name: raised(functools.partial(engine, **case)) for name, case in cases.items()}


def versions(model: str) -> dict[str, str | None]:
    """What the plug-in says in a vLLM that is older, newer, or whose `make_layers` takes something else."""
    import vllm
    import vllm.model_executor.models.qwen3_moe as importer
    import vllm.model_executor.models.utils as utils
    from transformers import AutoConfig

    from expertcut.runtimes import vllm_plugin

    version, original, said = vllm.__version__, utils.make_layers, list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(vllm_plugin.__name__).addHandler(handler)

    def load() -> str | None:
        vllm_plugin.register()
        return raised(lambda: AutoConfig.from_pretrained(model))

    def other(num_hidden_layers: int, layer_fn: Any, prefix: str, offset: int = 0) -> None: ...

    vllm.__version__ = "0.31.2"
    found = {"older": load()}
    vllm.__version__, utils.make_layers = version, other
    found["changed"] = load()
    vllm.__version__, utils.make_layers = "0.99.0", original
    found |= {"newer": load(), "newer, said": "".join(said)}
    vllm.__version__ = version
    found["imported before"] = None if importer.make_layers is utils.make_layers is not original else "another function"
    return found


def buffers(models: dict[str, str]) -> dict[str, dict[str, tuple[int, bool]]]:
    """Kernels are not needed: weights are loaded and not prepared, on a CPU that claims to have AMX."""
    import torch
    import vllm.model_executor.model_loader.base_loader as loader

    torch.cpu._is_amx_tile_supported = lambda: True
    loader.process_weights_after_loading = lambda *args: None
    return {name: held(model) for name, model in models.items()}


def held(model: str) -> dict[str, tuple[int, bool]]:
    from safetensors.torch import load_file
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    tensors = {name: t for file in Path(model).glob("*.safetensors") for name, t in load_file(file).items()}
    running = engine(model, {"dtype": "bfloat16"}, {})
    found = {}
    for name, module in running.model_executor.driver_worker.worker.model_runner.model.named_modules():
        if isinstance(module, RoutedExperts):
            here = re.escape(name.removesuffix(".routed_experts"))
            same = all(
                as_bytes(b[e] for n, b in module.named_parameters(recurse=False) if not n.endswith("_shape"))
                == as_bytes(t for n, t in tensors.items() if re.match(rf"{here}\.{e}\.\w+\.(?!weight_shape)", n))
                for e in range(module.moe_config.num_experts)
            )
            found[name.split(".layers.")[1].split(".")[0]] = (module.moe_config.num_experts, same)
    return found


def as_bytes(tensors: Iterable[Any]) -> list[int]:
    """All bytes in ascending order: their layout does not count."""
    import torch

    return sorted(b for tensor in tensors for b in tensor.detach().flatten().view(torch.uint8).tolist())


TASKS: dict[str, Callable[[Any], Any]] = {"versions": versions, "refusals": refusals, "buffers": buffers}


if __name__ == "__main__":
    request, answer = sys.argv[1:]
    os.environ.update(ENVIRONMENT)
    given = json.loads(Path(request).read_text())
    Path(answer).write_text(json.dumps({name: task(given[name]) for name, task in TASKS.items() if name in given}))
