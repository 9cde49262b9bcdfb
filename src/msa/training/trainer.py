"""Training steps on transformers' `Trainer`: the optimizers, the parts of the loss, the metrics."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, get_scheduler

from msa.errors import TrainingError
from msa.training.adapters import is_router, trained_part
from msa.training.config import QuestionStage, Stage, TrainingConfig
from msa.training.model import MSAForTraining
from msa.training.optimizer import MuonWithAdamW
from msa.training.samples import empty_group

Progress = Callable[[str, int, int, dict[str, float]], None]

MAX_SKIPPED_IN_A_ROW = 5
"""Steps in a row that may have no finite loss or gradient before training stops."""


class MSATrainer(Trainer):
    """transformers' Trainer over whole training steps, with Muon and the parts of the loss.

    A step whose loss or gradient is not finite changes nothing and is counted.
    """

    def __init__(
        self, *, stage: Stage | QuestionStage, config: TrainingConfig, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.stage = stage
        self.run_config = config
        self._parts: dict[str, list[Tensor]] = {}
        self._parts_of_step: dict[str, Tensor] = {}
        self._skipped = self._skipped_in_a_row = 0

        if self.args.fsdp:
            self._prepare_shards()

    def _prepare_shards(self) -> None:
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None:
            raise TrainingError("fsdp: shards are for GPUs, and there is none; set it to false")
        scalar = self.model.temperature  # FSDP2 takes none
        scalar.data = scalar.data.to(self.accelerator.device)
        plugin.ignored_modules = [torch.nn.ParameterList([scalar])]

    def full_state(self) -> dict[str, Tensor] | None:
        """All weights of a model that is in shards, on the main process; None if it is whole."""
        if not self.args.fsdp:
            return None
        state: dict[str, Tensor] = self.accelerator.get_state_dict(self.model)
        return state

    def create_optimizer(self, model: Any = None) -> Any:
        """Muon and AdamW at the stage's rate; AdamW alone with an adapter, or when asked for."""
        settings = self.run_config.optimizer
        alone = self.run_config.adapter is not None or not settings.muon
        if getattr(self, "optimizer", None) is None and alone:
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
            self.optimizer = MuonWithAdamW(self.model, self.stage.learning_rate, settings)
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
            weights = self.model.state_dict() if state_dict is None else state_dict
            state_dict = trained_part(weights)
        super()._save(output_dir, state_dict)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Steps in order: step i is made from i."""
        return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """Loss of one step; its parts are kept for the log."""
        outputs = model(**(self._aligned(inputs) if self.args.fsdp else inputs))
        self._parts_of_step = {"loss": outputs["loss"].detach(), **outputs["parts"]}
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _aligned(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The step with as many batches and groups as the largest of all processes has.

        Shards are gathered whenever a layer is run, which all processes must do in step.
        """
        documents, device = len(inputs["lengths"]), self.accelerator.device
        kinds: list[list[Any]] = [[], []]
        for group in inputs["groups"]:
            kinds[bool(group.get("route_only", False))].append(group)
        counts = [self.model.batches_of(documents), *map(len, kinds)]
        gathered = self.accelerator.gather(torch.tensor([counts], device=device))
        batches, *most = gathered.amax(0).tolist()
        for route_only, (groups, wanted) in enumerate(zip(kinds, most, strict=True)):
            for _ in range(wanted - len(groups)):
                groups.append(empty_group(documents, device, route_only=bool(route_only)))
        return {**inputs, "groups": [*kinds[1], *kinds[0]], "document_batches": batches}

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Loss and gradients of one step; no gradients when one of them is not finite.

        Without gradients the optimizer leaves weights and momentum as they are.

        Raises:
            TrainingError: that was so `MAX_SKIPPED_IN_A_ROW` times in a row.
        """
        loss: Tensor = super().training_step(model, *args, **kwargs)
        finite = torch.isfinite(loss).all() & _gradients_are_finite(model)
        if bool(self.accelerator.gather(finite.reshape(1).float()).all()):
            for name, value in self._parts_of_step.items():
                self._parts.setdefault(name, []).append(value)
            self._skipped_in_a_row = 0
            return loss
        model.zero_grad(set_to_none=True)
        self._skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"stage {self.stage.name!r}: loss or gradient was not finite in "
                f"{self._skipped_in_a_row} steps in a row, the last of them step "
                f"{self.state.global_step + 1}; train with a lower learning_rate or max_grad_norm, "
                "into another --output"
            )
        return torch.zeros_like(loss)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means of the parts since the last log, and how many steps were skipped."""
        if "loss" in logs:
            logs.pop("loss")  # counts skipped steps as 0
            logs["skipped"] = self._skipped
            self._skipped = 0
        sums = {
            name: (torch.stack(values).double().sum().item(), len(values))
            for name, values in self._parts.items()
        }
        found = [sums]
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            found = gather_object(found)
        for name in dict.fromkeys(name for each in found for name in each):
            pairs = [each[name] for each in found if name in each]
            logs[name] = round(sum(s for s, _ in pairs) / sum(n for _, n in pairs), 5)
        self._parts = {}
        super().log(logs, *args, **kwargs)


def _gradients_are_finite(model: Any) -> Tensor:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm: Any = torch.nn.utils.get_total_norm(gradients)
    finite: Tensor = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).isfinite()
    return finite


class MetricsFile(TrainerCallback):
    """Writes `metrics.jsonl` and calls the progress function."""

    def __init__(self, path: Path, stage: Stage | QuestionStage, progress: Progress | None) -> None:
        self.path, self.stage, self.progress = path, stage, progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Drop the lines of steps that are done again, since they came after the checkpoint."""
        if not self.path.is_file() or not state.is_world_process_zero:
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # the run was killed while it wrote this line
                continue
            if row["stage"] != self.stage.name or row["step"] <= state.global_step:
                kept.append(line + "\n")
        scratch = self.path.with_suffix(".partial")
        scratch.write_text("".join(kept), encoding="utf-8")
        scratch.replace(self.path)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Append a line."""
        if not logs or "skipped" not in logs:  # the summary at the end
            return
        if not state.is_world_process_zero:
            return
        row = {"stage": self.stage.name, "step": state.global_step, **logs}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.progress is not None:
            self.progress(self.stage.name, state.global_step, self.stage.steps, logs)


def compile_layers(model: MSAForTraining) -> None:
    """Fuse the pointwise work of every layer (feed-forward and norms) with torch.compile."""
    for layer in model.model.layers:
        for name in ("mlp", "input_layernorm", "post_attention_layernorm"):
            module: Any = getattr(layer, name)
            if not hasattr(module, "_msa_compiled"):
                module.forward = torch.compile(module.forward, dynamic=True)
                module._msa_compiled = True
