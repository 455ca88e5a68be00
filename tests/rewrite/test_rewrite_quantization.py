"""What a quantization config says of an expert it goes on saying under the expert's new number, and nothing else."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rewrite_models import HIDDEN, WIDTH, Model, half, listing, opened, qwen3

from expertcut.checkpoint import open_checkpoint
from expertcut.errors import ConfigConflictError
from expertcut.model import Geometry
from expertcut.rewrite import prune, require, verify_bytes, verify_structure
from expertcut.rewrite.config import edit_config
from expertcut.rewrite.quantization import quantization_edits

EXPERTS = 24
Kept = Mapping[str, tuple[int, ...]]
PARTS = ("down_proj", "gate_proj", "up_proj")
BLOCKS = ("model.layers.0.mlp", "model.layers.2.mlp")
OTHERS = ("lm_head", "model.embed_tokens", "model.layers.0.mlp.gate", "model.layers.1.mlp.up_proj",
          *(f"model.layers.{layer}.self_attn.q_proj" for layer in range(3)))  # fmt: skip
DIFFERENT: Kept = {BLOCKS[0]: (0, 2, 5, 7), BLOCKS[1]: (1, 3, 4, 6)}
ALIKE: Kept = dict.fromkeys(BLOCKS, (0, 2, 5, 7))


@cache
def geometry(experts: int = 8) -> Geometry:
    """Two MoE layers around a dense one."""
    model = Model(qwen3().config | {"num_experts": experts, "num_local_experts": experts}, experts)
    for name in OTHERS:
        if not name.endswith(".gate"):
            model.add(f"{name}.weight", "BF16", 2, HIDDEN)
    for block in BLOCKS:
        for expert in range(experts):
            for part in PARTS:
                model.add(f"{block}.experts.{expert}.{part}.weight", "U8", WIDTH, 2, block=block, expert=expert)
        model.router(block, "gate.weight")
    with TemporaryDirectory() as folder:
        return opened(model.write(Path(folder) / "in"))[1]


def rewrite(value: Any, kept: Kept, experts: int = 8, key: str = "ignore") -> Any:
    config = {"quantization_config": {key: value}}
    return edit_config(config, quantization_edits(config, geometry(experts), kept))["quantization_config"][key]


FEW: Kept = {BLOCKS[0]: (0, 5), BLOCKS[1]: (5, 6)}
EXAMPLES: list[tuple[str, Kept, list[str], list[str] | None]] = [  # None: as it was
    ("names without experts", DIFFERENT, ["lm_head", "mlp.gate", "model.layers.0.mlp.shared_experts"], None),
    ("all experts", DIFFERENT, ["re:.*experts\\..*", "*.mlp.experts.*", "re:.*mlp.experts.[0-9]+.up_proj"], None),
    ("layers, not experts", DIFFERENT, ["model.layers.0*", "model.layers.2.*", "re:model\\.layers\\.2\\..*"], None),
    ("a full name", DIFFERENT, ["model.layers.0.mlp.experts.5.up_proj"], ["model.layers.0.mlp.experts.2.up_proj"]),
    ("a whole expert", DIFFERENT, ["model.layers.2.mlp.experts.6"], ["model.layers.2.mlp.experts.3"]),
    ("a dropped expert", DIFFERENT, ["lm_head", "model.layers.0.mlp.experts.4.up_proj"], ["lm_head"]),
    ("under another root", DIFFERENT, ["vlm.model.layers.2.mlp.experts.6.w1", "vlm.model.layers.2.mlp.experts.6.*"],
        ["vlm.model.layers.2.mlp.experts.3.w1", "vlm.model.layers.2.mlp.experts.3.*"]),
    ("in every layer", ALIKE, ["mlp.experts.5.up_proj"], ["mlp.experts.2.up_proj"]),
    ("in every layer, by other numbers", DIFFERENT, ["mlp.experts.5.up_proj", "mlp.experts.6.up_proj"],
        ["model.layers.0.mlp.experts.2.up_proj", "model.layers.2.mlp.experts.3.up_proj"]),
    ("a glob", DIFFERENT, ["model.layers.0.mlp.experts.5.*"], ["model.layers.0.mlp.experts.2.*"]),
    ("a glob over layers", ALIKE, ["*.experts.5.*"], ["*.experts.2.*"]),
    ("a glob over layers, by other numbers", FEW, ["*.experts.5.*", "*.experts.5.up*"],
        ["model.layers.0.mlp.experts.1.*", "model.layers.2.mlp.experts.0.*",
         "model.layers.0.mlp.experts.1.up_proj", "model.layers.2.mlp.experts.0.up_proj"]),
    ("a regex", DIFFERENT, ["re:.*layers\\.2\\.mlp\\.experts\\.6\\..*"], ["re:.*layers\\.2\\.mlp\\.experts\\.3\\..*"]),
    ("a regex for dropped experts", DIFFERENT, ["re:.*layers\\.0.*experts\\.[46]\\.up_proj"], []),
    ("a regex with alternatives", DIFFERENT, ["re:model.layers.2.mlp.experts.(6|5|3).up_proj"],
        ["re:model\\.layers\\.2\\.mlp\\.experts\\.(?:1|3)\\.up_proj$"]),
    ("a regex over layers, by other numbers", FEW, ["re:.*experts\\.5\\..*"],
        ["re:model\\.layers\\.0\\.mlp\\.experts\\.1\\.|model\\.layers\\.2\\.mlp\\.experts\\.0\\."]),
    ("a regex for other modules too", FEW, ["re:.*(q_proj|experts\\.5\\.up_proj)"],
        ["re:model\\.layers\\.0\\.mlp\\.experts\\.1\\.up_proj$|model\\.layers\\.2\\.mlp\\.experts\\.0\\.up_proj$"
         "|(?!.*\\bexperts\\.\\d)(?:.*(q_proj|experts\\.5\\.up_proj))"]),
]  # fmt: skip


@pytest.mark.parametrize("kept, old, new", [e[1:] for e in EXAMPLES], ids=[e[0] for e in EXAMPLES])
def test_entries_of_lists(kept: Kept, old: list[str], new: list[str] | None) -> None:
    assert rewrite(old, kept) == (old if new is None else new)


def test_one_expert_is_not_taken_for_the_beginning_of_another() -> None:
    """Some runtimes match the beginnings of names: `experts.1` may not come to mean experts 10 to 19."""
    kept = dict.fromkeys(BLOCKS, tuple(range(3, 24)))
    found = rewrite(["model.layers.0.mlp.experts.4"], kept, EXPERTS)
    assert found == [f"model.layers.0.mlp.experts.1.{part}" for part in PARTS]


def test_objects_keep_values_and_order() -> None:
    layers = {"lm_head": {"bits": 8}} | {f"{BLOCKS[0]}.experts.{e}.{p}": {"bits": e} for e in range(8) for p in PARTS}
    found = rewrite(layers, DIFFERENT, key="quantized_layers")
    assert list(found.items()) == [("lm_head", {"bits": 8})] + [
        (f"{BLOCKS[0]}.experts.{new}.{p}", {"bits": old}) for new, old in enumerate((0, 2, 5, 7)) for p in PARTS
    ]


def test_rules_of_gptq() -> None:
    """`dynamic`: regexes with signs, of which the first that matches counts."""
    rules: dict[str, Any] = {
        "-:.*mlp\\.gate.*": {}, "+:model\\.layers\\.0\\.mlp\\.experts\\.5\\.": {"bits": 8},
        "+:.*experts\\.(?:0|4|6)\\.up_proj": {"bits": 3}, "model.layers.2.mlp.experts.2.up_proj": {"bits": 2},
        ".*\\.experts\\..*": {"bits": 4},
    }  # fmt: skip
    found = rewrite(rules, DIFFERENT, key="dynamic")
    assert list(found.values()) == [{}, {"bits": 8}, {"bits": 3}, {"bits": 4}]
    assert list(found)[:2] == ["-:.*mlp\\.gate.*", "+:model\\.layers\\.0\\.mlp\\.experts\\.2\\."]

    def decide(keys: dict[str, Any], name: str) -> Any:
        return next((v for k, v in keys.items() if re.match(k.removeprefix("+:").removeprefix("-:"), name)), None)

    for old, new in renamed(DIFFERENT):
        assert decide(found, new) == decide(rules, old)


def test_modules_in_a_block() -> None:
    """GPTQ's lists of lists say the same of every layer; what would not be the same is refused by name."""
    modules = [["self_attn.q_proj"], *([f"mlp.experts.{e}.{p}" for e in range(8)] for p in PARTS)]
    key = "modules_in_block_to_quantize"
    assert rewrite(modules, DIFFERENT, key=key) == [
        ["self_attn.q_proj"], *([f"mlp.experts.{e}.{p}" for e in range(4)] for p in PARTS)
    ]  # fmt: skip
    with pytest.raises(ConfigConflictError, match=r"modules_in_block_to_quantize: 'mlp\.experts\.0\.up_proj' means"):
        rewrite([["mlp.experts.0.up_proj", "mlp.experts.2.up_proj"]], DIFFERENT, key=key)


