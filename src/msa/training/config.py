"""The YAML file that `msa train` reads, as frozen settings checked by pydantic."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Strict, Tag, TypeAdapter

from msa.errors import ConfigError
from msa.training.overrides import override
from msa.training.router_settings import PairSettings, RouterSettings, StateSettings
from msa.training.settings import (
    Count,
    Integer,
    Rate,
    Settings,
    Share,
    Switch,
    Text,
    Texts,
    Weight,
    Whole,
    listed,
    one_line_errors,
    settings,
)

RESERVED = ("model", "adapter", "tokenizer", "negatives", "states")
"""Folders of a run that no stage may be called like."""


def _check_name(name: str) -> str:
    if not re.fullmatch(r"[\w-]+", name) or name in RESERVED:
        raise ValueError(
            f"expected letters, digits, '_' and '-', since it names a folder beside 'model' and "
            f"'tokenizer', got {name!r}"
        )
    return name


def _check_breadth(breadth: tuple[float, ...]) -> tuple[float, ...]:
    if len(breadth) not in (1, 2):
        raise ValueError(f"expected one or two numbers from 0 to 1, got {list(breadth)}")
    return breadth


StageName = Annotated[Text, AfterValidator(_check_name)]
Fields = Annotated[dict[str, Any], Strict()]
Digits = Annotated[Count, Field(le=8)]
Breadth = Annotated[
    tuple[Share, ...],
    BeforeValidator(lambda given: (given,) if isinstance(given, int | float) else listed(given)),
    AfterValidator(_check_breadth),
]


@settings
class TokenizerSettings(Settings):
    """The byte-level BPE that is trained when `tokenizer` names no folder.

    Attributes:
        vocab_size: entries, special strings and bytes included.
        worlds: generated worlds of 64 documents it is trained on.
        text_characters: characters of each real text file it is trained on.
        path: folder of a tokenizer to use instead of training one.
    """

    vocab_size: Count = 4096
    worlds: Whole = 200
    text_characters: Whole = 2_000_000
    path: Text | None = None


@settings
class RealData(Settings):
    """Real data, read when the files are there; a missing folder is an error.

    Attributes:
        questions: folders holding `corpus.jsonl.gz` and `questions.train.jsonl.gz`.
        texts: files `*.jsonl.gz` of {"text": ...} for tokenizer and language model.
    """

    questions: Texts = ()
    texts: Texts = ()


@settings
class WorldSettings(Settings):
    """One training step's documents.

    Attributes:
        documents: N, documents of a world; all are in the memory of that step.
        breadth: 0 to 1, how varied the language is; two numbers go from one to the other over the
            stage.
        min_digits, max_digits: lengths of document numbers, drawn evenly.
        max_document_tokens: longer documents are cut (real text).
        real: share of steps that use real documents and questions instead.
    """

    documents: Count = 32
    breadth: Breadth = (0.2,)
    min_digits: Digits = 3
    max_digits: Digits = 3
    max_document_tokens: Count = 160
    real: Share = 0.0

    def __post_init__(self) -> None:
        """Check that all documents can have numbers of their own.

        Raises:
            ConfigError: there are too few; the message says what to raise.
        """
        if self.min_digits > self.max_digits:
            raise ConfigError(
                f"min_digits={self.min_digits}, max_digits={self.max_digits}: expected "
                "min_digits <= max_digits"
            )
        numbers = 10**self.max_digits - 10 ** (self.min_digits - 1)
        if self.documents > numbers:
            raise ConfigError(
                f"documents={self.documents}: only {numbers} numbers have {self.min_digits} to "
                f"{self.max_digits} digits; raise max_digits"
            )


@settings
class SampleSettings(Settings):
    """Single-step samples per training step (paper 3.5: chains are split into their steps).

    Attributes:
        name: question -> number of the first document.
        read: question and the right document -> end of retrieval, answer.
        hop: two-hop question and its first document -> number of the second.
        answer: two-hop question and both documents -> end of retrieval, answer.
        copy: a piece of text that comes twice, the second time to be written; makes copying heads
            appear early.
        more_questions: further question-answer pairs after the same read documents.
    """

    name: Whole = 24
    read: Whole = 8
    hop: Whole = 0
    answer: Whole = 0
    copy: Whole = 0
    more_questions: Whole = 4


@settings
class LossSettings(Settings):
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

    language_model: Weight = 1.0
    routing: Weight = 0.1
    context: Weight = 0.1
    documents: Weight = 0.1
    numbers: Weight = 0.0
    fused: Weight = 0.0
    last_token: Weight = 0.0


@settings
class Stage(Settings):
    """One stretch of training on generated worlds (and real data dealt out like them).

    Attributes:
        kind: "worlds", which may be left out.
        name: of its folder.
        steps: updates of the weights.
        learning_rate: rises over `warmup_steps`, then falls along a cosine to the share
            `final_learning_rate` of it.
        world, samples, losses: what a step consists of, and what counts how much.
    """

    kind: Literal["worlds"] = "worlds"
    name: StageName
    steps: Count
    learning_rate: Rate = 0.01
    final_learning_rate: Weight = 0.1
    warmup_steps: Whole = 50
    world: WorldSettings = WorldSettings()
    samples: SampleSettings = SampleSettings()
    losses: LossSettings = LossSettings()


@settings
class QuestionSettings(Settings):
    """A question set, see `msa.training.question_sets`.

    Attributes:
        path: its folder.
        weight: how often a step is drawn from it, relative to the others.
        reads: its questions teach reading and answering.
        routes: its questions teach routing; not those that make sense beside their passage only.
        gold_only: leave out documents that no training question needs. For sets whose corpus holds
            the documents of the dev questions too: as negatives these would be unlearned.
    """

    path: Text
    weight: Weight = 1.0
    reads: Switch = True
    routes: Switch = True
    gold_only: Switch = False


@settings
class QuestionStage(Settings):
    """One stretch of training on question sets, in the inference format.

    A stage with samples other than `route` draws from the sets that teach reading, else from those
    that teach routing. Samples from `name_documents` to `refuse` may be fractions: 0.3 makes one
    in three steps of ten.

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
        route_again: the same of a later round: after the first gold document of several, or after
            documents that do not help.
        name_documents: samples of round 1 that name all gold documents, at most 4, and no other.
        read: samples that read all gold documents, end the retrieval and answer.
        hop: samples of a second round: the first gold document is read, the others are named.
        again: samples of a second round after reading what does not help.
        refuse: samples that end with the refusal.
        more_questions: further questions that the same texts answer, after a sample of `read`.
        foreign: chance that a question stands there, too, that they look right for and do not
            answer, and the same again for a question of the step that has nothing to do with them.
        without_memory: chance that a sample, which routes all the same, does not see the memory, so
            that reading works beside any memory, and beside none.
        keep_start: share of the weights that the stage began with in those that it leaves: their
            mean with the trained ones (WiSE-FT, Wortsman et al., arXiv 2109.01903), which overfits
            less.
        train_from_layer: what lies below is left as it is (and no gradient is computed for it), so
            that with the layer after the last routing layer the memory stays as it was trained.
    """

    kind: Literal["questions"] = "questions"
    name: StageName
    steps: Count
    learning_rate: Rate = 5e-4
    final_learning_rate: Weight = 0.1
    warmup_steps: Whole = 20
    documents: Count = 48
    questions_per_document: Count = 1
    negatives: Whole = 1
    max_digits: Digits = 5
    max_document_tokens: Count = 192
    max_read_tokens: Count = 900
    route: Whole = 24
    route_again: Whole = 0
    name_documents: Weight = 0
    read: Weight = 0
    hop: Weight = 0
    again: Weight = 0
    refuse: Weight = 0
    more_questions: Whole = 3
    foreign: Share = 0.5
    without_memory: Share = 0.0
    keep_start: Share = 0.0
    train_from_layer: Whole = 0
    losses: LossSettings = LossSettings()


@settings
class RouterStage(Settings):
    """Routers alone, trained on cached states of the model as it is; see `docs/training.md`.

    Attributes:
        kind: "routers".
        texts: files and folders of plain texts that questions are made from. The question sets that
            teach routing are used as well.
        passages: of the texts that are used, at most.
        passage_words: longer texts are cut into passages of at most so many words.
    """

    kind: Literal["routers"] = "routers"
    name: StageName
    texts: Texts = ()
    passages: Count = 20000
    passage_words: Count = 120
    pairs: PairSettings = PairSettings()
    states: StateSettings = StateSettings()
    training: RouterSettings = RouterSettings()


@settings
class AdapterSettings(Settings):
    """Low-rank adapters (LoRA, Hu et al., 2021) on a frozen backbone; the routers train in full.

    Attributes:
        rank: of the added matrices.
        alpha: they are scaled by alpha / rank.
        dropout: share of their inputs that is left out at random in every step.
        targets: names of the linear layers that get one.
        base: fields of `msa.model.bases.Base` that take the place of those in the `base.json` of
            `start_from`: where the base may be fetched from (`pypi`, `pypi_size`, `hub`), its
            `name` and `license`.
        start: folder of an adapter of the same base, rank and targets that training goes on from.
    """

    rank: Count = 16
    alpha: Count = 32
    dropout: Share = 0.0
    targets: Texts = (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    )
    base: Fields = field(default_factory=dict)
    start: Text | None = None


@settings
class OptimizerSettings(Settings):
    """Muon for the matrices of the layers, AdamW for the rest; AdamW alone with an adapter.

    Attributes:
        muon: false trains everything by AdamW, at the stage's rate.
        router_learning_rate: with AdamW alone, the routers' rate as a share of the stage's.
        adam_learning_rate: AdamW's rate as a share of the stage's (which is Muon's).
        weight_decay: of both.
        max_grad_norm: gradients are clipped to this norm.
    """

    muon: Switch = True
    router_learning_rate: Weight = 2.0
    adam_learning_rate: Weight = 0.3
    weight_decay: Weight = 0.01
    max_grad_norm: Rate = 1.0


KINDS = ("worlds", "questions", "routers")


def _kind_of(stage: Any) -> Any:
    if isinstance(stage, Mapping):
        return stage.get("kind", "worlds")
    return getattr(stage, "kind", "worlds")


AnyStage = Annotated[
    Annotated[Stage, Tag("worlds")]
    | Annotated[QuestionStage, Tag("questions")]
    | Annotated[RouterStage, Tag("routers")],
    Discriminator(_kind_of),
]
AnyQuestionSet = Annotated[
    QuestionSettings,
    BeforeValidator(lambda given: {"path": given} if isinstance(given, str) else given),
]


@settings
class TrainingConfig(Settings):
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

    model: Fields = field(default_factory=dict)
    stages: Annotated[tuple[AnyStage, ...], BeforeValidator(listed)] = ()
    question_sets: Annotated[tuple[AnyQuestionSet, ...], BeforeValidator(listed)] = ()
    adapter: AdapterSettings | None = None
    tokenizer: TokenizerSettings = TokenizerSettings()
    real_data: RealData = RealData()
    optimizer: OptimizerSettings = OptimizerSettings()
    start_from: Text | None = None
    seed: Integer = 0
    save_steps: Count = 500
    log_steps: Count = 50
    bfloat16: Switch = False
    gradient_checkpointing: Switch = False
    document_batch: Whole = 0
    fsdp: Switch = False
    compile: Switch = False
    threads: Whole = 0

    def __post_init__(self) -> None:
        """Check what belongs together.

        Raises:
            ConfigError: a setting needs another one; the message names both.
        """
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ConfigError(f"stages need names of their own, got {names}")
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


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainingConfig:
    """Read a YAML file; every key must be known.

    Args:
        path: of the file.
        overrides: "KEY=VALUE" each, see `msa.training.overrides.override`.

    Raises:
        ConfigError: unreadable, not YAML, unknown or ill-typed keys, or no stages.
    """
    return parse_config(read_yaml(path, overrides), str(path))


def parse_config(values: Any, where: str) -> TrainingConfig:
    """Check the contents of a YAML file.

    Args:
        values: as YAML gives them.
        where: named in front of every error.

    Raises:
        ConfigError: see `load_config`.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected a mapping, got {type(values).__name__}")
    with one_line_errors(where, KINDS):
        config: TrainingConfig = TypeAdapter(TrainingConfig).validate_python(values)
    if not config.stages:
        raise ConfigError(f"{where}: expected at least one entry under 'stages'")
    return config


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """Contents of a YAML file, with some values replaced.

    Raises:
        ConfigError: it cannot be read, or an override does not fit it.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: cannot be read as YAML ({reason})") from error
    for text in overrides:
        override(values, text)
    return values
