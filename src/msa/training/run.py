"""`msa train`: tokenizer, then every stage on transformers' `Trainer`, then an exported checkpoint.

Layout of the output folder: `tokenizer/`, `NAME/checkpoint-*` per stage, `metrics.jsonl` (a line
per logged step), `config.yaml` (as given), `model/` (the exported checkpoint). A run that is
started again goes on where it was.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from msa.errors import TrainingError
from msa.model.configuration_msa import MSAConfig
from msa.text.prompts import PromptEncoder, PromptTemplate
from msa.training.adapters import add_adapter, freeze_below, is_router, merged_state, trained_state
from msa.training.config import (
    QuestionStage,
    RouterStage,
    Stage,
    TrainingConfig,
    load_config,
)
from msa.training.data import RealWorlds, StepDataset, tokenizer_texts
from msa.training.model import MSAForTraining
from msa.training.optimizer import MuonWithAdamW
from msa.training.question_steps import QuestionSteps, load_sources
from msa.training.router_stage import run_router_stage
from msa.training.samples import SampleBuilder
from msa.training.tokenizer import train_tokenizer

Progress = Callable[[str, int, int, dict[str, float]], None]


class MSATrainer(Trainer):
    """transformers' Trainer over whole training steps, with Muon and the parts of the loss."""

    def __init__(
        self, *, stage: Stage | QuestionStage, config: TrainingConfig, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.stage = stage
        self.run_config = config
        self._parts: dict[str, list[torch.Tensor]] = {}

    def create_optimizer(self, model: Any = None) -> Any:
        """Muon and AdamW at the stage's rate; AdamW alone with an adapter."""
        if getattr(self, "optimizer", None) is None and self.run_config.adapter is not None:
            settings = self.run_config.optimizer
            rate = self.stage.learning_rate
            named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                [
                    {"params": [p for n, p in named if not is_router(n)], "lr": rate},
                    {
                        "params": [p for n, p in named if is_router(n)],
                        "lr": rate * settings.router_learning_rate,
                    },
                ],
                weight_decay=settings.weight_decay,
            )
        if getattr(self, "optimizer", None) is None:
            self.optimizer = MuonWithAdamW(
                self.model, self.stage.learning_rate, self.run_config.optimizer
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Warm-up, then cosine down to the stage's share of the rate."""
        if getattr(self, "lr_scheduler", None) is None:
            self.lr_scheduler = get_scheduler(
                "cosine_with_min_lr",
                optimizer or self.optimizer,
                num_warmup_steps=self.stage.warmup_steps,
                num_training_steps=num_training_steps,
                scheduler_specific_kwargs={"min_lr_rate": self.stage.final_learning_rate},
            )
        return self.lr_scheduler

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """With an adapter, what is trained and nothing else."""
        if self.run_config.adapter is not None:
            state_dict = trained_state(self.model)
        super()._save(output_dir, state_dict)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Steps in order: step i is made from i."""
        return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """Loss of one step; its parts are kept for the log."""
        outputs = model(**inputs)
        for name, value in outputs["parts"].items():
            self._parts.setdefault(name, []).append(value)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means of the parts since the last log."""
        for name, values in self._parts.items():
            logs[name] = round(torch.stack(values).float().mean().item(), 5)
        self._parts = {}
        super().log(logs, *args, **kwargs)


class _Metrics(TrainerCallback):
    """Writes `metrics.jsonl` and calls the progress function."""

    def __init__(self, path: Path, stage: Stage | QuestionStage, progress: Progress | None) -> None:
        self.path, self.stage, self.progress = path, stage, progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Drop the lines of steps that are done again, since they came after the checkpoint."""
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # the run was killed while it wrote this line
                continue
            if row["stage"] != self.stage.name or row["step"] <= state.global_step:
                kept.append(line + "\n")
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(self.path)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        row = {"stage": self.stage.name, "step": state.global_step, **logs}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.progress is not None:
            self.progress(self.stage.name, state.global_step, self.stage.steps, logs)


def train(
    config_path: str | Path,
    output: str | Path,
    *,
    progress: Progress | None = None,
) -> Path:
    """Train by a YAML file, or go on with a run that was interrupted.

    Args:
        config_path: see `TrainingConfig`.
        output: folder of the run. If it holds a run of another config, that is an error.
        progress: called at every log with (stage, step, steps, metrics).

    Returns:
        Folder of the exported checkpoint, for `MSAForCausalLM.from_pretrained`.

    Raises:
        ConfigError: the file is not a valid config.
        TrainingError: the folder belongs to another run, or data is missing.
    """
    config = load_config(config_path)
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"{folder}: cannot be made a folder ({error.strerror})") from error
    _claim(folder, Path(config_path))
    if config.threads:
        torch.set_num_threads(config.threads)
    set_seed(config.seed)
    template = PromptTemplate.load(config.start_from) if config.start_from else PromptTemplate()
    tokenizer = _tokenizer(config, folder, template)
    model = _model(config, tokenizer)
    datasets = _datasets(config, folder, PromptEncoder(tokenizer, template), model)
    for stage, dataset in zip(config.stages, datasets, strict=True):
        model = _run_stage(config, stage, dataset, model, folder, progress)
    target = folder / "model"
    model.export(str(target), merged_state(model))
    if config.adapter is not None:
        save_file(trained_state(model), target / "trained.safetensors")
    tokenizer.save_pretrained(target)
    template.save(target)
    return target


def _datasets(
    config: TrainingConfig, folder: Path, encoder: PromptEncoder, model: MSAForTraining
) -> list[Any]:
    """The steps of every stage."""
    top_k = model.config.top_k_documents
    builder = SampleBuilder(encoder, top_k)
    worlds = [stage for stage in config.stages if isinstance(stage, Stage)]
    needs_real = any(stage.world.real > 0 for stage in worlds)
    real = RealWorlds(config.real_data.questions if needs_real else ())
    sources = []
    if len(worlds) < len(config.stages):
        sources = load_sources(config.question_sets, folder / "negatives")
    routed = [source for source in sources if source.settings.routes]
    made: list[Any] = []
    for stage in config.stages:
        if isinstance(stage, Stage):
            made.append(StepDataset(stage, builder, real, config.seed))
        elif isinstance(stage, QuestionStage):
            made.append(QuestionSteps(stage, sources, encoder, top_k, config.seed))
        else:
            run = functools.partial(
                run_router_stage,
                stage,
                prompts=encoder,
                sets=[source.questions for source in routed],
                cache=folder / "states",
                negatives={source.questions.name: source.negatives for source in routed},
            )
            made.append(run)
    return made


def _claim(folder: Path, config_path: Path) -> None:
    kept = folder / "config.yaml"
    text = config_path.read_text(encoding="utf-8")
    if kept.is_file() and kept.read_text(encoding="utf-8") != text:
        raise TrainingError(
            f"{folder} holds a run of another config ({kept} differs from {config_path}); "
            "choose another --output, or remove that folder"
        )
    kept.write_text(text, encoding="utf-8")


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
        partial = folder / "tokenizer.partial"
        trained.save_pretrained(partial)
        partial.rename(target)
    return PreTrainedTokenizerFast.from_pretrained(target)


def _model(config: TrainingConfig, tokenizer: PreTrainedTokenizerFast) -> MSAForTraining:
    if config.start_from:
        frozen = torch.bfloat16 if config.adapter and config.bfloat16 else torch.float32
        model: MSAForTraining = MSAForTraining.from_pretrained(config.start_from, dtype=frozen)
        if config.adapter is not None:
            add_adapter(model, config.adapter)
        return model
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


def _run_stage(
    config: TrainingConfig,
    stage: Stage | QuestionStage | RouterStage,
    dataset: Any,
    model: MSAForTraining,
    folder: Path,
    progress: Progress | None,
) -> MSAForTraining:
    """Run one stage, or load what it left."""
    output = folder / stage.name
    done = output / "done"
    if (done / "model.safetensors").is_file():
        if config.adapter is not None:
            model.load_state_dict(load_file(done / "model.safetensors"), strict=False)
            return model
        finished: MSAForTraining = MSAForTraining.from_pretrained(done, dtype=torch.float32)
        return finished
    if isinstance(stage, RouterStage):
        _train_routers(stage, dataset, model, folder, progress)
        _keep(config, model, output)
        return model
    model.loss_settings = stage.losses
    if config.adapter is not None:
        freeze_below(model, stage.train_from_layer if isinstance(stage, QuestionStage) else 0)
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
    )
    if config.compile:
        compile_layers(model)
    trainer = MSATrainer(
        stage=stage,
        config=config,
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=lambda items: items[0],
        callbacks=[_Metrics(folder / "metrics.jsonl", stage, progress)],
    )
    trainer.train(resume_from_checkpoint=_last_checkpoint(output))
    _keep(config, model, output)
    for checkpoint in output.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return model


def _keep(config: TrainingConfig, model: MSAForTraining, output: Path) -> None:
    """Write what a finished stage leaves: whole, or not at all."""
    partial = output / "done.partial"
    model.save_pretrained(
        partial, state_dict=trained_state(model) if config.adapter is not None else None
    )
    partial.rename(output / "done")


def _train_routers(
    stage: RouterStage, run: Any, model: MSAForTraining, folder: Path, progress: Progress | None
) -> None:
    """A stage of routers alone, with a line of metrics."""

    def show(what: str, done: int, total: int) -> None:
        if progress is not None:
            progress(f"{stage.name}: {what}", done, total, {})

    report, failures = run(model, progress=show)
    row = {
        "stage": stage.name,
        "step": report.best_epoch,
        **asdict(report),
        "texts_left_out": failures,
    }
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _last_checkpoint(output: Path) -> str | None:
    """The last whole checkpoint; what a killed run left half written is removed."""
    for checkpoint in output.glob("checkpoint-*"):
        try:  # this file is written last
            json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
    return get_last_checkpoint(str(output)) if output.is_dir() else None


def compile_layers(model: MSAForTraining) -> None:
    """Fuse the pointwise work of every layer (feed-forward and norms) with torch.compile."""
    for layer in model.model.layers:
        for name in ("mlp", "input_layernorm", "post_attention_layernorm"):
            module: Any = getattr(layer, name)
            if not hasattr(module, "_msa_compiled"):
                module.forward = torch.compile(module.forward, dynamic=True)
                module._msa_compiled = True