@pytest.mark.parametrize(
    "value, words",
    [
        (["*.5.*", "model.layers.?.*q_proj"], ["'*.5.*'", "other modules"]),
        ("re:.*experts\\.(4|6)\\..*", ["experts", "0 entries"]),
        (["re:.*experts\\.(5"], ["no valid regular expression"]),
    ],
)
def test_what_cannot_be_said_is_refused_by_name(value: Any, words: list[str]) -> None:
    kept = {BLOCKS[0]: (0, 1, 2, 5), BLOCKS[1]: (0, 1, 3, 5)}
    extra = {**geometry().roles, "model.layers.5.other.weight": geometry().roles["lm_head.weight"]}
    config = {"quantization_config": {"targets": value}}
    changed = dataclasses.replace(geometry(), roles=extra)
    with pytest.raises(ConfigConflictError) as caught:
        quantization_edits(config, changed, kept)
    assert caught.value.message.startswith("config.json: targets: ")
    assert all(word in caught.value.message for word in words), caught.value.message


def test_experts_that_are_not_pruned_keep_their_entries() -> None:
    """Such as those of a second model in the same checkpoint."""
    talker = [f"talker.{block}.experts.{expert}.{part}" for block in BLOCKS for expert in range(4) for part in PARTS]
    roles = {**geometry().roles, **{f"{name}.weight": geometry().roles["lm_head.weight"] for name in talker}}
    both = dataclasses.replace(geometry(), roles=roles)
    entries = [*talker, f"{BLOCKS[0]}.experts.5.up_proj", "re:.*experts\\.2\\.up_proj", "talker.*.experts.2.*"]
    config = {"quantization_config": {"ignore": entries}}
    found = edit_config(config, quantization_edits(config, both, DIFFERENT))["quantization_config"]["ignore"]
    assert found[:-2] == [*talker, f"{BLOCKS[0]}.experts.2.up_proj"] and found[-1] == entries[-1]
    for old, new in [*renamed(DIFFERENT), *((name, name) for name in talker)]:
        assert named(found[-2:], new) == named(entries[-2:], old)
    config = {"quantization_config": {"ignore": ["mlp.experts.2.up_proj"]}}
    with pytest.raises(ConfigConflictError, match=r"'mlp\.experts\.2\.up_proj' means experts that are not pruned"):
        quantization_edits(config, both, DIFFERENT)


