"""What runtimes accept and what they are fast at, as data: one row per rule, over a few facts about a checkpoint.

Each rule names its runtimes, the checkpoints it concerns, what must hold, what happens otherwise, and the source it was
read from, at the versions of `READ`. Rows may share a name where runtimes differ in the outcome, or where several
things must hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Status = Literal["fast", "loads", "wrong", "refuses"]
"""From best to worst: on the fast path; correct but slower; loads, and silently computes another model; fails."""

READ: Mapping[str, str] = {
    "transformers": "5.23", "vLLM": "0.33", "SGLang": "0.5.23", "llama.cpp": "November 2026",
    "TensorRT-LLM": "November 2026", "mlx-lm": "November 2026",
}  # fmt: skip
"""The version, or month, of each runtime whose source the rules were read from."""
RUNTIMES = tuple(READ)


@dataclass(frozen=True, slots=True)
class LintSubject:
    """What the rules look at; `dataclasses.replace` it to ask about another count, top-k or split."""

    model_type: str
    experts: int
    """Routed experts of every MoE layer."""
    top_k: int
    n_group: int = 1
    topk_group: int = 1
    group_best: int = 1
    """How many experts of a group the router looks at to rank the group; 1 if it ranks none."""
    grouped: bool = False
    """The config has `n_group`, even if it is 1: runtimes then take their grouped router."""
    correction_bias: bool = False
    """Experts are chosen by score plus bias, as in DeepSeek-V3."""
    quant_method: str | None = None
    """`quantization_config.quant_method`, such as fp8, mxfp4, compressed-tensors."""
    tied_head: bool = False
    """The output head is the embedding and has no tensor of its own."""
    expert_key: str | None = None
    """The Hub's config key for the expert count, where the config lacks it (an alias is there instead)."""
    width: int | None = None
    """Intermediate size of a routed expert, if it matters how it is split."""
    heads: int | None = None
    """Attention heads, if it matters how they are split."""
    block: int | None = None
    """Rows that share a scale in a block-FP8 checkpoint."""
    uneven: bool = False
    """Layers differ in expert count or top-k."""
    layers: tuple[tuple[int, int], ...] = ()
    """Where layers differ, each one's experts and top-k; `experts` and `top_k` are the most of them."""
    mtp_uneven: bool = False
    """Multi-token-prediction layers hold another number of experts than the trunk."""
    mtp_missing: bool = False
    """The config announces, by a key that llama.cpp reads, multi-token-prediction layers that have no tensors."""
    misread: int | None = None
    """A layer whose experts are stored quantised, and which vLLM takes for unquantised."""
    tp: int = 1
    """Tensor-parallel size."""
    ep: int = 1
    """Expert-parallel size."""
    redundant: int = 0
    """Extra copies of experts that an expert-parallel load balancer adds."""

    @property
    def per_group(self) -> int:
        """Experts in a group, rounded down."""
        return self.experts // self.n_group

    @property
    def reachable(self) -> int:
        """Experts among which a token's top-k is taken, after the choice of groups."""
        return self.per_group * self.topk_group if self.n_group > 1 else self.experts

    @property
    def grouped_kernel(self) -> bool:
        """Engines with a fused DeepSeek-V3 router use it, whatever the number of groups."""
        return self.grouped and self.correction_bias


@dataclass(frozen=True, slots=True)
class Rule:
    """For `runtimes`: where `concerns` is true, `holds` must be, or else `status`, for `reason`.

    Asked of every layer with its own experts and top-k, where layers differ.
    """

    name: str
    runtimes: tuple[str, ...]
    status: Status
    concerns: Callable[[LintSubject], bool]
    holds: Callable[[LintSubject], bool]
    reason: str
    """A format string over the subject `s`."""
    source: str
    tunable: bool = False
    """A tuning run on the serving machine brings the speed back."""


