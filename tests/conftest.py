"""What every test may use, and surroundings that make runs alike: no Hub, no user's caches, no deadline on examples."""

import os
import tempfile
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parents[1]

hypothesis.settings.register_profile("expertcut", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("expertcut")


def pytest_configure(config: pytest.Config) -> None:
    cache = tempfile.TemporaryDirectory(prefix="expertcut-tests-")
    config.add_cleanup(cache.cleanup)
    os.environ.update(HF_HOME=cache.name, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the source tree."""
    return ROOT


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The built-in model: trained, Qwen3-MoE style, 4 layers, 32 experts, top-4, three shards. Read only."""
    return ROOT / "expertcut" / "_demo_model"