def renamed(kept: Kept) -> list[tuple[str, str]]:
    """Names before and after of every module that is left."""
    experts = [
        (f"{block}.experts.{old}.{part}", f"{block}.experts.{new}.{part}")
        for block, ids in kept.items()
        for new, old in enumerate(ids)
        for part in PARTS
    ]
    return [*experts, *((name, name) for name in OTHERS)]


def named(entries: Sequence[str], name: str) -> bool:
    """Whether a list of entries names a module."""
    for entry in entries:
        if entry.startswith("re:"):
            if re.match(entry[3:], name):
                return True
        elif any(c in entry for c in "*?["):
            if fnmatchcase(name, entry) or fnmatchcase(name, entry + ".*"):
                return True
        elif f".{entry}." in f".{name}.":
            return True
    return False


number = st.integers(0, EXPERTS - 1).map(str)
layer = st.sampled_from(["0", "1", "2"])
end = st.sampled_from([*(f".{part}" for part in PARTS), ".w1", ""])
plain = st.builds("{}mlp.experts.{}{}".format, layer.map("model.layers.{}.".format) | st.just(""), number, end)
glob = st.builds(
    "{}.mlp.experts.{}{}".format,
    layer.map("model.layers.{}".format) | st.sampled_from(["*", "model.layers.?", "model.layers.*"]),
    number | number.map("{}*".format) | st.sampled_from(["?", "1?", "*", "[0-4]", "*2"]),
    st.sampled_from([".*", "*", "", *(f".{part}" for part in PARTS)]),
)
several = st.lists(number, min_size=1, max_size=4).map("|".join)
regex = st.builds(
    "re:{}{}experts\\.{}{}{}".format,
    st.sampled_from([".*", "", ".*lm_head|", "model\\.layers\\.[02]\\..*(?:q_proj)?"]),
    layer.map("model\\.layers\\.{}\\.mlp\\.".format) | st.just(".*mlp.") | st.just("model.layers.2.mlp."),
    number | several.map("({})".format) | st.sampled_from(["\\d", "1\\d", "\\d+", "[3-7]", "(?!5).*", "1?2", "."]),
    st.sampled_from(["\\.", ".", ""]),
    st.sampled_from([".*", "up_proj", "(up|gate)_proj", "", "up_proj$"]),
)
other = st.sampled_from(["lm_head", "re:.*self_attn.*", "*.self_attn.*", "mlp.gate", "model.layers.1*", "experts"])


