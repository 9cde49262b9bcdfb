"""`msa train`: tokenizer, then every stage on transformers' `Trainer`, then an exported checkpoint.

Layout of the output folder: `tokenizer/`, `NAME/checkpoint-*` per stage, `metrics.jsonl` (a line
per logged step), `config.yaml` (the file, or with the values that were set), `model/` (the exported
checkpoint) and, when adapters were trained, `adapter/` (the same model as what changed of its
base). A run that is started again goes on where it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from msa.errors import ConfigError, InputError, TrainingError
from msa.model.configuration_msa import MSAConfig
from msa.text.prompts import PromptEncoder, PromptTemplate
from msa.training.adapters import add_adapter, freeze_below, load_adapter, trained_part
from msa.training.config import (
    QuestionStage,
    RouterStage,
    Stage,
    TrainingConfig,
    parse_config,
    read_yaml,
)
from msa.training.data import RealWorlds, StepDataset, tokenizer_texts
from msa.training.export import adapter_origin, export_adapter, export_model
from msa.training.model import MSAForTraining
from msa.training.question_steps import QuestionSteps, load_sources
from msa.training.router_stage import run_router_stage
from msa.training.samples import SampleBuilder
from msa.training.settings import nearest
from msa.training.tokenizer import train_tokenizer
from msa.training.trainer import MetricsFile, MSATrainer, Progress, compile_layers

if TYPE_CHECKING:
    from accelerate import PartialState

WEIGHTS = "model.safetensors"


def train(
    config_path: str | Path,
    output: str | Path,
    overrides: Sequence[str] = (),
    *,
    progress: Progress | None = None,
) -> Path:
    """Train by a YAML file, or go on with a run that was interrupted.

    Args:
        config_path: see `TrainingConfig`.
        output: folder of the run. If it holds a run of another config, that is an error.
        overrides: "KEY=VALUE" each, put into the config; see `msa.training.overrides.override`.
        progress: called at every log with (stage, step, steps, metrics).

    Returns:
        Folder of the exported checkpoint, for `MSAForCausalLM.from_pretrained`.

    Raises:
        ConfigError: the file is not a valid config.
        InputError: `accelerate` is not installed.
        TrainingError: the folder belongs to another run, data is missing, or the loss is not
            finite any more.
    """
    values = read_yaml(config_path, overrides)
    config = parse_config(values, str(config_path))
    processes = _processes()
    if config.fsdp and processes.num_processes == 1:
        raise TrainingError(
            "fsdp: true shards the model over several processes, and this is one; start them with "
            "'torchrun --nproc-per-node N --no-python msa train ...', or set fsdp to false"
        )
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"{folder}: cannot be made a folder ({error.strerror})") from error
    with processes.main_process_first():
        _claim(folder, Path(config_path), values, changed=bool(overrides))
    if config.threads:
        torch.set_num_threads(config.threads)
    set_seed(config.seed)
    run = _Run(config, folder, processes, progress)
    for stage, data in zip(config.stages, run.data(), strict=True):
        run.do(stage, data)
    if processes.is_main_process:
        run.export()
    processes.wait_for_everyone()
    return folder / "model"


def _processes() -> PartialState:
    """The processes that train together; of `torchrun`, or this one."""
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise InputError(
            "accelerate is not installed, which training needs; pip install 'msa-memory[train]'"
        ) from error
    return PartialState(cpu=not torch.cuda.is_available())


class _Run:
    """A training run: its model, and what every stage needs."""

    def __init__(
        self,
        config: TrainingConfig,
        folder: Path,
        processes: PartialState,
        progress: Progress | None,
    ) -> None:
        self.config, self.folder, self.progress = config, folder, progress
        self.processes = processes
        start = config.start_from
        self.template = PromptTemplate.load(start) if start else PromptTemplate()
        with processes.main_process_first():
            self.tokenizer = _tokenizer(config, folder, self.template)
        self.origin = adapter_origin(config)
        self.model = self._new_model()

    def _new_model(self) -> MSAForTraining:
        """The model that the run begins with."""
        config, tokenizer = self.config, self.tokenizer
        if config.start_from:
            frozen = torch.bfloat16 if config.adapter and config.bfloat16 else torch.float32
            model: MSAForTraining = MSAForTraining.from_pretrained(config.start_from, dtype=frozen)
            if config.adapter is not None:
                add_adapter(model, config.adapter)
                if config.adapter.start is not None:
                    load_adapter(model, config.adapter.start)
            return model
        known = list(MSAConfig().to_dict())
        for name in config.model:
            if name not in known:  # transformers would keep it without a word
                raise ConfigError(f"model: unknown key {name!r}; {nearest(name, known)}")
        return MSAForTraining(
            MSAConfig(
                **{
                    **config.model,
                    "vocab_size": len(tokenizer),
                    "pad_token_id": tokenizer.pad_token_id,
                    "eos_token_id": tokenizer.eos_token_id,
                }
            )
        )

    def data(self) -> list[Any]:
        """What every stage learns from: its steps, or of a stage of routers what runs it."""
        config, encoder = self.config, PromptEncoder(self.tokenizer, self.template)
        top_k = self.model.config.top_k_documents
        builder = SampleBuilder(encoder, top_k)
        worlds = [stage for stage in config.stages if isinstance(stage, Stage)]
        needs_real = any(stage.world.real > 0 for stage in worlds)
        real = RealWorlds(config.real_data.questions if needs_real else ())
        sources = []
        if len(worlds) < len(config.stages):
            with self.processes.main_process_first():  # it keeps the negatives for the others
                sources = load_sources(config.question_sets, self.folder / "negatives")
        routed = [source for source in sources if source.settings.routes]
        count = self.processes.num_processes
        made: list[Any] = []
        for stage in config.stages:
            if isinstance(stage, Stage):
                made.append(StepDataset(stage, builder, real, config.seed, count))
            elif isinstance(stage, QuestionStage):
                made.append(QuestionSteps(stage, sources, encoder, top_k, config.seed, count))
            else:
                run = partial(
                    run_router_stage,
                    stage,
                    prompts=encoder,
                    sets=[source.questions for source in routed],
                    cache=self.folder / "states",
                    negatives={source.questions.name: source.negatives for source in routed},
                )
                made.append(run)
        return made

    def do(self, stage: Stage | QuestionStage | RouterStage, data: Any) -> None:
        """Run one stage, or load what it left."""
        if self._load_finished(stage.name):
            return
        if isinstance(stage, RouterStage):
            if self.processes.is_main_process:
                self._train_routers(stage, data)
                self._keep(stage.name, None)
            self.processes.wait_for_everyone()
            self._load_finished(stage.name)
            return
        output = self.folder / stage.name
        with self.processes.main_process_first():
            checkpoint = _last_checkpoint(output)
        trainer = self._trainer(stage, data)
        share = stage.keep_start if isinstance(stage, QuestionStage) else 0.0
        began = _trained(self.model) if share else {}
        trainer.train(resume_from_checkpoint=checkpoint)
        state = trainer.full_state()
        if state is None:
            _mix(dict(self.model.named_parameters()), began, share)
        if self.processes.is_main_process:
            if state is not None:  # gathered from the shards, on this process alone
                _mix(state, began, share)
            self._keep(stage.name, state)
            for each in output.glob("checkpoint-*"):
                shutil.rmtree(each)
        self.processes.wait_for_everyone()
        if state is not None:  # the model is in shards
            self.model = self._new_model()
            self._load_finished(stage.name)

    def _trainer(self, stage: Stage | QuestionStage, data: Any) -> MSATrainer:
        config, model = self.config, self.model
        model.loss_settings = stage.losses
        model.document_batch = config.document_batch
        model.checkpoint_activations(config.gradient_checkpointing)
        if config.adapter is not None:
            freeze_below(model, stage.train_from_layer if isinstance(stage, QuestionStage) else 0)
        if config.compile:
            compile_layers(model)
        return MSATrainer(
            stage=stage,
            config=config,
            model=model,
            args=training_arguments(config, stage, self.folder / stage.name, model),
            train_dataset=data,
            data_collator=lambda items: items[0],
            callbacks=[MetricsFile(self.folder / "metrics.jsonl", stage, self.progress)],
        )

    def _load_finished(self, stage: str) -> bool:
        """Load what a stage left; False if it is not finished."""
        done = self.folder / stage / "done"
        if not (done / WEIGHTS).is_file():
            return False
        if self.config.adapter is not None:
            self.model.load_state_dict(load_file(done / WEIGHTS), strict=False)
        else:
            self.model = MSAForTraining.from_pretrained(done, dtype=torch.float32)
        return True

    def _keep(self, stage: str, state: dict[str, Tensor] | None) -> None:
        """Write what a finished stage leaves: whole, or not at all.

        Args:
            stage: its name.
            state: weights of a model that is in shards.
        """
        scratch = self.folder / stage / "done.partial"
        if self.config.adapter is not None:
            state = trained_part(self.model.state_dict() if state is None else state)
        self.model.save_pretrained(scratch, state_dict=state)
        scratch.rename(self.folder / stage / "done")

    def _train_routers(self, stage: RouterStage, run: Callable[..., Any]) -> None:
        """A stage of routers alone, with a line of metrics."""

        def show(what: str, done: int, total: int) -> None:
            if self.progress is not None:
                self.progress(f"{stage.name}: {what}", done, total, {})

        report, failures = run(self.model, progress=show)
        row = {
            "stage": stage.name,
            "step": report.best_epoch,
            **asdict(report),
            "texts_left_out": failures,
        }
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def export(self) -> None:
        """Write `model/` and, with an adapter, `adapter/`."""
        parts = self.tokenizer, self.template, self.config.start_from
        export_model(self.model, self.folder / "model", *parts)
        if self.origin is not None:
            export_adapter(self.model, self.origin, self.folder / "adapter", *parts)


def _trained(model: MSAForTraining) -> dict[str, Tensor]:
    """Copies of the weights that are trained."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def _mix(weights: Mapping[str, Tensor], began: Mapping[str, Tensor], share: float) -> None:
    """Put a share of what the weights were into them, in place."""
    for name, tensor in began.items():
        weights[name].lerp_(tensor.to(weights[name]), share)


