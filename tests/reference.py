"""What the models compute, twice over: transformers' own forward pass, and MoE blocks in loops over tokens and experts.

The loops share nothing with the package or with transformers: raw tensors by their names on disk, numpy, float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from tiny_models import read_tensors, silent
from transformers import AutoConfig, PreTrainedModel

from expertcut.calibrate.data import CalibrationSet
from expertcut.calibrate.profile import Profile
from expertcut.calibrate.run import ProfileOptions, profile_model
from expertcut.checkpoint import open_checkpoint
from expertcut.model import read_geometry

Array = np.ndarray[Any, np.dtype[np.float64]]


def load(folder: Path, dtype: torch.dtype = torch.float32, experts: str = "grouped_mm", **config: Any) -> Any:
    """transformers' model of a checkpoint, in evaluation mode; `config` overrides keys of its (text) config."""
    settings = AutoConfig.from_pretrained(folder)
    for key, value in config.items():
        setattr(settings.get_text_config(), key, value)
    model_class = getattr(transformers, settings.architectures[0])
    model = model_class.from_pretrained(folder, config=settings, dtype=dtype, experts_implementation=experts)
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    out: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return out


def moe_blocks(model: torch.nn.Module) -> dict[int, Any]:
    """Modules that hold a router and experts, by layer number."""
    found = {n: m for n, m in model.named_modules() if hasattr(m, "experts") and not n.startswith("mtp")}
    return {int(name.split("layers.")[1].split(".")[0]): module for name, module in found.items()}


def block_inputs(model: PreTrainedModel, data: CalibrationSet) -> dict[int, list[torch.Tensor]]:
    """Input (T, H) of every MoE block, by layer, one entry per sequence, each run by itself."""
    seen: dict[int, list[torch.Tensor]] = {layer: [] for layer in moe_blocks(model)}
    hooks = [
        block.register_forward_pre_hook(lambda _, args, layer=layer: seen[layer].append(args[0].flatten(0, 1)))
        for layer, block in moe_blocks(model).items()
    ]
    for sequence in data.sequences:
        logits(model, torch.from_numpy(sequence.ids)[None])
    for hook in hooks:
        hook.remove()
    return seen


def profile(
    folder: Path, data: CalibrationSet, out: Path, *, notify: Any = silent, advance: Any = silent, **options: Any
) -> Profile:
    """The calibration pass over a checkpoint on the CPU."""
    checkpoint = open_checkpoint(folder)
    return profile_model(
        checkpoint, read_geometry(checkpoint), data, out, ProfileOptions(**{"device": "cpu"} | options),
        tokenizer="t", notify=notify, advance=advance,
    )  # fmt: skip