@given(
    st.lists(plain | glob | regex | other, min_size=1, max_size=8),
    st.integers(1, EXPERTS).flatmap(
        lambda count: st.tuples(*[st.permutations(range(EXPERTS)).map(lambda p: tuple(sorted(p[:count])))] * 2)
    ),
)
def test_every_module_that_is_left_is_decided_on_as_before(
    entries: list[str], ids: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    kept = dict(zip(BLOCKS, ids, strict=True))
    found = rewrite(entries, kept, EXPERTS)
    for old, new in renamed(kept):
        assert named(found, new) == named(entries, old), (old, new, found)
    assert rewrite(entries, dict.fromkeys(BLOCKS, tuple(range(EXPERTS))), EXPERTS) == entries or any(
        not named([entry], old) for entry in entries for old, _ in renamed(kept)
    )


# Real shapes of published configs, in few entries: (quantization_config, what it becomes, None if it stays).
def _published() -> dict[str, tuple[dict[str, Any], dict[str, Any] | None]]:
    expert = "model.layers.{}.mlp.experts.{}.{}"
    return {
        "block FP8": ({
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm", "model.layers.0.mlp.gate"],
        }, None),
        "modelopt NVFP4": ({
            "config_groups": {"group_0": {
                "input_activations": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
                "weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}, "targets": ["Linear"],
            }},
            "ignore": ["lm_head", "model.layers.0*", "model.layers.2.mlp.shared_experts*", "mtp.layers.0*"],
            "quant_algo": "NVFP4", "producer": {"name": "modelopt", "version": "0.45.0.dev44+gc273ddb8a.d20260509"},
            "quant_method": "modelopt",
        }, None),
        "modelopt, mixed": ({
            "quant_algo": "MIXED_PRECISION", "exclude_modules": ["lm_head", "model.layers.0.mlp.gate"],
            "quantized_layers": {
                "model.layers.0.self_attn.q_proj": {"quant_algo": "MXFP8"},
                **{expert.format(0, e, p): {"quant_algo": "NVFP4", "group_size": 16} for e in range(8) for p in PARTS},
            },
        }, {
            "quant_algo": "MIXED_PRECISION", "exclude_modules": ["lm_head", "model.layers.0.mlp.gate"],
            "quantized_layers": {
                "model.layers.0.self_attn.q_proj": {"quant_algo": "MXFP8"},
                **{expert.format(0, e, p): {"quant_algo": "NVFP4", "group_size": 16} for e in range(4) for p in PARTS},
            },
        }),
        "whole blocks by name": ({
            "quantized_layers": {"model.layers.0.mlp.experts": {"quant_algo": "W4A16_NVFP4", "group_size": 16}},
            "config_groups": {"group_1": {"targets": ["lm_head", "model.layers.0.mlp.experts"]}},
        }, None),
        "pack-quantized INT4": ({
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"group_size": 32, "num_bits": 4}}},
            "format": "pack-quantized", "quant_method": "compressed-tensors",
            "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*",
                       "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
        }, None),
        "MXFP4": ({
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
            "quant_method": "mxfp4",
        }, None),
        "GPTQ": ({
            "bits": 4, "desc_act": False, "group_size": 128, "quant_method": "gptq", "sym": True,
            "dynamic": {"-:.*mlp\\.gate.*": {}, "+:.*\\.experts\\.\\d+\\..*": {"bits": 4}}, "meta": {"damp": 0.1},
        }, None),
        "AWQ": ({"bits": 4, "group_size": 128, "quant_method": "awq", "version": "gemm", "zero_point": True,
                 "modules_to_not_convert": ["gate", "mlp.gate."]}, None),
    }  # fmt: skip


