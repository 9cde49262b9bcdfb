"""The YAML file that `msa train` reads, as frozen dataclasses."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from msa.errors import ConfigError
from msa.training.router_settings import PairSettings, RouterSettings, StateSettings

T = TypeVar("T")
RESERVED = ("model", "adapter", "tokenizer", "negatives", "states")
"""Folders of a run that no stage may be called like."""


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """The byte-level BPE that is trained when `tokenizer` names no folder.

    Attributes:
        vocab_size: entries, special strings and bytes included.
        worlds: generated worlds of 64 documents it is trained on.
        text_characters: characters of each real text file it is trained on.
        path: folder of a tokenizer to use instead of training one.
    """

    vocab_size: int = 4096
    worlds: int = 200
    text_characters: int = 2_000_000
    path: str | None = None


@dataclass(frozen=True, kw_only=True)
class RealData:
    """Real data, read when the files are there; a missing folder is an error.

    Attributes:
        questions: folders holding `corpus.jsonl.gz` and `questions.train.jsonl.gz`.
        texts: files `*.jsonl.gz` of {"text": ...} for tokenizer and language model.
    """

    questions: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class WorldSettings:
    """One training step's documents.

    Attributes:
        documents: N, documents of a world; all are in the memory of that step.
        breadth: 0 to 1, how varied the language is; two numbers go from one to the other over the
            stage.
        min_digits, max_digits: lengths of document numbers, drawn evenly.
        max_document_tokens: longer documents are cut (real text).
        real: share of steps that use real documents and questions instead.
    """

    documents: int = 32
    breadth: tuple[float, ...] = (0.2,)
    min_digits: int = 3
    max_digits: int = 3
    max_document_tokens: int = 160
    real: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a field is out of range; the message names it.
        """
        _at_least_one(self, "documents", "max_document_tokens")
        if not 1 <= self.min_digits <= self.max_digits <= 8:
            raise ConfigError(
                f"min_digits={self.min_digits}, max_digits={self.max_digits}: expected "
                "1 <= min_digits <= max_digits <= 8"
            )
        numbers = 10**self.max_digits - 10 ** (self.min_digits - 1)
        if self.documents > numbers:
            raise ConfigError(
                f"documents={self.documents}: only {numbers} numbers have {self.min_digits} to "
                f"{self.max_digits} digits; raise max_digits"
            )
        if len(self.breadth) not in (1, 2) or not all(0 <= b <= 1 for b in self.breadth):
            raise ConfigError(
                f"breadth={list(self.breadth)}: expected one or two numbers from 0 to 1"
            )
        if not 0 <= self.real <= 1:
            raise ConfigError(f"real={self.real}: expected a share from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Single-step samples per training step (paper 3.5: chains are split into their steps).

    Attributes:
        name: question -> number of the first document.
        read: question and the right document -> end of retrieval, answer.
        hop: two-hop question and its first document -> number of the second.
        answer: two-hop question and both documents -> end of retrieval, answer.
        copy: a piece of text that comes twice, the second time to be written; makes copying heads
            appear early.
        more_questions: further question-answer pairs behind the same read documents.
    """

    name: int = 24
    read: int = 8
    hop: int = 0
    answer: int = 0
    copy: int = 0
    more_questions: int = 4


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Weights of the parts of the loss.

    Attributes:
        language_model: L_LM over what the model writes (numbers, end of retrieval, answers).
        routing: L_aux, Eq. 5.
        context: weight, inside L_LM, of the other tokens of the local context after the question.
        documents: language model loss over the documents, as stage 1 runs them.
        numbers: auxiliary head that reads a document's number out of its pooled values.
        fused: Eq. 5 once more, over the sum of the layers' scores, which ranks at inference.
        last_token: Eq. 5 once more, over the scores of the last routing token alone, in rounds that
            have read a text. That token sees the question and the whole text, which no other does.
    """

    language_model: float = 1.0
    routing: float = 0.1
    context: float = 0.1
    documents: float = 0.1
    numbers: float = 0.0
    fused: float = 0.0
    last_token: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stretch of training with its own data and loss weights."""

    name: str
    steps: int
    learning_rate: float = 0.01
    final_learning_rate: float = 0.1
    warmup_steps: int = 50
    world: WorldSettings = field(default_factory=WorldSettings)
    samples: SampleSettings = field(default_factory=SampleSettings)
    losses: LossSettings = field(default_factory=LossSettings)

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: there are no steps, or the name cannot name a folder.
        """
        _at_least_one(self, "steps")
        _check_name(self.name)


@dataclass(frozen=True, kw_only=True)
class QuestionSettings:
    """A question set, see `msa.training.question_sets`.

    Attributes:
        path: its folder.
        weight: how often a step is drawn from it, relative to the others.
        reads: its questions teach reading and answering.
        routes: its questions teach routing; not those that make sense beside their passage only.
        gold_only: leave out documents that no training question needs. For sets whose corpus holds
            the documents of the dev questions too: as negatives these would be unlearned.
    """

    path: str
    weight: float = 1.0
    reads: bool = True
    routes: bool = True
    gold_only: bool = False


@dataclass(frozen=True, kw_only=True)
class QuestionStage:
    """One stretch of training on question sets, in the inference format.

    A stage with samples other than `route` draws from the sets that teach reading, else from those
    that teach routing.

    Attributes:
        kind: "questions".
        documents: N, documents of a step; all are in the memory of its questions.
        questions_per_document: questions of a step with the same gold document, at most.
        negatives: hard negatives that every question brings into the step.
        max_digits: document numbers have 1 to so many digits.
        max_document_tokens: longer documents are cut.
        max_read_tokens: samples that would read more than about this many tokens are left out.
        route: samples of round 1 for the routing loss alone; only the layers up to the last
            routing layer are run.
        route_again: the same of a later round: behind the first gold document of several, or behind
            documents that do not help.
        read: samples that read all gold documents, end the retrieval and answer.
        hop: samples of a second round: the first gold document is read, the others are named.
        again: samples of a second round after reading what does not help.
        refuse: samples that end with the refusal.
        more_questions: further questions that the same texts answer, behind a sample of `read`.
        foreign: chance that one more question stands there that they do not answer.
        train_from_layer: what lies below is left as it is (and no gradient is computed for it), so
            that with the layer after the last routing layer the memory stays as it was trained.
    """

    kind: str
    name: str
    steps: int
    learning_rate: float = 5e-4
    final_learning_rate: float = 0.1
    warmup_steps: int = 20
    documents: int = 48
    questions_per_document: int = 1
    negatives: int = 1
    max_digits: int = 5
    max_document_tokens: int = 192
    max_read_tokens: int = 900
    route: int = 24
    route_again: int = 0
    read: int = 0
    hop: int = 0
    again: int = 0
    refuse: int = 0
    more_questions: int = 3
    foreign: float = 0.5
    train_from_layer: int = 0
    losses: LossSettings = field(default_factory=LossSettings)

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a field is out of range; the message names it.
        """
        _at_least_one(self, "steps", "documents", "questions_per_document", "max_document_tokens")
        _check_name(self.name)


@dataclass(frozen=True, kw_only=True)
class RouterStage:
    """Routers alone, trained on cached states of the model as it is; see `docs/training.md`.

    Attributes:
        kind: "routers".
        texts: files and folders of plain texts that questions are made from. The question sets that
            teach routing are used as well.
        passages: of the texts that are used, at most.
        passage_words: longer texts are cut into passages of at most so many words.
    """

    kind: str
    name: str
    texts: tuple[str, ...] = ()
    passages: int = 20000
    passage_words: int = 120
    pairs: PairSettings = field(default_factory=PairSettings)
    states: StateSettings = field(default_factory=StateSettings)
    training: RouterSettings = field(default_factory=RouterSettings)

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a field is out of range; the message names it.
        """
        _at_least_one(self, "passages", "passage_words")
        _check_name(self.name)


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Low-rank adapters (LoRA, Hu et al., 2021) on a frozen backbone; the routers train in full.

    Attributes:
        rank: of the added matrices.
        alpha: they are scaled by alpha / rank.
        targets: names of the linear layers that get one.
        base: fields of `msa.model.bases.Base` that take the place of those in the `base.json` of
            `start_from`: where the base may be fetched from (`pypi`, `pypi_size`, `hub`), its
            `name` and `license`.
    """

    rank: int = 16
    alpha: int = 32
    targets: tuple[str, ...] = (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    )
    base: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Muon for the matrices of the layers, AdamW for the rest; AdamW alone with an adapter.

    Attributes:
        muon: false trains everything by AdamW, at the stage's rate.
        router_learning_rate: with AdamW alone, the routers' rate as a share of the stage's.
        adam_learning_rate: AdamW's rate as a share of the stage's (which is Muon's).
        weight_decay: of both.
        max_grad_norm: gradients are clipped to this norm.
    """

    muon: bool = True
    router_learning_rate: float = 2.0
    adam_learning_rate: float = 0.3
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """All of a training run.

    Attributes:
        model: fields of `MSAConfig`; ignored when `start_from` is given.
        stages: run in this order.
        question_sets: what stages of kind "questions" draw from.
        adapter: train low-rank adapters and routers instead of all weights; needs `start_from`.
        start_from: checkpoint folder to go on from (for fine-tuning or a converted backbone).
        seed: of weights, worlds and order.
        save_steps, log_steps: how often checkpoints and metrics are written.
        bfloat16: run matrix products in bfloat16 (autocast).
        gradient_checkpointing: keep the inputs of the layers only, and compute the rest again in
            the backward pass.
        document_batch: documents that are encoded together; the activations of one such batch are
            held at a time and computed again in the backward pass. 0 encodes the documents of a
            step in a few batches and holds everything.
        fsdp: shard the model over the processes of `torchrun` or `accelerate launch` (FSDP2).
        compile: compile the layers' pointwise parts with torch.compile.
        threads: CPU threads; 0 leaves it to torch.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[Stage | QuestionStage | RouterStage, ...] = ()
    question_sets: tuple[QuestionSettings, ...] = ()
    adapter: AdapterSettings | None = None
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    real_data: RealData = field(default_factory=RealData)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    start_from: str | None = None
    seed: int = 0
    save_steps: int = 500
    log_steps: int = 50
    bfloat16: bool = False
    gradient_checkpointing: bool = False
    document_batch: int = 0
    fsdp: bool = False
    compile: bool = False
    threads: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a field is out of range; the message names it.
        """
        _at_least_one(self, "save_steps", "log_steps")
        if self.adapter is not None and self.start_from is None:
            raise ConfigError("adapter: needs start_from, a checkpoint whose weights stay frozen")
        if self.fsdp and self.adapter is None and self.optimizer.muon:
            raise ConfigError("fsdp: Muon needs whole matrices; set optimizer.muon to false")
        if not self.question_sets and any(isinstance(s, QuestionStage) for s in self.stages):
            raise ConfigError("question_sets: name some, since a stage has kind 'questions'")
        for stage in self.stages:
            if isinstance(stage, RouterStage) and not stage.texts and not self.question_sets:
                raise ConfigError(
                    f"stage {stage.name!r} trains routers on nothing; name question_sets, or texts"
                )


def load_config(path: str | Path) -> TrainingConfig:
    """Read a YAML file; every key must be known.

    Raises:
        ConfigError: unreadable, not YAML, unknown or ill-typed keys, or no stages.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: cannot be read as YAML ({reason})") from error
    config = _build(TrainingConfig, values, str(path))
    if not config.stages:
        raise ConfigError(f"{path}: expected at least one entry under 'stages'")
    names = [stage.name for stage in config.stages]
    if len(set(names)) != len(names):
        raise ConfigError(f"{path}: stages need names of their own, got {names}")
    return config


_NESTED = {
    "tokenizer": TokenizerSettings,
    "real_data": RealData,
    "optimizer": OptimizerSettings,
    "adapter": AdapterSettings,
    "world": WorldSettings,
    "samples": SampleSettings,
    "losses": LossSettings,
    "pairs": PairSettings,
    "states": StateSettings,
    "training": RouterSettings,
}


def _at_least_one(settings: Any, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name}={getattr(settings, name)}: expected a whole number from 1")


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[\w-]+", name) or name in RESERVED:
        raise ConfigError(
            f"name={name!r}: expected letters, digits, '_' and '-', since it names a "
            "folder beside 'model' and 'tokenizer'"
        )


def _build(cls: type[T], values: Any, where: str) -> T:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a mapping, got {type(values).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields), key=str)
    if unknown:
        raise ConfigError(f"{where}: unknown {unknown}; known are {sorted(fields)}")
    out: dict[str, Any] = {}
    for name, value in values.items():
        place = f"{where}: {name}"
        if name in _NESTED:
            value = _build(_NESTED[name], value, place)
        elif name == "stages":
            if not isinstance(value, list):
                raise ConfigError(f"{place}: expected a list, got {value!r}")
            value = tuple(_stage(v, f"{place}[{i}]") for i, v in enumerate(value))
        elif name == "question_sets":
            if not isinstance(value, list):
                raise ConfigError(f"{place}: expected a list, got {value!r}")
            value = tuple(
                _build(QuestionSettings, {"path": v} if isinstance(v, str) else v, f"{place}[{i}]")
                for i, v in enumerate(value)
            )
        else:
            value = _typed(value, str(fields[name].type), place)
        out[name] = value
    missing = [
        f.name
        for f in fields.values()
        if f.name not in out
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: missing {missing}")
    try:
        return cls(**out)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _stage(values: Any, where: str) -> Stage | QuestionStage | RouterStage:
    kind = values.get("kind") if isinstance(values, Mapping) else None
    if kind == "questions":
        return _build(QuestionStage, values, where)
    if kind == "routers":
        return _build(RouterStage, values, where)
    if kind is not None:
        raise ConfigError(f"{where}: kind={kind!r}: expected 'questions' or 'routers', or no kind")
    return _build(Stage, values, where)


def _typed(value: Any, kind: str, where: str) -> Any:
    """Check a plain value against its annotation; numbers are accepted where floats are."""
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind == "float" and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind.startswith("str") and (isinstance(value, str) or ("None" in kind and value is None)):
        return value
    if kind.startswith("tuple[float"):
        entries = value if isinstance(value, list) else [value]
        return tuple(_typed(v, "float", where) for v in entries)
    if kind.startswith("tuple[str") and isinstance(value, list):
        return tuple(_typed(v, "str", where) for v in value)
    if kind.startswith("Mapping") and isinstance(value, Mapping):
        return dict(value)
    raise ConfigError(f"{where}: expected {kind}, got {value!r}")