_ALL_BUT_VLLM = ("transformers", "SGLang", "llama.cpp", "TensorRT-LLM", "mlx-lm")
_POWERS = frozenset(2**i for i in range(10))
_VLLM_TOP_K = _POWERS | {192, 320, 384, 448, 576}
_VLLM_TUNED = frozenset({1, 8, 16, 20, 32, 40, 60, 62, 64, 72, 128, 129, 160, 256, 384, 512})
_FUSED_SHARED = {"deepseek_v3": 256, "deepseek_v32": 256, "kimi_k2": 384}
QUANTISED = frozenset({"awq", "compressed-tensors", "fp8", "gptq", "modelopt", "modelopt_fp4"})
"""Methods of quantisation whose buffers, in vLLM, are as long as the layer has experts, not the model."""
_TRTLLM_GEN = ("fp8", "mxfp4", "nvfp4", "modelopt", "modelopt_fp4")


def _fused_grouped_top_k(s: LintSubject) -> bool:
    if s.n_group == 1:
        return s.experts <= 512 and (s.top_k <= 8 or s.top_k == 22)
    in_use = s.per_group * s.topk_group
    return s.experts <= 256 and s.per_group <= 32 and in_use <= 128 and s.top_k <= 8 and s.topk_group <= 4


RULES = (
    Rule(
        "alike", ("transformers",), "refuses",
        lambda s: True, lambda s: not s.uneven,
        "layers differ in expert count or top-k: loaded only by expertcut.runtimes.transformers",
        "no configuration per layer",
    ),
    Rule(
        "alike", ("vLLM",), "refuses",
        lambda s: s.quant_method is None or s.quant_method in QUANTISED, lambda s: not s.uneven,
        "layers differ in expert count or top-k: served only with expertcut installed beside it",
        "no configuration per layer",
    ),
    Rule(
        "alike", ("vLLM",), "refuses",
        lambda s: s.quant_method is not None and s.quant_method not in QUANTISED, lambda s: not s.uneven,
        "layers differ in expert count or top-k, which expertcut's plug-in does not serve in {s.quant_method}",
        "models/gpt_oss.py: experts are viewed by the model's count",
    ),
    Rule(
        "alike", ("SGLang", "llama.cpp", "TensorRT-LLM", "mlx-lm"), "refuses",
        lambda s: True, lambda s: not s.uneven,
        "layers differ in expert count or top-k, one of each serves the whole model", "no configuration per layer",
    ),
    Rule(
        "groups", _ALL_BUT_VLLM, "refuses",
        lambda s: s.n_group > 1, lambda s: s.experts % s.n_group == 0,
        "{s.experts} experts do not split into n_group={s.n_group} equal groups",
        "routers reshape scores to (T, n_group, E / n_group)",
    ),
    Rule(
        "groups", ("vLLM",), "wrong",
        lambda s: s.n_group > 1, lambda s: s.experts % s.n_group == 0 and s.experts > s.n_group,
        "{s.experts} experts do not split into n_group={s.n_group} groups of two or more: it routes without groups",
        "grouped_topk_router.py valid_grouping",
    ),
    Rule(
        "group-size", ("SGLang", "llama.cpp", "TensorRT-LLM", "mlx-lm"), "refuses",
        lambda s: s.n_group > 1, lambda s: s.per_group >= s.group_best,
        "{s.per_group} experts a group, but the router ranks a group by its best {s.group_best}",
        "top-2 within a group",
    ),
    Rule(
        "group-size", ("transformers",), "refuses",
        lambda s: s.group_best > 1, lambda s: s.per_group >= s.group_best,
        "{s.per_group} experts a group, but the router ranks a group by its best {s.group_best}",
        "DeepseekV3TopkRouter: topk(2) within a group",
    ),
    Rule(
        "top-k", RUNTIMES, "refuses",
        lambda s: s.n_group == 1, lambda s: s.top_k <= s.experts,
        "top-{s.top_k} of {s.experts} experts", "torch.topk",
    ),
    Rule(
        "top-k-in-groups", RUNTIMES, "wrong",
        lambda s: s.n_group > 1, lambda s: s.top_k <= s.reachable,
        "top-{s.top_k} of the {s.reachable} experts in topk_group={s.topk_group} groups: masked ones would be chosen",
        "transformers DeepseekV3TopkRouter: masked_fill before topk",
    ),
    Rule(
        "proper-groups", ("llama.cpp",), "refuses",
        lambda s: s.n_group > 1, lambda s: s.topk_group < s.n_group,
        "topk_group={s.topk_group} must be less than n_group={s.n_group}", "llama-model.cpp hyperparameters",
    ),
    Rule(
        "max-experts", ("llama.cpp",), "refuses",
        lambda s: True, lambda s: s.experts <= 1024,
        "{s.experts} experts, at most 1024 are supported (512 before Kimi-K3 was)", "LLAMA_MAX_EXPERTS",
    ),
    Rule(
        "top-k-kernel", ("vLLM",), "loads",
        lambda s: s.n_group == 1 and not s.grouped_kernel and s.model_type != "deepseek_v4",
        lambda s: s.experts in _VLLM_TOP_K,
        "no fused top-k kernel for {s.experts} experts (powers of two up to 512, 192, 320, 384, 448, 576 have one)",
        "csrc/moe/topk_softmax_kernels.cu",
    ),
    Rule(
        "top-k-kernel", ("vLLM",), "refuses",
        lambda s: s.model_type == "deepseek_v4", lambda s: s.experts in _VLLM_TOP_K,
        "the router kernel has no case for {s.experts} experts (powers of two up to 512, 192, 320, 384, 448, 576)",
        "dsv4_topk.py",
    ),
    Rule(
        "grouped-kernel", ("vLLM", "TensorRT-LLM"), "loads",
        lambda s: s.grouped_kernel, _fused_grouped_top_k,
        "{s.experts} experts in {s.n_group} groups, top-{s.top_k}: outside the fused grouped top-k kernel",
        "vLLM csrc/moe/grouped_topk_kernels.cu, TensorRT-LLM noAuxTcKernels.cu",
    ),
    Rule(
        "tuned-config", ("vLLM",), "loads",
        lambda s: True, lambda s: s.experts in _VLLM_TUNED,
        "no tuned expert kernel for {s.experts} experts, up to 2x slower until tuned: "
        "python benchmarks/kernels/benchmark_moe.py --model DIR --tp-size {s.tp} --tune",
        "fused_moe/configs", tunable=True,
    ),
    Rule(
        "trtllm-fp8", ("vLLM",), "loads",
        lambda s: s.quant_method == "fp8", lambda s: s.experts % 4 == 0 and s.experts <= 512,
        "the FP8 kernels of TensorRT-LLM want a multiple of 4 up to 512, not {s.experts} experts: others serve it",
        "experts/trtllm_fp8_moe.py",
    ),
    Rule(
        "trtllm-gen", ("TensorRT-LLM",), "loads",
        lambda s: s.quant_method in _TRTLLM_GEN, lambda s: s.experts % 4 == 0 and s.experts > s.top_k,
        "the generated kernels want a multiple of 4 above top-{s.top_k}, not {s.experts} experts: others serve it",
        "fp8BlockScaleMoe.cpp",
    ),
    Rule(
        "top-k-kernel", ("SGLang",), "loads",
        lambda s: True, lambda s: s.experts in _POWERS,
        "no fused top-k kernel for {s.experts} experts (powers of two up to 512 have one)", "sgl-kernel csrc/moe",
    ),
    Rule(
        "shared-fusion", ("SGLang",), "loads",
        lambda s: s.model_type in _FUSED_SHARED, lambda s: s.experts == _FUSED_SHARED[s.model_type],
        "the shared expert is fused into the routed kernel at the original expert count only, not at {s.experts}",
        "deepseek_v2.py determine_num_fused_shared_experts",
    ),
    Rule(
        "tensor-parallel", ("vLLM", "SGLang"), "refuses",
        lambda s: s.tp > 1, lambda s: s.tp <= s.experts,
        "tensor-parallel size {s.tp} exceeds {s.experts} experts", "model files, such as qwen3_moe.py",
    ),
    Rule(
        "tensor-parallel", ("vLLM", "SGLang"), "refuses",
        lambda s: s.tp > 1 and s.heads is not None, lambda s: s.heads is not None and s.heads % s.tp == 0,
        "{s.heads} attention heads do not split over {s.tp} ranks", "vLLM config/model.py, SGLang model files",
    ),
    Rule(
        "tensor-parallel", ("vLLM", "SGLang"), "refuses",
        lambda s: s.tp > 1 and s.width is not None, lambda s: s.width is not None and s.width % s.tp == 0,
        "experts of width {s.width} do not split over {s.tp} ranks", "vLLM fused_moe/config.py, SGLang layer.py",
    ),
    Rule(
        "tensor-parallel", ("vLLM", "SGLang"), "refuses",
        lambda s: s.width is not None and s.block is not None,
        lambda s: s.width is None or s.block is None or s.width % (s.tp * s.block) == 0,
        "experts of width {s.width} on {s.tp} ranks are no whole blocks of {s.block} (weight_block_size)",
        "vLLM fp8_utils.py validate_fp8_block_shape_moe, SGLang quantization/fp8.py",
    ),
    Rule(
        "expert-parallel", ("vLLM",), "loads",
        lambda s: s.ep > 1, lambda s: (s.experts + s.redundant) % s.ep == 0,
        "{s.experts} + {s.redundant} redundant experts do not split over {s.ep} ranks: no load balancing (EPLB)",
        "distributed/eplb",
    ),
    Rule(
        "expert-parallel", ("SGLang",), "refuses",
        lambda s: s.ep > 1, lambda s: (s.experts + s.redundant) % s.ep == 0,
        "{s.experts} + {s.redundant} redundant experts do not split over {s.ep} ranks",
        "fused_moe_triton/layer.py",
    ),
    Rule(
        "expert-scheme", ("vLLM",), "refuses",
        lambda s: s.quant_method is not None, lambda s: s.misread is None,
        "quantization_config makes it take all experts of layer {s.misread} for unquantised, by an entry for expert 0 "
        "or one that begins with the layer's experts, but they are stored quantised",
        "compressed_tensors_moe.py get_moe_method, quant_utils.py is_layer_skipped",
    ),
    Rule(
        "mtp-count", ("vLLM", "SGLang", "llama.cpp", "TensorRT-LLM"), "refuses",
        lambda s: True, lambda s: not s.mtp_uneven,
        "multi-token-prediction layers hold another number of experts than the config says: prune with --drop-mtp",
        "one expert count in the config",
    ),
    Rule(
        "mtp-announced", ("llama.cpp",), "refuses",
        lambda s: True, lambda s: not s.mtp_missing,
        "the config announces multi-token-prediction layers that have no tensors, which few of its architectures load: "
        "prune with --drop-mtp",
        "src/models, ggml-org/llama.cpp#21172",
    ),
    Rule(
        "hub-keys", ("mlx-lm",), "refuses",
        lambda s: True, lambda s: s.expert_key is None,
        "config.json lacks {s.expert_key}, which mlx-lm reads", "models: ModelArgs",
    ),
    Rule(
        "own-head", ("mlx-lm",), "refuses",
        lambda s: s.model_type == "deepseek_v3", lambda s: not s.tied_head,
        "no lm_head.weight (tied embeddings), which its deepseek_v3 wants", "models/deepseek_v3.py",
    ),
    Rule(
        "own-head", ("vLLM",), "wrong",
        lambda s: s.model_type in ("deepseek_v2", "deepseek_v3"), lambda s: not s.tied_head,
        "no lm_head.weight (tied embeddings): its DeepSeek models leave the head uninitialised",
        "models/deepseek_v2.py, seen with 0.32 on CPU",
    ),
)  # fmt: skip