class LoopBlock:
    """One MoE block in loops, from the tensors on disk."""

    def __init__(self, folder: Path, layer: int) -> None:
        raw = open_checkpoint(folder).config
        self.kind = raw["model_type"]
        self.config = raw.get("text_config", raw)
        mine = f"layers.{layer}."
        self.tensors = {
            name.partition(".mlp.")[2] or name.partition(".block_sparse_moe.")[2]: t.double().numpy()
            for name, t in read_tensors(folder).items()
            if mine in name and not name.startswith("mtp")
        }
        router = "router" if self.kind == "gpt_oss" else "gate"
        self.weight = self.tensors[f"{router}.weight"]
        self.bias = self.tensors.get("router.bias", np.zeros(len(self.weight)))
        self.correction = self.tensors.get("gate.e_score_correction_bias", np.zeros(len(self.weight)))
        self.experts, self.top_k = len(self.weight), self.config["num_experts_per_tok"]

    def distribution(self, x: Array) -> Array:
        """(E,) probabilities over all experts: softmax, or sigmoids scaled to sum to one."""
        logits = self.weight @ x + self.bias
        if self.kind in ("deepseek_v3", "glm4_moe"):
            scores = 1 / (1 + np.exp(-logits))
            return cast(Array, scores / scores.sum())
        powers = np.exp(logits - logits.max())
        return cast(Array, powers / powers.sum())

    def route(self, x: Array, k: int) -> list[tuple[int, float]]:
        """The k chosen experts and their gate weights, best choice first, as a runtime with top-k = k would."""
        logits = self.weight @ x + self.bias
        if self.kind == "gpt_oss":
            chosen = _best(logits, range(self.experts), k)
            powers = [np.exp(logits[e] - logits[chosen[0]]) for e in chosen]
            return [(e, float(p / sum(powers))) for e, p in zip(chosen, powers, strict=True)]
        sigmoid = self.kind in ("deepseek_v3", "glm4_moe")
        scores = 1 / (1 + np.exp(-logits)) if sigmoid else self.distribution(x)
        choice = scores + self.correction
        allowed = self._allowed(choice, 2 if sigmoid else 1)
        chosen = _best(choice, allowed, k)
        gates = [float(scores[e]) for e in chosen]
        always = self.kind in ("mixtral", "qwen3_vl_moe", "qwen3_5_moe")
        if always or (self.kind != "deepseek_v2" and self.config.get("norm_topk_prob")):
            gates = [g / sum(gates) for g in gates]
        factor = self.config.get("routed_scaling_factor", 1.0)
        return [(e, factor * g) for e, g in zip(chosen, gates, strict=True)]

    def _allowed(self, choice: Array, best: int) -> list[int]:
        groups = self.config.get("n_group") or 1
        if self.config.get("topk_method") == "greedy" or groups == 1:
            return list(range(self.experts))
        size = self.experts // groups
        rank = [sum(sorted(choice[g * size : (g + 1) * size])[-best:]) for g in range(groups)]
        chosen = _best(np.array(rank), range(groups), self.config["topk_group"])
        return [e for e in range(self.experts) if e // size in chosen]

    def expert(self, x: Array, e: int) -> tuple[Array, float]:
        """Output (H,) of one expert, and its largest |activation| before the down projection."""
        if self.kind == "gpt_oss":
            both = x @ self.tensors["experts.gate_up_proj"][e] + self.tensors["experts.gate_up_proj_bias"][e]
            limit = self.config["swiglu_limit"]
            gate, up = np.minimum(both[0::2], limit), np.clip(both[1::2], -limit, limit)
            inner = (up + 1) * gate / (1 + np.exp(-1.702 * gate))
            out = inner @ self.tensors["experts.down_proj"][e] + self.tensors["experts.down_proj_bias"][e]
            return out, float(np.abs(inner).max())
        gate, up, down = self._projections(e)
        inner = (gate @ x) / (1 + np.exp(-(gate @ x))) * (up @ x)
        return down @ inner, float(np.abs(inner).max())

    def _projections(self, e: int) -> tuple[Array, Array, Array]:
        """(I, H), (I, H), (H, I) of one expert, from whichever layout the family has."""
        one = f"experts.{e}."
        if "experts.gate_up_proj" in self.tensors:
            both, down = self.tensors["experts.gate_up_proj"][e], self.tensors["experts.down_proj"][e]
            if self.kind == "qwen3_vl_moe":
                both, down = both.T, down.T
            return both[: len(both) // 2], both[len(both) // 2 :], down
        names = ("w1", "w3", "w2") if self.kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        gate, up, down = (self.tensors[f"{one}{name}.weight"] for name in names)
        return gate, up, down

    def output(self, x: Array, k: int) -> Array:
        """(H,) sum of the routed experts, without shared ones."""
        return cast(Array, np.sum([gate * self.expert(x, e)[0] for e, gate in self.route(x, k)], axis=0))

    def statistics(self, inputs: Sequence[torch.Tensor]) -> dict[str, Array]:
        """Everything a profile holds of this block but contributions, over the tokens (T, H) of these sequences."""
        e, k, h = self.experts, self.top_k, self.weight.shape[1]
        shapes: dict[tuple[str, ...], tuple[int, ...]] = {
            ("tokens", "out_sq", "entropy"): (),
            ("count", "gate_sum", "gate_sq_sum", "norm_sum", "norm_sq_sum"): (e,),
            ("gated_norm_sum", "gated_norm_sq_sum", "gated_norm_max", "act_max"): (e,),
            ("gate_norm_sq_sum", "gate_sq_norm_sum"): (e,),
            ("rank_count", "rank_mass"): (e, k),
            ("coact", "coenergy", "gram"): (e, e),
            ("topk_error", "topk_cross", "topk_sq", "lost_mass"): (k,),
            ("out_sum", "out_sq_sum_h"): (e, h),
        }
        sums: dict[str, Array] = {name: np.zeros(shape) for names, shape in shapes.items() for name in names}
        for x in torch.cat(list(inputs)).double().numpy():
            self._add_token(sums, x)
        return sums

    def _add_token(self, sums: dict[str, Array], x: Array) -> None:
        p = self.distribution(x)
        sums["tokens"] += 1
        sums["entropy"] += -sum(float(q * np.log(q)) for q in p)
        routed = self.route(x, self.top_k)
        outputs = {e: self.expert(x, e) for e, _ in routed}
        for rank, (e, g) in enumerate(routed):
            f, peak = outputs[e]
            norm = float(np.sqrt((f * f).sum()))
            for name, value in (
                ("count", 1.0), ("gate_sum", g), ("gate_sq_sum", g * g), ("norm_sum", norm), ("norm_sq_sum", norm**2),
                ("gated_norm_sum", g * norm), ("gated_norm_sq_sum", (g * norm) ** 2), ("gate_norm_sq_sum", g * norm**2),
                ("gate_sq_norm_sum", g * g * norm), ("out_sum", f), ("out_sq_sum_h", f * f),
            ):  # fmt: skip
                sums[name][e] += value
            sums["gated_norm_max"][e] = max(sums["gated_norm_max"][e], g * norm)
            sums["act_max"][e] = max(sums["act_max"][e], peak)
            sums["rank_count"][e, rank] += 1
            sums["rank_mass"][e, rank] += g
            for other, g2 in routed:
                f2 = outputs[other][0]
                sums["coact"][e, other] += 1
                sums["coenergy"][e, other] += g * norm * g2 * float(np.sqrt((f2 * f2).sum()))
                sums["gram"][e, other] += g * g2 * float(f @ f2)
        y, mass = self.output(x, self.top_k), sum(g for _, g in routed)
        sums["out_sq"] += float(y @ y)
        for k in range(1, self.top_k + 1):
            y_k = self.output(x, k)
            sums["topk_error"][k - 1] += float(((y_k - y) ** 2).sum())
            sums["topk_cross"][k - 1] += float(y_k @ y)
            sums["topk_sq"][k - 1] += float(y_k @ y_k)
            sums["lost_mass"][k - 1] += sum(g for _, g in routed[k:]) / mass


def _best(values: Array, among: Sequence[int] | range, k: int) -> list[int]:
    return sorted(among, key=lambda i: -values[i])[:k]
