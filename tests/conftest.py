from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path

import pytest
import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No test goes online or reads what its user has fetched; the default model is the small one.
_HOME = tempfile.TemporaryDirectory(prefix="msa-home-")
os.environ |= {"MSA_OFFLINE": "1", "MSA_HOME": _HOME.name, "MSA_MODEL": "worlds"}
os.environ.pop("MSA_DTYPE", None)
DATA = Path(__file__).parent / "data"
# A backbone small enough to be made in every test.
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
}


def pytest_collection_finish() -> None:
    """Modules and tests stay: no collection of garbage needs to look through them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _as_wide_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output is not wrapped: commands ask for a terminal's width, which test processes may have."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@pytest.fixture(scope="module")
def one_ray(tmp_path_factory):
    """Test processes that run beside each other have one cluster of Ray at a time."""
    from filelock import FileLock

    with FileLock(tmp_path_factory.getbasetemp().parent / "ray.lock"):
        yield


def make_tiny_model(seed: int = 0, **overrides):
    from msa import MSAConfig, MSAForCausalLM

    torch.manual_seed(seed)
    values = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "chunk_size": 8,
        "top_k_documents": 4,
        "routing_layers": [2, 3],
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    return MSAForCausalLM(MSAConfig(**{**values, **overrides})).eval()


def routing_vectors_of(batch: int, tokens: int, seed: int = 0):
    """Routing vectors of random queries of the tiny model's heads, and a mask: all route."""
    from msa.ops.routing import routing_vectors

    queries = torch.randn(batch, tokens, 4, 16, generator=torch.Generator().manual_seed(seed))
    return routing_vectors(queries, 2, "cosine"), torch.ones(batch, tokens, dtype=torch.bool)


def make_tiny_tokenizer(marks=None):
    """Byte-level, no merges: every byte a token, every special string (or these marks) a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from msa.text.prompts import PromptTemplate

    marks = PromptTemplate().special_strings() if marks is None else marks
    specials = ["<|pad|>", "<|im_end|>", *marks]
    specials = list(dict.fromkeys(specials))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*specials, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=specials[2:],
    )


@pytest.fixture(scope="session")
def tiny_model():
    return make_tiny_model()


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return make_tiny_tokenizer()


@pytest.fixture(scope="session")
def encoder(tiny_tokenizer):
    """Makes prompts in the released format."""
    from msa.text.prompts import PromptEncoder

    return PromptEncoder(tiny_tokenizer)


@pytest.fixture
def script(monkeypatch, encoder):
    """See `scripted_asking.scripted`."""
    from scripted_asking import scripted

    return scripted(monkeypatch, encoder)


@pytest.fixture
def path(tmp_path):
    """Where a bank may be made."""
    return tmp_path / "bank"


@pytest.fixture
def bank(path, tiny_model, tiny_tokenizer):
    """A new, empty bank of the tiny model."""
    from msa import MemoryBank

    with MemoryBank.create(path, tiny_model, tiny_tokenizer) as bank:
        yield bank


@pytest.fixture
def queries():
    """Routing vectors and mask of three rows, for the tiny model's heads."""
    return routing_vectors_of(3, 5)


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    return DATA / "golden"
