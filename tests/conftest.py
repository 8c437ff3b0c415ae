"""Steady tests: one thread, no randomness from outside, no network."""

from __future__ import annotations

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import pytest
import torch
from helpers import GOLDEN, TOKENIZERS, golden_tokenizer, tiny_llava
from hypothesis import settings
from safetensors.torch import load_file

torch.set_num_threads(1)
settings.register_profile("steady", deadline=None, derandomize=True, database=None, max_examples=80)
settings.load_profile("steady")


@pytest.fixture(scope="session")
def golden_tensors() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "vectors.safetensors")


@pytest.fixture(scope="session", params=TOKENIZERS)
def tokenizer(request):
    return golden_tokenizer(request.param)


@pytest.fixture(scope="session")
def llava():
    """A tiny random model that every test may use and none may change."""
    return tiny_llava()


@pytest.fixture
def fast_gc():
    """Let the collector look at the objects of this test only."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
