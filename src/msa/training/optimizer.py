"""Muon for the layers' matrices and AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from msa.training.config import OptimizerSettings

# Quintic iteration of Muon (Jordan et al., 2024): singular values end between about 0.7 and 1.2.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """Bring all singular values near 1, by Newton-Schulz iteration.

    In float32, many matrices at once: `torch.optim.Muon` takes one at a time in bfloat16, which on
    a CPU without bfloat16 arithmetic made half of a training step.

    Args:
        matrices: [M, R, C] float32.

    Returns:
        [M, R, C] float32.

    Source: Muon (Jordan et al., 2024), as `torch.optim.Muon`.
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class Muon(Optimizer):
    """Momentum, orthogonalised; updates have the size of AdamW's.

    Source: Muon (Jordan et al., 2024); the scale is that of Liu et al., 2025 ("match_rms_adamw").
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
    ) -> None:
        """Take parameters of two dimensions."""
        super().__init__(
            list(matrices), {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; matrices of one shape go together."""
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                updates = orthogonalise(
                    torch.stack([self._momentum(p, group["momentum"]) for p in parameters])
                )
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(update, alpha=rate)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """Nesterov's momentum in float32."""
        assert parameter.grad is not None
        grad = parameter.grad.float()
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        buffer: Tensor = state["momentum_buffer"].lerp_(grad, 1 - momentum)
        return grad.lerp(buffer, momentum)


class MuonWithAdamW(Optimizer):
    """Two optimizers with one interface, so that schedulers and checkpoints see one.

    Its `param_groups` are the groups of both, and its state is theirs.

    Source: ours; Muon takes matrices only.
    """

    def __init__(self, model: nn.Module, learning_rate: float, settings: OptimizerSettings) -> None:
        """Split the parameters of `model`: 2-d weights inside layers go to Muon.

        Args:
            model: its trainable parameters are taken.
            learning_rate: Muon's (updates have the size of AdamW's).
            settings: AdamW's share and weight decay.
        """
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad or parameter.ndim == 0:
                continue
            (matrices if parameter.ndim == 2 and ".layers." in name else rest).append(parameter)
        decay = settings.weight_decay
        self.muon = Muon(matrices, lr=learning_rate, weight_decay=decay)
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
        self.muon.step()
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