def training_arguments(
    config: TrainingConfig, stage: Stage | QuestionStage, output: Path, model: MSAForTraining
) -> TrainingArguments:
    """Settings of one stage for the `Trainer`."""
    sharded = {}
    if config.fsdp:  # FSDP2: every layer by itself, gathered when it is run
        layer = type(model.model.layers[0]).__name__
        settings = {"version": 2, "transformer_layer_cls_to_wrap": [layer]}
        sharded = {"fsdp": True, "fsdp_config": settings}
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=stage.steps,
        per_device_train_batch_size=1,
        learning_rate=stage.learning_rate,
        max_grad_norm=config.optimizer.max_grad_norm,
        logging_steps=config.log_steps,
        save_steps=config.save_steps,
        save_total_limit=1,
        bf16=config.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
        seed=config.seed,
        data_seed=config.seed,
        ddp_find_unused_parameters=True,  # not every step asks everything
        **sharded,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # a step is no batch that could be split
    return arguments


def _claim(folder: Path, config_path: Path, values: Any, *, changed: bool) -> None:
    """Keep the configuration in the folder of the run, unless another one is there."""
    kept = folder / "config.yaml"
    if kept.is_file() and read_yaml(kept) != values:
        raise TrainingError(
            f"{folder} holds a run of another config ({kept} differs from {config_path}"
            f"{' as it was changed by --set' if changed else ''}); choose another --output, or "
            "remove that folder"
        )
    text = config_path.read_text(encoding="utf-8")
    if changed:
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    scratch = kept.with_suffix(".partial")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(kept)


def _tokenizer(
    config: TrainingConfig, folder: Path, template: PromptTemplate
) -> PreTrainedTokenizerFast:
    source = config.tokenizer.path or config.start_from
    target = Path(source) if source else folder / "tokenizer"
    if not (target / "tokenizer.json").is_file():
        if source:
            raise TrainingError(f"{target} holds no tokenizer.json; name a tokenizer's folder")
        texts = tokenizer_texts(config.tokenizer, config.real_data, config.seed)
        trained = train_tokenizer(texts, config.tokenizer.vocab_size, template)
        scratch = folder / "tokenizer.partial"
        trained.save_pretrained(scratch)
        scratch.rename(target)
    return PreTrainedTokenizerFast.from_pretrained(target)


def _last_checkpoint(output: Path) -> str | None:
    """The last whole checkpoint; what a killed run left half written is removed."""
    for checkpoint in output.glob("checkpoint-*"):
        try:  # this file is written last
            json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
    return get_last_checkpoint(str(output)) if output.is_dir() else None
