"""The report as people get it: one page, whole, escaped, the same every time; in a real browser, if there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from expertcut.calibrate.profile import MAXIMA_E, SUMS_E, SUMS_K, BlockRecord, Profile, ProfileMeta
from expertcut.choose.plan import Plan
from expertcut.cli import run
from expertcut.share.curves import sweep_figures
from expertcut.share.inputs import Inputs
from expertcut.share.report import build, render

if TYPE_CHECKING:
    from command_line import Cli

pytest_plugins = ("command_line",)
FIGURES = ["usage", "saliency", "kept", "load", "domains", "specialisation", "top-k", "gain"]


class Page(HTMLParser):
    """What a page holds, and what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: dict[str, dict[str, int]] = {}
        self.loads: list[str] = []
        self.open: list[str] = []
        self._figure = ""
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        if tag == "figure":
            self._figure = found["id"]
            self.figures[self._figure] = {}
        if self._figure:
            part = "axis" if tag == "text" and found.get("class") == "name" else tag
            self.figures[self._figure][part] = self.figures[self._figure].get(part, 0) + 1
        self.loads += [found[name] for name in ("src", "href", "action", "xlink:href") if name in found]
        if tag not in ("meta", "link", "br", "img", "input") and not self.get_starttag_text().endswith("/>"):  # type: ignore[union-attr]
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag == "figure":
            self._figure = ""
        if self.open and self.open[-1] == tag:
            self.open.pop()