@pytest.mark.parametrize("name", _published())
def test_published_configs(name: str) -> None:
    old, new = _published()[name]
    config = {"quantization_config": old}
    found = edit_config(config, quantization_edits(config, geometry(), DIFFERENT))
    assert json.dumps(found["quantization_config"]) == json.dumps(old if new is None else new)


def test_the_written_config_is_verified(tmp_path: Path) -> None:
    """In `config.json`, in a companion that repeats it, and by `verify`."""
    model = qwen3()
    entry = "model.layers.0.mlp.experts.{}.up_proj"
    model.config["quantization_config"] = {"quant_method": "fp8", "ignored_layers": ["lm_head", entry.format(5)]}
    document = {"quantization": {"exclude_modules": [entry.format(5), entry.format(4)]}}
    files = {"hf_quant_config.json": json.dumps(document).encode(), "quantize_config.json": b'{"bits": 4}'}
    ckpt, geometry = opened(model.write(tmp_path / "in", companions=files))
    prune(ckpt, geometry, half(ckpt, geometry), tmp_path / "out")
    out = open_checkpoint(tmp_path / "out")
    assert out.config["quantization_config"]["ignored_layers"] == ["lm_head", entry.format(2)]
    found = json.loads((tmp_path / "out/hf_quant_config.json").read_text())
    assert found == {"quantization": {"exclude_modules": [entry.format(2)]}}
    assert (tmp_path / "out/quantize_config.json").read_bytes() == b'{"bits": 4}'
    checks = {check.name: check for check in verify_structure(out, ckpt) + verify_bytes(out, ckpt)}
    require(checks.values())
    assert "quantization_config.ignored_layers 2 entries → 2 entries" in checks["config"].detail
    assert checks["companions"].detail == "1 files equal the source's, 1 rewritten"
    for name in ("config.json", "hf_quant_config.json"):
        text = (tmp_path / "out" / name).read_text()
        (tmp_path / "out" / name).write_text(text.replace("experts.2.", "experts.3."))
    wrong = {check.name for check in verify_structure(tmp_path / "out", ckpt) if not check.ok}
    assert wrong == {"config"}
    wrong = {check.name for check in verify_bytes(tmp_path / "out", ckpt) if not check.ok}
    assert wrong == {"companions"}


def test_what_is_refused_leaves_nothing(tmp_path: Path) -> None:
    model = qwen3()
    model.config["quantization_config"] = {"modules_in_block_to_quantize": [["mlp.experts.0.up_proj"]]}
    ckpt, geometry = opened(model.write(tmp_path / "in"))
    with pytest.raises(ConfigConflictError, match=r"'mlp\.experts\.0\.up_proj'"):
        prune(ckpt, geometry, half(ckpt, geometry), tmp_path / "out")
    assert listing(tmp_path) == ["in"]
