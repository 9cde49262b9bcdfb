"""Muon for the layers' matrices and AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from msa.training.config import OptimizerSettings


class MuonWithAdamW(Optimizer):
    """Two optimizers behind one interface, so that schedulers and checkpoints see one.

    Its `param_groups` are the groups of both, and its state is theirs.

    Source: ours; `torch.optim.Muon` takes matrices only and names AdamW for the rest.
    """

    def __init__(self, model: nn.Module, learning_rate: float, settings: OptimizerSettings) -> None:
        """Split the parameters of `model`: 2-d weights inside layers go to Muon.

        Args:
            model: its trainable parameters are taken.
            learning_rate: Muon's (updates scaled to the size of AdamW's by `match_rms_adamw`).
            settings: AdamW's share and weight decay.
        """
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad or parameter.ndim == 0:
                continue
            (matrices if parameter.ndim == 2 and ".layers." in name else rest).append(parameter)
        decay = settings.weight_decay
        self.muon = Muon(
            matrices, lr=learning_rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
        )
        self.adam = AdamW(
            rest,
            lr=learning_rate * settings.adam_learning_rate,
            betas=(0.9, 0.95),
            weight_decay=decay,
        )
        super().__init__([*matrices, *rest], {})
        self.param_groups = [*self.muon.param_groups, *self.adam.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of both."""
        if closure is not None:
            with torch.enable_grad():
                closure()
        self.muon.step()  # type: ignore[no-untyped-call]
        self.adam.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of both."""
        self.muon.zero_grad(set_to_none)
        self.adam.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """State of both."""
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of both."""
        self.muon.load_state_dict(state_dict["muon"])
        self.adam.load_state_dict(state_dict["adam"])
        self.param_groups = [*self.muon.param_groups, *self.adam.param_groups]