@pytest.fixture(scope="module")
def curve(demo_model: Path, profiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of the built-in model, with speeds."""
    out = tmp_path_factory.mktemp("report") / "curve"
    args = ("sweep", demo_model, "--profile", profiled, "--experts", "32,16", "--top-k", "4,3", "--strategy", "energy",
            "--data", "builtin-heldout", "--tokens", 1000, "--seq-len", 64, "--concurrency", 8, "--hardware", "rtx4090",
            "-o", out)  # fmt: skip
    assert run([str(arg) for arg in args]) == 0
    return out


def test_a_page_of_everything(
    cli: Cli, profiled: Path, planned: Path, pruned: Path, curve: Path, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    document = cli("report", profiled, planned, pruned, curve, "-o", page, "--json").document
    assert document["sections"] == ["checkpoint", "plan", "profile", "sweep"]
    assert document["figures"] == [*FIGURES, "trade-off", "pareto"]
    text = page.read_text()
    found = Page(text)
    assert list(found.figures) == document["figures"]
    for parts in found.figures.values():
        assert parts["axis"] == 2 and parts["h3"] == parts["figcaption"] == parts["details"] == parts["svg"] == 1
        assert parts["table"] == 1 and parts["td"] > 2 and parts["button"] == 2
    assert all(where.startswith(("#", "data:image/png;base64,")) for where in found.loads)
    assert "default-src 'none'" in text and "@import" not in text and "url(" not in text
    assert "5.56 MiB → 3.30 MiB" in text and "32 → 16" in text and "expertcut plan _demo_model" in text
    assert "expertcut prune _demo_model" in text and "−40.7%" in text
    again = tmp_path / "again.html"
    assert cli("report", curve, pruned, planned, profiled, "-o", again).code == 0
    assert again.read_bytes() == page.read_bytes(), "neither time nor order of arguments"


def test_figures_say_what_the_profile_says(cli: Cli, profiled: Path, tmp_path: Path) -> None:
    cli("report", profiled, "--by", "energy", "-o", tmp_path / "page.html")
    text, profile = (tmp_path / "page.html").read_text(), Profile.load(profiled)
    cells = [json.loads(found) for found in re.findall(r'<script type="application/json">(.*?)</script>', text)]
    usage, saliency, domains, share = cells
    for at, prefix in enumerate(profile.prefixes):
        stats = profile.layer(prefix)
        assert usage["values"][at] == pytest.approx(stats.count / stats.count.mean(), abs=6e-4)
        order = np.argsort(saliency["values"][at], kind="stable")
        assert (np.diff(stats.gated_norm_sq_sum[order]) >= 0).all(), "by the energy"
        assert saliency["also"]["of"][at] == pytest.approx(stats.gated_norm_sq_sum, rel=1e-3)
        use = profile.arrays[f"{prefix}/count"] / profile.arrays[f"{prefix}/tokens"][:, None]
        for expert, (value, most, kind) in enumerate(
            zip(share["values"][at], share["also"]["of"][at], domains["values"][at], strict=True)
        ):
            if not stats.count[expert]:
                assert value is kind is None
                continue
            assert value == pytest.approx(use[most, expert] / use[:, expert].sum(), abs=6e-4)
            assert use[most, expert] == use[:, expert].max()
            name = profile.meta.domains[most] if value >= 0.5 else "no domain has half"
            assert domains["names"][int(kind)] == name
    assert "Saliency by energy" in text
    shown = cli("show", profiled, "--json").document["layers"][0]["relative_error"]
    assert all(f"<td>{lost:.1%}</td>" in text for lost in shown)


def test_the_page_tells_nothing_of_the_machine(cli: Cli, profiled: Path, planned: Path, tmp_path: Path) -> None:
    profile = Profile.load(profiled)
    told = [{"name": "/home/someone/secret/law.jsonl", "kind": "file", "path": "/home/someone/secret/law.jsonl"}]
    data = [record.model_copy(update={"sources": told}) for record in profile.meta.data]
    Profile(profile.meta.model_copy(update={"data": data}), profile.arrays).save(tmp_path / "profile")
    assert cli("report", tmp_path / "profile", planned, "-o", tmp_path / "page.html").code == 0
    text = (tmp_path / "page.html").read_text()
    assert "law.jsonl" in text and "someone" not in text and str(tmp_path) not in text
    assert "another profile" in text, "the plan was made from the profile with the other sources"


def test_what_dropped_experts_were_chosen_for(cli: Cli, profiled: Path, planned: Path, tmp_path: Path) -> None:
    cli("report", profiled, planned, "-o", tmp_path / "page.html")
    text, profile, plan = (tmp_path / "page.html").read_text(), Profile.load(profiled), Plan.load(planned)
    table = re.findall(r"choices of dropped experts</th>.*?</tbody>", text, re.DOTALL)[0]
    lost = [
        1 - profile.layer(prefix).count[list(entry.kept)].sum() / profile.layer(prefix).count.sum()
        for prefix, entry in plan.layers.items()
    ]
    assert re.findall(r"<td>([\d.]+%)</td>", table) == [f"{share:.1%}" for share in lost]


def test_saliency_weighs_domains_as_the_plan_did(cli: Cli, demo_model: Path, profiled: Path, tmp_path: Path) -> None:
    profile, plan = Profile.load(profiled), tmp_path / "plan.json"
    domain = profile.meta.domains[0]
    made = ("--strategy", "energy", "--experts", 16, "--domain-weights", f"{domain}=1", "-o", plan)
    assert cli("plan", demo_model, "--profile", profiled, *made).code == 0
    for extra, weights in (((), {domain: 1.0}), (("--by", "energy"), None)):
        assert cli("report", profiled, plan, *extra, "-o", tmp_path / "page.html").code == 0
        text = (tmp_path / "page.html").read_text()
        cells = [json.loads(found) for found in re.findall(r'<script type="application/json">(.*?)</script>', text)]
        for prefix, scores in zip(profile.prefixes, cells[1]["also"]["of"], strict=True):
            assert scores == pytest.approx(profile.layer(prefix, weights).gated_norm_sq_sum, rel=1e-3, abs=1e-12)
        assert (f"domains weighed {domain} 1" in text) == (weights is not None)


def test_dark_colours_are_for_screens_alone(cli: Cli, profiled: Path, tmp_path: Path) -> None:
    cli("report", profiled, "-o", tmp_path / "page.html")
    style = (tmp_path / "page.html").read_text().partition("<style>")[2].partition("</style>")[0]
    dark = [line for line in style.splitlines() if "prefers-color-scheme" in line or "data-theme=dark" in line]
    assert dark and all(line.startswith("@media screen") for line in dark), "paper is light"


def test_a_curve_over_top_k_alone_is_drawn_over_top_k(curve: Path) -> None:
    document = json.loads((curve / "sweep.json").read_text())
    whole = [point for point in document["points"] if point["experts"] == 32]
    assert len({point["top_k"] for point in whole}) > 1
    over_size, over_top_k = (sweep_figures(document | {"points": points})[0] for points in (document["points"], whole))
    assert "weights, MiB" in over_size.svg and "weights, MiB" not in over_top_k.svg
    assert "experts activated per token (top-k)" in over_top_k.svg
    assert len(over_size.table[1]) == len(document["points"]) and len(over_top_k.table[1]) == len(whole)


def test_names_from_files_stay_text(cli: Cli, curve: Path, tmp_path: Path) -> None:
    bad = '<script>alert("1")</script>'
    document = json.loads((curve / "sweep.json").read_text()) | {"model": bad}
    for point in document["points"]:
        point["strategy"] = f"{bad}]]>"
    (tmp_path / "sweep.json").write_text(json.dumps(document))
    assert cli("report", tmp_path, "-o", tmp_path / "page.html").code == 0
    text = (tmp_path / "page.html").read_text()
    assert bad not in text and "&lt;script&gt;" in text
    assert len(re.findall("<script", text)) == 1


def test_a_benchmark_is_drawn(cli: Cli, demo_model: Path, profiled: Path, tmp_path: Path) -> None:
    load = ("--engine", "transformers", "--top-k", "4,2", "--concurrency", "1,4", "--input-len", 6, "--output-len", 4)
    assert cli("bench", demo_model, *load, "--rounds", 2, "-o", tmp_path / "load").code == 0
    page = tmp_path / "page.html"
    figures = cli("report", tmp_path / "load", profiled, "-o", page, "--json").document["figures"]
    assert figures[-3:] == ["throughput", "first-token", "latency"]
    text = (tmp_path / "load" / "bench.json").read_text()
    (tmp_path / "bench.json").write_text(text.replace('"experts": 32', '"experts": 48'))
    ran = cli("report", tmp_path / "bench.json", profiled, "-o", page)
    assert ran.code == 2 and "the benchmark is of 48 experts, the model has 32" in ran.err


def test_a_profile_of_256_experts_makes_a_page_that_opens() -> None:
    experts, top_k, layers, random = 256, 8, 58, np.random.default_rng(0)
    meta = {
        "source": "big", "fingerprint": {"geometry": "0" * 64, "sketch": {}}, "tokenizer": "t", "data": [],
        "domains": ["a", "b"], "experts": experts, "top_k": top_k, "pair_domains": False, "moments": False,
        "dtype": "bfloat16", "versions": {},
    }  # fmt: skip
    blocks = [BlockRecord(prefix=f"model.layers.{n}.mlp", layer=n) for n in range(3, 3 + layers)]
    arrays: dict[str, np.ndarray] = {}
    for block in blocks:
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("tokens", "out_sq", "entropy"), (2,))
        shapes |= dict.fromkeys(("count", *SUMS_E, *MAXIMA_E), (2, experts)) | dict.fromkeys(SUMS_K, (2, top_k))
        shapes |= dict.fromkeys(("rank_count", "rank_mass"), (2, experts, top_k))
        arrays |= {f"{block.prefix}/{name}": random.random(shape) for name, shape in shapes.items()}
    profile = Profile(ProfileMeta.model_validate(meta | {"blocks": blocks}), arrays)
    page = render(build(Inputs(profile=profile), None))
    assert len(page.encode()) < 2e6
    assert list(Page(page).figures) == ["usage", "saliency", "load", "domains", "specialisation", "top-k", "gain"]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("{profiled}", "{profiled}"), "a second profile"),
        (("{empty}",), "expected a profile, a checkpoint"),
        (("{missing}",), "expected a profile, a checkpoint"),
        (("{planned}", "--by", "reap"), "--by needs a profile"),
        (("{profiled}", "--by", "rep"), "reap"),
        (("{profiled}", "--by", "odd"), "reads no profile"),
        (("{profiled}", "{other}"), "the sweep is of other"),
        (("{planned}", "-o", "{empty}"), "is a directory"),
        (("{broken}",), "broken.json"),
    ],
)
def test_what_makes_no_page_is_refused(
    args: tuple[str, ...], told: str, cli: Cli, profiled: Path, planned: Path, curve: Path, tmp_path: Path
) -> None:
    places = {"profiled": profiled, "planned": planned, "missing": tmp_path / "missing"}
    for name in ("empty", "other", "broken"):
        places[name] = tmp_path / name
    places["empty"].mkdir()
    places["broken"] = tmp_path / "broken.json"
    places["broken"].write_text("{")
    places["other"].mkdir()
    document = json.loads((curve / "sweep.json").read_text()) | {"model": "some/other"}
    (places["other"] / "sweep.json").write_text(json.dumps(document))
    page = tmp_path / "page.html"
    ran = cli("report", *(arg.format(**places) for arg in args), *(() if "-o" in args else ("-o", page)))
    assert ran.code and told in ran.err, ran
    assert not page.exists() and ran.out == ""


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.timeout(120)
def test_a_browser_opens_it_without_errors(
    cli: Cli, profiled: Path, planned: Path, pruned: Path, curve: Path, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    cli("report", profiled, planned, pruned, curve, "-o", page)
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
             f"--user-data-dir={tmp_path / 'browser'}")  # fmt: skip
    ran = subprocess.run(
        [str(BROWSER), *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=100
    )
    assert "CONSOLE" not in ran.stderr, ran.stderr
    buttons = re.findall(r"<button[^>]*data-export[^>]*>", ran.stdout)
    assert len(buttons) == 20 and not any("hidden" in button for button in buttons), "the script ran to its end"
    assert not re.search(r'<button[^>]*id="theme"[^>]*hidden', ran.stdout)
