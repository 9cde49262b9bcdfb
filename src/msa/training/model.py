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
from msa.types import LatentStates, LayerStates

# Documents of a step are encoded in at most so many batches, of at least so many documents.
MAX_BATCHES = 3
MIN_BATCH = 8


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
        loss = documents.new_zeros((), dtype=torch.float32)
        states, text_loss = self._encode(documents, lengths, with_loss=settings.documents > 0)
        if text_loss is not None:
            parts["documents"] = text_loss
            loss = loss + settings.documents * text_loss
        if settings.numbers > 0:
            parts["numbers"] = self._number_loss(states, inputs["digits"])
            loss = loss + settings.numbers * parts["numbers"]
        question_loss = self._question_loss(states, inputs["groups"], parts)
        return {
            "loss": loss + question_loss,
            "parts": {name: value.detach() for name, value in parts.items()},
        }

    def _encode(
        self, documents: Tensor, lengths: Tensor, *, with_loss: bool
    ) -> tuple[LatentStates, Tensor | None]:
        """Stage 1 in a few batches, each as long as its own longest document.

        The documents of a step come sorted by length, so that little padding is computed.
        """
        batches = []
        total = count = lengths.new_zeros((), dtype=torch.float32)
        size = max(MIN_BATCH, -(-len(lengths) // MAX_BATCHES))
        for ids, true in zip(torch.split(documents, size), torch.split(lengths, size), strict=True):
            ids = ids[:, : int(true.max())]
            states, hidden = self.model.encode(ids, true, with_hidden=with_loss)
            batches.append(states)
            if hidden is not None:
                token = torch.arange(ids.shape[1], device=ids.device)
                labels = ids.masked_fill(token >= true[:, None], IGNORED)
                labelled = (true - 1).sum()
                loss = language_model_loss(hidden, labels, self.lm_head)
                total, count = total + loss * labelled, count + labelled
        states = concatenate(batches)
        return states, total / count.clamp(min=1) if with_loss else None

    def _question_loss(
        self, states: LatentStates, groups: list[Mapping[str, Tensor]], parts: dict[str, Tensor]
    ) -> Tensor:
        """L_LM over all groups, weighted by their labels, and L_aux (Eq. 5)."""
        total = weight = self.temperature.new_zeros(())
        if not groups:  # a world without questions of the kinds asked for
            nothing: Tensor = self.number_head.bias.sum() * 0
            return nothing
        routing: list[Tensor] = []
        fused: list[Tensor] = []
        last_token: list[Tensor] = []
        recall: dict[str, list[Tensor]] = {}
        rows = 0
        for group in groups:
            memory = None
            if bool(group["routing_mask"].any()):
                top_k = self.config.top_k_documents
                with_last = self.loss_settings.last_token > 0 and bool(group["read"].any())
                memory = LatentMemory(states, top_k, with_last_token=with_last)
            step = Step(
                memory=memory,
                routing_mask=group["routing_mask"],
                memory_mask=group["memory_mask"],
            )
            embedded = self.model.embed_tokens(group["input_ids"])
            if bool(group.get("route_only", False)):
                self.model(embedded, group["position_ids"], step, routing_only=True)
            else:
                hidden = self.model(embedded, group["position_ids"], step)
                share = group["weights"][:, 1:].sum()
                part = language_model_loss(hidden, group["labels"], self.lm_head, group["weights"])
                total, weight = total + part * share, weight + share
            if memory is None:
                continue
            asking = group["positives"].any(dim=1)
            if not bool(asking.any()):
                continue
            positives, read = group["positives"][asking], group["read"][asking]
            tau = self.temperature.detach()
            count = len(positives)
            rows += count
            kind = "later_recall_at_1" if bool(read.any()) else "recall_at_1"
            for scores in memory.scores.values():
                scores = scores[asking]
                routing.append(count * routing_loss(scores, positives, tau, read))
                best = scores.masked_fill(read, -torch.inf).argmax(1, keepdim=True)
                recall.setdefault(kind, []).append(positives.gather(1, best).float())
            if self.loss_settings.fused > 0:
                together = torch.stack([s[asking] for s in memory.scores.values()]).mean(0)
                fused.append(count * routing_loss(together, positives, tau, read))
                best = together.masked_fill(read, -torch.inf).argmax(1, keepdim=True)
                found = positives.gather(1, best).float()
                recall.setdefault(f"fused_{kind}", []).append(found)
            for scores in memory.last_token_scores.values():
                last_token.append(routing_loss(scores[asking], positives, tau, read))
                best = scores[asking].masked_fill(read, -torch.inf).argmax(1, keepdim=True)
                found = positives.gather(1, best).float()
                recall.setdefault("last_token_recall_at_1", []).append(found)
        settings = self.loss_settings
        parts["language_model"] = total / weight.clamp(min=1e-6)
        loss: Tensor = settings.language_model * parts["language_model"]
        if routing:
            layers = len(self.config.routing_layers or ())
            parts["routing"] = torch.stack(routing).sum() / (rows * layers)
            parts.update((kind, torch.cat(found).mean()) for kind, found in recall.items())
            loss = loss + settings.routing * parts["routing"]
        if fused:
            parts["fused"] = torch.stack(fused).sum() / rows
            loss = loss + settings.fused * parts["fused"]
        if last_token:
            parts["last_token"] = torch.stack(last_token).mean()
            loss = loss + settings.last_token * parts["last_token"]
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

    def export(self, folder: str, state: Mapping[str, Tensor]) -> None:
        """Save as a plain `MSAForCausalLM` checkpoint, without the training head.

        Args:
            folder: of the checkpoint.
            state: this model's weights under the plain model's names.
        """
        plain = MSAForCausalLM(self.config).to(self.model.embed_tokens.weight.dtype)
        wanted = plain.state_dict().keys()
        plain.load_state_dict({k: v for k, v in state.items() if k in wanted})
        plain.config.use_cache = True  # the Trainer turns it off
        plain.generation_config.use_cache = True
        plain.save_pretrained(folder)


def concatenate(batches: list[LatentStates]) -> LatentStates:
    """The states of several batches of documents, as of one."""
    if len(batches) == 1:
        return batches[0]
    layers = {}
    for layer in batches[0].layers:
        parts = [batch.layers[layer] for batch in batches]
        layers[layer] = LayerStates(
            torch.cat([p.pooled_keys for p in parts]),
            torch.cat([p.pooled_values for p in parts]),
            torch.cat([p.routing_keys for p in parts]),
        )
    return LatentStates(torch.cat([b.chunk_counts for b in batches]), layers)
