"""bank.json: what a bank was made with, so that it is never asked with anything else."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

import msa
from msa.errors import BankCorruptError, BankMismatchError, BankNotFoundError, ConfigError
from msa.memory.store.durable_files import storage_errors, write_file
from msa.model.identity import checkpoint_name, model_fingerprints
from msa.ops.quantization import PACKED
from msa.text.prompts import PromptTemplate
from msa.types import whole_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from msa.model.modeling_msa import MSAForCausalLM

BANK_FILE = "bank.json"
FORMAT = "msa-bank"
FORMAT_VERSION = 1
DEFAULT_DOCUMENT_TOKENS = 512
MIN_DOCUMENT_TOKENS = 32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Text whose token ids tell tokenizers apart that share a vocabulary.
_PROBE = (
    "<|im_start|>user\n [17]. The 1st   of MAY, 1984: naïve café — 北京, Привет!\t'quotes' "
    "e.g. don't; x=3.14e-10 \u200b🙂 ÅÅ\r\nEnd-of-Retrieve<End-of-Retrieve><|object_ref_end|>"
)

_tokenizer_hashes: WeakKeyDictionary[Any, tuple[int, str]] = WeakKeyDictionary()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the vocabulary and of the token ids of a fixed text.

    Not of the tokenizer's file, whose form changes with the library's version.

    Source: ours.
    """
    known = _tokenizer_hashes.get(tokenizer)
    if known is not None and known[0] == len(tokenizer):
        return known[1]
    vocabulary = sorted(tokenizer.get_vocab().items())
    ids = tokenizer.encode(_PROBE, add_special_tokens=False)
    value = hashlib.sha256(json.dumps([vocabulary, ids]).encode()).hexdigest()
    _tokenizer_hashes[tokenizer] = (len(tokenizer), value)
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The contents of bank.json.

    Attributes:
        format, format_version: "msa-bank", 1.
        created: ISO 8601, UTC.
        msa_version: version of this package that made the bank.
        model: name or path of the model, to tell people.
        weights, router, tokenizer: fingerprints.
        states: fingerprint of those weights that the states of documents depend on; None in banks
            made before it was written.
        template: fields of the prompt template.
        chunk_size, routing_layers, routing_score, top_k_documents: of the model.
        num_key_value_heads, head_dim: shape of a chunk's state.
        dtype: of the states on disk: "float32", "bfloat16" or "float16".
        content_dtype: of the content on disk: the same, or "int8", "fp8" or "int4" (packed rows
            with scales, see `msa.ops.quantization.pack`).
        max_document_tokens: longer documents are split into parts of at most so many tokens.
    """

    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    created: str
    msa_version: str
    model: str
    weights: str
    router: str
    tokenizer: str
    template: dict[str, str]
    chunk_size: int
    routing_layers: tuple[int, ...]
    routing_score: str
    top_k_documents: int
    num_key_value_heads: int
    head_dim: int
    dtype: str
    content_dtype: str
    max_document_tokens: int
    states: str | None = None

    @property
    def packed(self) -> str | None:
        """Precision of packed content; None when content is stored in `dtype`."""
        return None if self.content_dtype == self.dtype else self.content_dtype

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype of the states on disk."""
        return DTYPES[self.dtype]

    @property
    def prompt_template(self) -> PromptTemplate:
        """Text format of the documents."""
        return PromptTemplate(**self.template)

    @classmethod
    def for_model(
        cls,
        model: MSAForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        template: PromptTemplate,
        dtype: torch.dtype | None,
        max_document_tokens: int | None,
        content_dtype: str | None = None,
    ) -> Manifest:
        """Describe a new bank.

        Raises:
            ConfigError: a dtype or the document length cannot be used.
            InputError: the document length is no whole number.
        """
        config = model.config
        name = str(dtype or model.dtype).removeprefix("torch.")
        if name not in DTYPES:
            raise ConfigError(f"dtype={name}: a bank holds one of {', '.join(DTYPES)}")
        content = content_dtype or name
        if content != name and content not in PACKED:
            raise ConfigError(
                f"content_dtype={content}: expected {', '.join(PACKED)}, or {name} as the other "
                "states are stored"
            )
        positions = int(config.max_position_embeddings)
        limit = min(DEFAULT_DOCUMENT_TOKENS, positions)
        if max_document_tokens is not None:
            limit = whole_number(max_document_tokens, "max_document_tokens")
        if not MIN_DOCUMENT_TOKENS <= limit <= positions:
            raise ConfigError(
                f"max_document_tokens={limit}: expected {MIN_DOCUMENT_TOKENS} to {positions}, "
                "the model's positions"
            )
        fingerprints = model_fingerprints(model)
        return cls(
            created=datetime.now(UTC).isoformat(),  # to the microsecond: it tells banks apart
            msa_version=msa.__version__,
            model=checkpoint_name(model),
            weights=fingerprints.weights,
            router=fingerprints.router,
            states=fingerprints.states,
            tokenizer=tokenizer_fingerprint(tokenizer),
            template=asdict(template),
            chunk_size=int(config.chunk_size),
            routing_layers=tuple(config.routing_layers or ()),
            routing_score=config.routing_score,
            top_k_documents=int(config.top_k_documents),
            num_key_value_heads=int(config.num_key_value_heads or config.num_attention_heads),
            head_dim=int(config.head_dim),
            dtype=name,
            content_dtype=content,
            max_document_tokens=limit,
        )

    def save(self, folder: Path) -> None:
        """Write bank.json durably; from then on the folder is a bank."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
        with storage_errors(f"write {folder / BANK_FILE}"):
            write_file(folder / BANK_FILE, [text.encode()])

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read bank.json.

        Raises:
            BankNotFoundError: the folder is no bank.
            BankMismatchError: the bank has another format version.
            BankCorruptError: bank.json is there and cannot be understood.
        """
        path = folder / BANK_FILE
        if not path.is_file():
            raise BankNotFoundError(
                f"'{folder}' is not a memory bank (it has no {BANK_FILE}); "
                "make one with 'msa index' or MemoryBank.create"
            )
        try:
            values = json.loads(path.read_bytes())
        except ValueError as error:
            raise BankCorruptError(f"{path} is damaged ({error}); restore it") from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise BankNotFoundError(f"'{folder}' is not a memory bank: {path} is something else")
        if values.get("format_version") != FORMAT_VERSION:
            raise BankMismatchError(
                f"Bank '{folder}' has format version {values.get('format_version')}; this version "
                f"of msa reads {FORMAT_VERSION}. Use the msa that made it "
                f"({values.get('msa_version')}), or index the documents again"
            )
        names = {f.name for f in fields(cls)}
        # banks made before these were written
        values.setdefault("content_dtype", values.get("dtype"))
        values.setdefault("states", None)
        known = values.get("dtype") in DTYPES and values["content_dtype"] in (
            values["dtype"],
            *PACKED,
        )
        if set(values) != names or not known:
            wrong = sorted(set(values) ^ names) or ["dtype", "content_dtype"]
            raise BankCorruptError(f"{path} is damaged (fields {wrong}); restore it")
        values["routing_layers"] = tuple(values["routing_layers"])
        return cls(**values)

    def check(
        self,
        folder: Path,
        model: MSAForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        template: PromptTemplate | None,
    ) -> None:
        """Refuse a model, tokenizer or template that the bank was not made with.

        A model that differs above the last routing layer alone makes the same bank, and is taken.

        Raises:
            BankMismatchError: the message says what differs and what to do.
        """
        given = Manifest.for_model(
            model,
            tokenizer,
            template or self.prompt_template,
            self.torch_dtype,
            None,
        )
        advice = self._advice()
        for name in ("chunk_size", "routing_layers", "num_key_value_heads", "head_dim"):
            mine, other = getattr(self, name), getattr(given, name)
            if mine != other:
                raise BankMismatchError(
                    f"Bank '{folder}' was made with {name}={mine}; this model has {other}. {advice}"
                )
        if given.states == self.states:  # the weights above may have been trained further
            given = replace(given, weights=self.weights)
        for name, words in (
            ("weights", "model weights"),
            ("router", "router weights"),
            ("routing_score", "routing score"),
            ("tokenizer", "tokenizer"),
            ("template", "prompt template"),
        ):
            if getattr(self, name) != getattr(given, name):
                raise BankMismatchError(
                    f"Bank '{folder}' was made with other {words} than those given. {advice}"
                )

    def _advice(self) -> str:
        """What to do with a bank that another model was given for."""
        from msa.model.loading import loadable_name

        name = loadable_name(self.model)
        if name is None:
            return f"Open it with the model it was made with ({self.model}), or index again"
        return (
            f"It was made with {name}: give that (msa ask --model {name}, or msa.load({name!r})), "
            "or index the documents again"
        )
