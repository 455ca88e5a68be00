"""The streaming executor: transformers' logits bit for bit, one layer at a time, nothing read twice or in vain."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import load, logits, profile
from tiny_models import (
    NAMES,
    TINY,
    VOCAB,
    counted_reads,
    messages,
    read_tensors,
    silent,
    tiny_model,
    tokens,
    write_shards,
    write_tiny,
)
from tiny_types import tiny_type

from expertcut.calibrate import executor
from expertcut.calibrate.batches import Batch, batch_of, make_batches
from expertcut.calibrate.data import CalibrationSet
from expertcut.calibrate.executor import LayerStream
from expertcut.calibrate.passage import Passage, out_of_memory, run_through
from expertcut.calibrate.profile import Profile
from expertcut.checkpoint import open_checkpoint
from expertcut.errors import CheckpointError, ExpertcutError
from expertcut.model import read_geometry

CPU = torch.device("cpu")
CARRYING = ("glm_moe_dsa", "glm5_next", "hy_v4", "mistral_large4", "zaya")
"""Types whose layers hand more than hidden states on to the next."""


def stream(folder: Path, dtype: torch.dtype = torch.float32, resident: bool = False) -> LayerStream:
    checkpoint = open_checkpoint(folder)
    return LayerStream(checkpoint, read_geometry(checkpoint), device=CPU, dtype=dtype, resident=resident)


def batches(data: CalibrationSet, micro_tokens: int = 10**6) -> list[Batch]:
    return make_batches([s.ids for s in data.sequences], [0] * len(data.sequences), micro_tokens)


def run(layers: LayerStream, work: list[Batch]) -> list[torch.Tensor]:
    """Logits (B, S, V) of every micro-batch."""
    passage = run_through(layers, work, 1, lambda index, layer: [layer], print, silent)
    parts: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for batch, _, part in passage.logits(0):
        parts.setdefault(batch.rows, []).append(part)
    return [torch.cat(parts[batch.rows], dim=1) for batch in work]


@pytest.fixture(params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(request.param, tmp_path_factory)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_logits_are_those_of_transformers(folder: Path, dtype: torch.dtype) -> None:
    """Same batch shapes, same grouped kernels: not close, equal."""
    work = batches(tokens((21, 21, 21)))
    layers = stream(folder, dtype)
    (found,) = run(layers, work)
    layers.close()
    expected = logits(load(folder, dtype), work[0].ids)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    assert float(expected.float().std()) > 0.1


def test_padding_gets_the_same_mask_as_in_transformers(folder: Path) -> None:
    work = batches(tokens((25, 9, 14)))
    layers = stream(folder)
    (found,) = run(layers, work)
    layers.close()
    expected = logits(load(folder), work[0].ids, work[0].mask)
    real = work[0].domain >= 0
    assert int(real.sum()) == 25 + 9 + 14
    assert torch.equal(found[real], expected[real])


def test_resident_computes_the_same_and_keeps_its_layers(folder: Path) -> None:
    work = batches(tokens((12, 12, 17)), 24)
    once, kept = stream(folder), stream(folder, resident=True)
    expected = run(once, work)
    for _ in range(2):
        assert all(map(torch.equal, run(kept, work), expected))
    assert (len(once._loaded), len(kept._loaded)) == (0, len(kept))
    once.close()
    kept.close()


def test_logits_in_chunks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = batches(tokens((23, 23)))
    layers = stream(folder)
    whole = run(layers, work)
    monkeypatch.setattr(executor, "CHUNK_TOKENS", 14)
    assert [where.stop - where.start for where in layers.chunks(work[0])] == [7, 7, 7, 2]
    parts = run(layers, work)
    monkeypatch.setattr(executor, "CHUNK_LOGITS", VOCAB)
    assert [where.start for where in layers.chunks(work[0])] == list(range(23))
    layers.close()
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-5, atol=1e-5)


def test_logits_of_several_tracks_in_turn(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing of one track is left in the model when another's logits are asked for."""
    layers, work = stream(tiny_model("qwen3_moe", tmp_path_factory)), batches(tokens((20,)))
    passage = run_through(layers, work, 2, lambda index, layer: [layer, layer], print, silent)
    passage.hidden[1] = [hidden + 1 for hidden in passage.hidden[1]]
    apart = [next(passage.logits(track))[2] for track in (0, 1)]
    turns = zip(passage.logits(0), passage.logits(1), strict=True)
    assert all(torch.equal(found[2], expected) for turn in turns for found, expected in zip(turn, apart, strict=True))
    assert not torch.equal(*apart)
    layers.close()


