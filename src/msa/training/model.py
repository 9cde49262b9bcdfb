"""The model with its training loss: what the Trainer trains, and nothing that inference needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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

    Attributes:
        loss_settings: weights of the parts of the loss.
        document_batch: documents that are encoded together; their activations are computed again
            in the backward pass, so that those of one batch are held at a time. 0 encodes all in
            a few batches and holds everything.
    """

    def __init__(self, config: MSAConfig) -> None:
        super().__init__(config)
        width = (config.num_key_value_heads or 1) * config.head_dim
        self.number_head = nn.Linear(width, MAX_DIGITS * (BLANK_DIGIT + 1))
        self.loss_settings = LossSettings()
        self.document_batch = 0
        self.post_init()

    def forward(  # type: ignore[override]  # a step is given by name, as the Trainer does
        self, documents: Tensor | None = None, **inputs: Any
    ) -> Any:
        """Loss of one step when `documents` is given; else as `MSAForCausalLM.forward`.

        Args:
            documents: [N, L] int64, right-padded.
            **inputs: "lengths" [N], "digits" [N, MAX_DIGITS], "groups" (see
                `msa.training.samples.collate`). "document_batches", given where the model is in
                shards: run so many batches of documents, empty ones if need be, and let every
                batch and group have a gradient.

        Returns:
            {"loss": scalar, "parts": name -> detached scalar}.
        """
        if documents is None:
            return super().forward(**inputs)
        settings = self.loss_settings
        parts: dict[str, Tensor] = {}
        loss = documents.new_zeros((), dtype=torch.float32)
        batches = int(inputs.get("document_batches", 0))
        touched: list[Tensor] | None = [] if batches else None
        states, text_loss = self._encode(documents, inputs["lengths"], batches, touched)
        if text_loss is not None:
            parts["documents"] = text_loss
            loss = loss + settings.documents * text_loss
        if settings.numbers > 0:
            parts["numbers"] = self._number_loss(states, inputs["digits"])
            loss = loss + settings.numbers * parts["numbers"]
        loss = loss + self._question_loss(states, inputs["groups"], parts, touched)
        if touched:
            loss = loss + torch.stack([tensor.float().sum() for tensor in touched]).sum() * 0
        return {
            "loss": loss,
            "parts": {name: value.detach() for name, value in parts.items()},
        }

    def _encode(
        self,
        documents: Tensor,
        lengths: Tensor,
        batches: int = 0,
        touched: list[Tensor] | None = None,
    ) -> tuple[LatentStates, Tensor | None]:
        """Stage 1 in batches, each as long as its own longest document.

        The documents of a step come sorted by length, so that little padding is computed.

        Args:
            documents, lengths: of the step.
            batches: to be run at least, if need be with a document that counts nothing.
            touched: gets the states of every batch.
        """
        size = self._batch_size(len(lengths))
        given = list(zip(torch.split(documents, size), torch.split(lengths, size), strict=True))
        empty = (documents[:1, :1], lengths.new_ones(1))
        with_loss = self.loss_settings.documents > 0
        kept = []
        total = count = lengths.new_zeros((), dtype=torch.float32)
        for ids, true in given + [empty] * (batches - len(given)):
            ids = ids[:, : int(true.max())]
            if self.document_batch:
                states, loss = checkpoint(
                    self._encode_batch, ids, true, with_loss, use_reentrant=False
                )
            else:
                states, loss = self._encode_batch(ids, true, with_loss)
            kept.append(states)
            if loss is not None:
                labelled = (true - 1).sum()
                total, count = total + loss * labelled, count + labelled
        if touched is not None:
            for layer in (layer for states in kept for layer in states.layers.values()):
                touched += [layer.pooled_keys, layer.pooled_values, layer.routing_keys]
        states = concatenate(kept[: len(given)])
        return states, total / count.clamp(min=1) if with_loss else None

    def batches_of(self, documents: int) -> int:
        """In how many batches so many documents are encoded."""
        return -(-documents // self._batch_size(documents))

    def _batch_size(self, documents: int) -> int:
        return self.document_batch or max(MIN_BATCH, -(-documents // MAX_BATCHES))

    def _encode_batch(
        self, ids: Tensor, lengths: Tensor, with_loss: bool
    ) -> tuple[LatentStates, Tensor | None]:
        """States of some documents, and their language model loss."""
        states, hidden = self.model.encode(ids, lengths, with_hidden=with_loss)
        if hidden is None:
            return states, None
        token = torch.arange(ids.shape[1], device=ids.device)
        labels = ids.masked_fill(token >= lengths[:, None], IGNORED)
        return states, language_model_loss(hidden, labels, self.lm_head)

    def _question_loss(
        self,
        states: LatentStates,
        groups: list[Mapping[str, Tensor]],
        parts: dict[str, Tensor],
        touched: list[Tensor] | None,
    ) -> Tensor:
        """L_LM over all groups, weighted by their labels, and L_aux (Eq. 5)."""
        if not groups:  # no questions of the kinds asked for
            return self._nothing()
        sums = _QuestionSums(self.loss_settings, self.temperature.detach())
        for group in groups:
            memory, hidden = self._run_group(states, group, sums)
            if touched is not None:
                touched.append(hidden)
            if memory is not None:
                sums.add_routing(memory, group)
        loss = sums.loss(parts, len(self.config.routing_layers or ()))
        return loss if loss.requires_grad else loss + self._nothing()

    def _nothing(self) -> Tensor:
        """0, with a gradient of 0, for steps that teach nothing."""
        trained = (p for p in (self.number_head.bias, *self.parameters()) if p.requires_grad)
        return next(trained, self.number_head.bias).sum() * 0

    def _run_group(
        self, states: LatentStates, group: Mapping[str, Tensor], sums: _QuestionSums
    ) -> tuple[LatentMemory | None, Tensor]:
        """Run the questions of a group; the memory that they routed over, if they did."""
        memory = None
        if bool(group["routing_mask"].any()):
            with_last = self.loss_settings.last_token > 0 and bool(group["read"].any())
            top_k = self.config.top_k_documents
            memory = LatentMemory(states, top_k, with_last_token=with_last)
        step = Step(
            memory=memory,
            routing_mask=group["routing_mask"],
            memory_mask=group["memory_mask"],
        )
        embedded = self.model.embed_tokens(group["input_ids"])
        route_only = bool(group.get("route_only", False))
        hidden = self.model(embedded, group["position_ids"], step, routing_only=route_only)
        if not route_only:
            sums.add_language_model(hidden, group, self.lm_head)
        return memory, hidden

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


class _QuestionSums:
    """The losses of all groups of questions of a step, to be weighted at its end."""

    def __init__(self, settings: LossSettings, tau: Tensor) -> None:
        self.settings, self.tau = settings, tau
        self.total = self.weight = tau.new_zeros(())
        self.routing: list[Tensor] = []
        self.fused: list[Tensor] = []
        self.last_token: list[Tensor] = []
        self.recall: dict[str, list[Tensor]] = {}
        self.rows = 0

    def add_language_model(
        self, hidden: Tensor, group: Mapping[str, Tensor], head: nn.Module
    ) -> None:
        """L_LM of a group."""
        share = group["weights"][:, 1:].sum()
        part = language_model_loss(hidden, group["labels"], head, group["weights"])
        self.total, self.weight = self.total + part * share, self.weight + share

    def add_routing(self, memory: LatentMemory, group: Mapping[str, Tensor]) -> None:
        """L_aux of the rows of a group that have a right document."""
        asking = group["positives"].any(dim=1)
        if not bool(asking.any()):
            return
        positives, read = group["positives"][asking], group["read"][asking]
        count = len(positives)
        self.rows += count
        kind = "later_recall_at_1" if bool(read.any()) else "recall_at_1"
        layers = [scores[asking] for scores in memory.scores.values()]
        for scores in layers:
            self.routing.append(count * routing_loss(scores, positives, self.tau, read))
            self._found(kind, scores, positives, read)
        if self.settings.fused > 0:
            together = torch.stack(layers).mean(0)
            self.fused.append(count * routing_loss(together, positives, self.tau, read))
            self._found(f"fused_{kind}", together, positives, read)
        for scores in memory.last_token_scores.values():
            self.last_token.append(routing_loss(scores[asking], positives, self.tau, read))
            self._found("last_token_recall_at_1", scores[asking], positives, read)

    def _found(self, name: str, scores: Tensor, positives: Tensor, read: Tensor) -> None:
        """Whether the best document that was not read is right."""
        best = scores.masked_fill(read, -torch.inf).argmax(1, keepdim=True)
        self.recall.setdefault(name, []).append(positives.gather(1, best).float())

    def loss(self, parts: dict[str, Tensor], layers: int) -> Tensor:
        """The weighted sum; its parts are put into `parts`."""
        settings = self.settings
        parts["language_model"] = self.total / self.weight.clamp(min=1e-6)
        loss: Tensor = settings.language_model * parts["language_model"]
        if self.routing:
            parts["routing"] = torch.stack(self.routing).sum() / (self.rows * layers)
            parts.update((kind, torch.cat(found).mean()) for kind, found in self.recall.items())
            loss = loss + settings.routing * parts["routing"]
        if self.fused:
            parts["fused"] = torch.stack(self.fused).sum() / self.rows
            loss = loss + settings.fused * parts["fused"]
        if self.last_token:
            parts["last_token"] = torch.stack(self.last_token).mean()
            loss = loss + settings.last_token * parts["last_token"]
        return loss


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
