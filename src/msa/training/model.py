"""The model with its training loss: what the Trainer trains, and nothing that inference needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from msa.memory.latent import LatentMemory
from msa.model.configuration_msa import MSAConfig
from msa.model.modeling_msa import MSAForCausalLM, Step
from msa.training.config import LossSettings
from msa.training.losses import language_model_loss, routing_loss
from msa.training.samples import BLANK_DIGIT, IGNORED, MAX_DIGITS
from msa.types import LatentStates


class MSAForTraining(MSAForCausalLM):
    """`MSAForCausalLM` whose forward takes a whole training step and returns its loss.

    The documents of a step are encoded once, with gradients, and all questions run against them.
    `number_head` reads a document's number out of the pooled values of its first chunk; it is an
    aid to early training and is left out of exported checkpoints.
    """

    def __init__(self, config: MSAConfig) -> None:
        super().__init__(config)
        width = (config.num_key_value_heads or 1) * config.head_dim
        self.number_head = nn.Linear(width, MAX_DIGITS * (BLANK_DIGIT + 1))
        self.loss_settings = LossSettings()
        self.post_init()

    def forward(  # type: ignore[override]  # a step is given by name, as the Trainer does
        self, documents: Tensor | None = None, **inputs: Any
    ) -> Any:
        """Loss of one step when `documents` is given; else as `MSAForCausalLM.forward`.

        Args:
            documents: [N, L] int64, right-padded.
            **inputs: "lengths" [N], "digits" [N, MAX_DIGITS], "groups" (see
                `msa.training.samples.collate`).

        Returns:
            {"loss": scalar, "parts": name -> detached scalar}.
        """
        if documents is None:
            return super().forward(**inputs)
        lengths: Tensor = inputs["lengths"]
        settings = self.loss_settings
        parts: dict[str, Tensor] = {}
        wants_text = settings.documents > 0
        states, hidden = self.model.encode(documents, lengths, with_hidden=wants_text)
        loss = documents.new_zeros((), dtype=torch.float32)
        if hidden is not None:
            token = torch.arange(documents.shape[1], device=documents.device)
            labels = documents.masked_fill(token >= lengths[:, None], IGNORED)
            parts["documents"] = language_model_loss(hidden, labels, self.lm_head)
            loss = loss + settings.documents * parts["documents"]
        if settings.numbers > 0:
            parts["numbers"] = self._number_loss(states, inputs["digits"])
            loss = loss + settings.numbers * parts["numbers"]
        question_loss = self._question_loss(states, inputs["groups"], parts)
        return {
            "loss": loss + question_loss,
            "parts": {name: value.detach() for name, value in parts.items()},
        }

    def _question_loss(
        self, states: LatentStates, groups: list[Mapping[str, Tensor]], parts: dict[str, Tensor]
    ) -> Tensor:
        """L_LM over all groups, weighted by their labels, and L_aux (Eq. 5)."""
        total = weight = self.temperature.new_zeros(())
        if not groups:  # a world without questions of the kinds asked for
            nothing: Tensor = self.number_head.bias.sum() * 0
            return nothing
        routing: list[Tensor] = []
        recall: list[Tensor] = []
        for group in groups:
            memory = None
            if bool(group["routing_mask"].any()):
                top_k, score = self.config.top_k_documents, self.config.routing_score
                memory = LatentMemory(states, top_k, score)
            step = Step(
                memory=memory,
                routing_mask=group["routing_mask"],
                memory_mask=group["memory_mask"],
            )
            embedded = self.model.embed_tokens(group["input_ids"])
            hidden = self.model(embedded, group["position_ids"], step)
            share = group["weights"][:, 1:].sum()
            part = language_model_loss(hidden, group["labels"], self.lm_head, group["weights"])
            total, weight = total + part * share, weight + share
            if memory is None:
                continue
            positives = group["positives"]
            if not bool(positives.any()):
                continue
            tau = self.temperature.detach()
            read = group["read"]
            routing += [routing_loss(s, positives, tau, read) for s in memory.scores.values()]
            recall += [
                positives.gather(1, s.masked_fill(read, -torch.inf).argmax(1, keepdim=True))
                .float()
                .mean()
                for s in memory.scores.values()
            ]
        settings = self.loss_settings
        parts["language_model"] = total / weight.clamp(min=1e-6)
        loss: Tensor = settings.language_model * parts["language_model"]
        if routing:
            parts["routing"] = torch.stack(routing).mean()
            parts["recall_at_1"] = torch.stack(recall).mean()
            loss = loss + settings.routing * parts["routing"]
        return loss

    def _number_loss(self, states: LatentStates, digits: Tensor) -> Tensor:
        """Cross entropy of the number's digits from the first chunk's pooled values."""
        first = states.chunk_counts.cumsum(0) - states.chunk_counts
        losses = []
        for layer in states.layers.values():
            values = layer.pooled_values[first].flatten(1)
            logits = self.number_head(values).view(-1, MAX_DIGITS, BLANK_DIGIT + 1).float()
            losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), digits.flatten()))
        return torch.stack(losses).mean()

    def export(self, folder: str) -> None:
        """Save as a plain `MSAForCausalLM` checkpoint, without the training head."""
        plain = MSAForCausalLM(self.config)
        wanted = plain.state_dict().keys()
        plain.load_state_dict({k: v for k, v in self.state_dict().items() if k in wanted})
        plain.config.use_cache = True  # the Trainer turns it off
        plain.generation_config.use_cache = True
        plain.save_pretrained(folder)