def test_every_tensor_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the language model's tensors, none of the vision tower's and of multi-token prediction, none twice."""
    reads = counted_reads(monkeypatch)
    layers = stream(folder)
    run(layers, batches(tokens((10, 10, 10)), 10))
    layers.close()
    checkpoint = open_checkpoint(folder)
    outside = ("model.visual.", "mtp.", *(f"{b.prefix.removesuffix('mlp')}" for b in read_geometry(checkpoint).mtp))
    expected = {name for name in checkpoint.tensors if not name.startswith(outside)}
    assert reads == dict.fromkeys(expected, 1)


@pytest.mark.parametrize("name", [n for n, t in TINY.items() if "vision_config" in t.config])
def test_vision_tower_stays_on_the_meta_device(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    layers = stream(tiny_model(name, tmp_path_factory))
    run(layers, batches(tokens((10,))))
    visual = [p for n, p in layers.model.named_parameters() if ".visual." in n]
    assert visual and all(p.is_meta for p in visual)
    layers.close()


@pytest.mark.parametrize("name", [n for n, t in TINY.items() if t.config["tie_word_embeddings"]])
def test_tied_embeddings_are_one_tensor(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    layers = stream(tiny_model(name, tmp_path_factory))
    run(layers, batches(tokens((10,))))
    tied = layers.model.all_tied_weights_keys
    assert len(tied) == 1
    for one, other in tied.items():
        assert layers.model.get_parameter(one).data_ptr() == layers.model.get_parameter(other).data_ptr() != 0
    layers.close()


def test_layers_are_released(folder: Path) -> None:
    """Between two layers nothing of either is held but memory to be used again."""
    layers = stream(folder)
    work = batches(tokens((10,)))
    passage = Passage(layers, work, 1, print)
    for index in range(len(layers)):
        passage.step(index, layers.load(index))
        layers.release(index)
        assert not layers._loaded
        assert all(p.is_meta for p in layers._layers[index].parameters())
    layers.close()
    assert not layers._pool._free


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", "qwen3_moe")
    tensors = read_tensors(folder)
    norm, expert = "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.experts.3.up_proj.weight"
    for damage, words in (
        ({n: t for n, t in tensors.items() if n != norm}, (norm,)),
        (tensors | {norm: torch.ones(31)}, (norm, "[31]", "[32]")),
        (tensors | {expert: torch.ones(24, 30)}, (expert, "[24, 30]")),
    ):
        write_shards(folder, damage)
        layers = stream(folder)
        with pytest.raises(CheckpointError) as caught:
            run(layers, batches(tokens((10,))))
        layers.close()
        assert all(word in caught.value.message for word in words), caught.value.message


def test_shard_that_changes_after_opening(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", "qwen3_moe")
    layers = stream(folder)
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes() + b"more")
    with pytest.raises(CheckpointError, match=shard.name):
        run(layers, batches(tokens((10,))))
    layers.close()


class Hungry:
    """Makes a decoder layer ask for more memory than there is when it gets more than `rows` sequences."""

    def __init__(self, rows: int) -> None:
        self.rows, self.failures = rows, 0

    def __call__(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[0] > self.rows:
            self.failures += 1
            torch.empty(1 << 60, dtype=torch.uint8)


def halved(folder: Path) -> None:
    """Run with memory for two sequences in the second layer, and compare."""
    data = tokens((20, 20, 20, 20, 20, 13, 9))
    layers = stream(folder)
    expected = run(layers, batches(data, 10**6))
    hungry = Hungry(2)
    heard, notify = messages()
    passage = Passage(layers, batches(data, 10**6), 1, notify)
    for index in range(len(layers)):
        layer = layers.load(index)
        hook = layer.register_forward_pre_hook(hungry) if index == 1 else None
        passage.step(index, layer)
        if hook is not None:
            hook.remove()
        layers.release(index)
    found = {row: part[b] for work, _, part in passage.logits(0) for b, row in enumerate(work.rows)}
    layers.close()
    assert hungry.failures == len(heard) == 3  # 7 → 3 + 4 → 1 + 2 + 2 + 2
    assert all("halved" in message for message in heard)
    assert "7 sequences" in heard[0]
    for b, row in enumerate(batches(data)[0].rows):
        length = len(data.sequences[row].ids)
        torch.testing.assert_close(found[row][:length], expected[0][b, :length], rtol=1e-4, atol=1e-4)


def test_lack_of_memory_halves_the_micro_batch(folder: Path) -> None:
    halved(folder)


@pytest.mark.parametrize("name", CARRYING)
def test_what_layers_hand_on_is_halved_too(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tiny_type(name, tmp_path_factory)
    layers = stream(folder)
    assert layers._carried is not None
    layers.close()
    halved(folder)


def test_single_sequence_that_does_not_fit(tmp_path_factory: pytest.TempPathFactory) -> None:
    layers = stream(tiny_model("qwen3_moe", tmp_path_factory))
    passage = Passage(layers, batches(tokens((10, 10))), 1, print)
    layer = layers.load(0)
    layer.register_forward_pre_hook(Hungry(0))
    with pytest.raises(ExpertcutError, match="single sequence of 10 tokens") as caught:
        passage.step(0, layer)
    assert "--seq-len" in str(caught.value.hint)
    layers.close()


def test_other_errors_are_not_taken_for_lack_of_memory() -> None:
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(caught.value)


LIMITED = """
import json, resource, sys
from pathlib import Path
sys.path[:0] = {paths!r}
import torch
from reference import profile
from tiny_models import tokens
data = tokens((128,) * 512, seed=3)
folder, out = Path({folder!r}), Path({out!r})
profile(folder, tokens((16,)), out / "first")
heard = []
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {allowance}, used + {allowance}))
profile(folder, data, out / "second", micro_tokens=512 * 128, notify=heard.append)
print(json.dumps(heard))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits and measures address space as Linux does")
def test_a_real_limit_on_memory(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The operating system refuses memory in the middle of a layer; the sums are those of an unlimited run."""
    folder = tiny_model("qwen3_moe", tmp_path_factory)
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    script = LIMITED.format(paths=paths, folder=str(folder), out=str(tmp_path), allowance=60 * 2**20)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    heard = json.loads(done.stdout.splitlines()[-1])
    assert heard and "halved" in heard[0]
    expected = profile(folder, tokens((128,) * 512, seed=3), tmp_path / "free", micro_tokens=512 * 128)
    found = Profile.load(tmp_path / "second")
    for prefix in expected.prefixes:
        assert (found.layer(prefix).count == expected.layer(prefix).count).all()


def test_micro_batches() -> None:
    """Every sequence once, longest first, at most as many tokens as asked for, padding marked."""
    data = tokens((5, 40, 17, 40, 3))
    work = make_batches([s.ids for s in data.sequences], [0, 1, 0, 1, 0], 80)
    assert sorted(row for batch in work for row in batch.rows) == [0, 1, 2, 3, 4]
    assert [len(batch.rows) for batch in work] == [2, 3]
    assert [batch.ids.shape[1] for batch in work] == [40, 17]
    for batch in work:
        for b, row in enumerate(batch.rows):
            length = len(data.sequences[row].ids)
            assert (batch.ids[b, :length].numpy() == data.sequences[row].ids).all()
            assert (batch.domain[b, :length] == [0, 1, 0, 1, 0][row]).all()
            assert (batch.domain[b, length:] == -1).all() and (batch.ids[b, length:] == 0).all()
    assert work[0].mask is None and work[1].mask is not None
    assert batch_of(work[1].rows, [s.ids for s in data.sequences], [0, 1, 0, 1, 0]).ids.equal(work[1].ids)


def test_halves_are_what_their_sequences_alone_would_be() -> None:
    data = tokens((30, 20, 8, 5))
    ids, domains = [s.ids for s in data.sequences], [0, 0, 1, 1]
    whole = make_batches(ids, domains, 10**6)[0]
    for half in whole.halves():
        alone = batch_of(half.rows, ids, domains)
        assert half.ids.equal(alone.ids) and half.domain.equal(alone.domain)
