"""Tasks of lm-eval on local files, one of each kind, and a server of OpenAI's completions protocol."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from reference import load, logits
from transformers import AutoTokenizer

SUMS = [(a, b) for a in range(2, 8) for b in (3, 5)]
CHOICE, GIVEN, TEXT, WRITTEN, GROUP = "local_choice", "local_given", "local_text", "local_written", "local_group"


def write_tasks(folder: Path) -> Path:
    """Products as a choice of four, as a given and as a written answer, as text; the first two also as a group."""
    docs = [
        {"q": f"7*8=56\n9*2=18\n{a}*{b}=", "answer": str(a * b), "key": i % 4,
         "choices": [str(a * b + (j - i % 4) * 7) for j in range(4)]}
        for i, (a, b) in enumerate(SUMS)
    ]  # fmt: skip
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    asks = {"doc_to_text": "{{q}}", "doc_to_target": "{{answer}}\\n", "target_delimiter": ""}
    mean = {"aggregation": "mean", "higher_is_better": True}
    _write(folder, data, CHOICE, output_type="multiple_choice", doc_to_text="{{q}}", doc_to_target="key",
           doc_to_choice="choices", target_delimiter="",
           metric_list=[{"metric": name} | mean for name in ("acc", "acc_norm")])  # fmt: skip
    _write(folder, data, GIVEN, output_type="loglikelihood", **asks,
           metric_list=[{"metric": "acc"} | mean,
                        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}])  # fmt: skip
    _write(folder, data, TEXT, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{q}}{{answer}}",
           metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}])  # fmt: skip
    _write(folder, data, WRITTEN, output_type="generate_until", doc_to_text="{{q}}", doc_to_target="{{answer}}",
           target_delimiter="", num_fewshot=2, fewshot_split="test", fewshot_delimiter="\n",
           generation_kwargs={"until": ["\n"], "do_sample": False, "max_gen_toks": 6},
           metric_list=[{"metric": "exact_match"} | mean])  # fmt: skip
    group = {"group": GROUP, "task": [CHOICE, GIVEN],
             "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}  # fmt: skip
    (folder / "group.yaml").write_text(json.dumps(group))
    return folder


def _write(folder: Path, data: Path, name: str, **members: Any) -> None:
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test", "num_fewshot": 0} | members  # fmt: skip
    (folder / f"{name}.yaml").write_text(json.dumps(task).replace("\\\\n", "\\n"))  # JSON is YAML


@contextmanager
def completions_server(folder: Path, *names: str) -> Iterator[str]:
    """Serve a checkpoint under these names, by transformers, greedily; yields the URL."""
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)

    def complete(ids: list[int], new: int, stops: list[str]) -> str:
        written: list[int] = []
        while len(written) < new and not any(stop in tokenizer.decode(written) for stop in stops):
            written.append(int(logits(model, torch.tensor([ids + written]))[0, -1].argmax()))
        text = str(tokenizer.decode(written))
        return min((text.partition(stop)[0] for stop in stops), key=len, default=text)

    def echo(ids: list[int]) -> dict[str, Any]:
        log_p = logits(model, torch.tensor([ids]))[0].log_softmax(-1)
        best = log_p.max(-1).values.tolist()
        own = log_p[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].tolist()
        top = [{"own": mine, "best": most} for mine, most in zip(own, best, strict=False)]
        return {"token_logprobs": [None, *own, best[-1]], "top_logprobs": [None, *top, {"best": best[-1]}]}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"data": [{"id": name} for name in names]})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            choices: list[dict[str, Any]] = []
            for index, ids in enumerate(asked["prompt"]):
                if asked.get("echo"):
                    choices.append({"index": index, "logprobs": echo(ids)})
                else:
                    choices.append({"index": index, "text": complete(ids, asked["max_tokens"], asked["stop"])})
            assert asked["model"] in names
            self.answer({"choices": choices})

        def answer(self, document: dict[str, Any]) -> None:
            body = json.dumps(document).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
