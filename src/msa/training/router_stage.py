"""Routers trained alone: as a stage of `msa train`, and on the texts of a bank."""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msa.errors import InputError
from msa.model.checkpoint import Checkpoint
from msa.text.prompts import PromptEncoder
from msa.training.negatives import HardNegatives
from msa.training.pairs import make_pairs, read_documents, split_passages
from msa.training.question_sets import QuestionSet
from msa.training.router_pretraining import RouterReport, pretrain_routers
from msa.training.router_settings import PairSettings, RouterSettings, StateSettings
from msa.training.router_states import Progress
from msa.types import Document

if TYPE_CHECKING:
    from msa.memory.bank import MemoryBank
    from msa.model.modeling_msa import MSAForCausalLM
    from msa.training.config import RouterStage

MIN_BANK_PASSAGES = 64
"""Fewer say more about themselves than about what is to be found among them."""
PAGE = 1000


def run_router_stage(
    stage: RouterStage,
    model: MSAForCausalLM,
    prompts: PromptEncoder,
    sets: Sequence[QuestionSet],
    cache: str | Path,
    *,
    negatives: Mapping[str, HardNegatives] | None = None,
    progress: Progress | None = None,
) -> tuple[RouterReport, list[str]]:
    """Train the routers as a stage says; they are changed in place.

    Args:
        stage: its settings.
        model, prompts: the model as it is, with its tokenizer and template.
        sets: question sets that teach routing.
        cache: folder for states and negatives.
        negatives: set's name -> hard negatives, where they are known.
        progress: see `pretrain_routers`.

    Returns:
        The report, and one line for every text that could not be used.
    """
    sets = list(sets)
    failures: list[str] = []
    if stage.texts:
        documents, failures = read_documents(stage.texts)
        seed = stage.training.seed
        passages = split_passages(documents, stage.passage_words)
        sets.append(
            make_pairs(
                passages, name=stage.name, seed=seed, limit=stage.passages, settings=stage.pairs
            )
        )
    report = pretrain_routers(
        model,
        prompts,
        sets,
        cache,
        settings=stage.training,
        state_settings=stage.states,
        negatives=negatives,
        progress=progress,
    )
    return report, failures


def train_on_bank(
    checkpoint: Checkpoint,
    bank: MemoryBank,
    folder: str | Path,
    *,
    passages: int = 4000,
    settings: RouterSettings | None = None,
    pairs: PairSettings | None = None,
    progress: Progress | None = None,
) -> RouterReport:
    """Routers for the texts of a bank, learned from these texts alone; a new checkpoint.

    Args:
        checkpoint: the model to start from, which may be the bank's; its routers are changed.
        bank: gives the texts; it is not written to.
        folder: where the checkpoint goes; until it is there, states are kept in `states` below it.
        passages: documents of the bank that are used, drawn at random, at most.
        settings, pairs: by default those of the classes.
        progress: see `pretrain_routers`.

    Raises:
        InputError: the bank holds too few documents, or no whole sentences; the folder holds a
            model.
        TrainingError: see `pretrain_routers`.
    """
    folder = Path(folder)
    if (folder / "config.json").exists():
        raise InputError(f"{folder} holds a model already; name another folder")
    settings = settings or RouterSettings()
    documents = _sample(bank, passages, settings.seed)
    if len(documents) < MIN_BANK_PASSAGES:
        raise InputError(
            f"bank '{bank.path}' holds {len(documents)} documents; routers learn from at least "
            f"{MIN_BANK_PASSAGES}. Add more, or train on other texts with a stage of kind 'routers'"
        )
    made = make_pairs(documents, name="bank", seed=settings.seed, settings=pairs)
    prompts = PromptEncoder(checkpoint.tokenizer, checkpoint.template)
    longest = StateSettings(max_document_tokens=bank.manifest.max_document_tokens)
    report = pretrain_routers(
        checkpoint.model,
        prompts,
        [made],
        folder / "states",
        settings=settings,
        state_settings=longest,
        progress=progress,
    )
    checkpoint.model.save_pretrained(folder)
    checkpoint.tokenizer.save_pretrained(folder)
    checkpoint.template.save(folder)
    checkpoint.ask_options.save(folder)
    shutil.rmtree(folder / "states")
    return report


def _sample(bank: MemoryBank, limit: int, seed: int) -> list[Document]:
    """Documents of a bank, in its order, at most so many."""
    total = len(bank)
    chosen = random.Random(seed).sample(range(total), limit) if total > limit else range(total)
    wanted = set(chosen)
    found: list[Document] = []
    for start in range(0, total, PAGE):
        if not any(row in wanted for row in range(start, start + PAGE)):
            continue
        for row, stored in enumerate(bank.documents(PAGE, start), start):
            if row in wanted:
                found.append(stored.document)
    return found
