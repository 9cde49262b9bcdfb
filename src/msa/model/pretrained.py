"""Plain pretrained models: from the Hub, a folder or a GGUF file, by transformers."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from msa.errors import FetchError, ModelError
from msa.model.home import offline

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w.-]+)?")
GGUF_SUFFIX, GGUF_MAGIC = ".gguf", b"GGUF"


def read_weights(path: Path) -> dict[str, Tensor]:
    """Weights of a `.gguf` (in float32) or `.safetensors` file, by the names of transformers.

    Raises:
        ModelError: it is damaged, or of a kind that transformers cannot read.
    """
    if is_gguf(path):
        return dict(read_model(path, torch.float32).state_dict())
    try:
        weights: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: is damaged ({error}); get it again") from error
    return weights


def read_config(source: str | Path) -> Any:
    """Configuration of a plain model.

    Args:
        source: a Hub id (with @REVISION if you like), a folder or a GGUF file.

    Raises:
        ModelError: there is no such model, or it cannot be read.
        FetchError: it is not here, and the network may not be used or does not answer.
    """
    where, options = _place(source)
    with _reading(source):
        config = AutoConfig.from_pretrained(where, **options)
    return _unquantized(config) if is_gguf(source) else config


def read_model(source: str | Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """A plain causal language model in evaluation mode, on the CPU; see `read_config`."""
    where, options = _place(source)
    with _reading(source):
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **options)
    if is_gguf(source):
        model.hf_quantizer = None
        _unquantized(model.config)
    return model.eval()


def read_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a plain model; see `read_config`.

    Raises:
        ModelError: it has none.
    """
    where, options = _place(source)
    with _reading(source):
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{source}: has no fast tokenizer (tokenizer.json); save it with one, for instance by "
            "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)"
        )
    return tokenizer


def is_gguf(source: str | Path) -> bool:
    """True for a GGUF file, by its name."""
    return Path(source).suffix == GGUF_SUFFIX


def is_hub_id(text: str) -> bool:
    """True for what could be a Hub id, "OWNER/NAME" or "OWNER/NAME@REVISION"."""
    return HUB_ID.fullmatch(text) is not None


def hub_options(text: str) -> tuple[str, dict[str, Any]]:
    """Repository of a Hub id, and what transformers and huggingface_hub take beside it."""
    repository, _, revision = text.partition("@")
    options: dict[str, Any] = {"local_files_only": offline() is not None}
    return repository, options | ({"revision": revision} if revision else {})


def _unquantized(config: Any) -> Any:
    """The configuration of weights that were unpacked, to be saved as the plain ones they are."""
    with contextlib.suppress(AttributeError):
        del config.quantization_config
    return config


def _place(source: str | Path) -> tuple[str | Path, dict[str, Any]]:
    """What transformers wants to be told of a source."""
    path = Path(source)
    if is_gguf(path):
        _check_gguf(path)
        return path.parent, {"gguf_file": path.name}
    if path.is_dir():
        return path, {"local_files_only": True}
    if path.exists():
        raise ModelError(f"{path}: expected a folder, a .gguf file or a Hub id")
    if is_hub_id(str(source)):
        return hub_options(str(source))
    raise ModelError(f"{str(source)!r}: no such folder or file, and no Hub id (OWNER/NAME)")


def _check_gguf(path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    with path.open("rb") as file:
        if file.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
            raise ModelError(f"{path}: is no GGUF file, or damaged; get it again")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("reading GGUF files needs the package gguf; type: pip install gguf")


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Let transformers and huggingface_hub show no progress bars."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _reading(source: str | Path) -> Iterator[None]:
    """Let transformers read in silence, and turn what it raises into one line.

    Raises:
        FetchError: a Hub id is not here, and offline or not to be had.
        ModelError: anything else went wrong.
    """
    try:
        with contextlib.ExitStack() as stack:
            if Path(source).exists():
                stack.enter_context(without_bars())
            if is_gguf(source):  # its bar cannot be turned off
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield
    except Exception as error:  # transformers raises what its parts raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if Path(source).exists():
            kind = "GGUF file that is damaged or of a kind that transformers cannot read"
            what = kind if is_gguf(source) else "model that cannot be read"
            raise ModelError(f"{source}: a {what} ({reason})") from error
        if name := offline():
            raise FetchError(
                f"{source}: is not here yet and {name} forbids fetching it; unset it, or give a "
                "folder"
            ) from error
        raise FetchError(f"{source}: cannot be had from the Hub ({reason})") from error
