"""The cache of a generation: local keys and values, and the memory that was selected for it."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from msa.types import Content, Selection

ROOM = 64  # tokens that a layer grows by before it is copied


class RoomyLayer(DynamicLayer):
    """A layer of a cache with room after its tokens: not all is copied for every new one."""

    keys: Tensor
    values: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rooms: dict[str, Tensor] = {}  # "keys", "values" -> what they are the first tokens of

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in further tokens, [B, G, T, D]; all keys and values there are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._grown("keys", self.keys, key_states)
        self.values = self._grown("values", self.values, value_states)
        return self.keys, self.values

    def _grown(self, name: str, held: Tensor, new: Tensor) -> Tensor:
        if held.numel() == 0:
            return new
        if held.requires_grad or new.requires_grad:
            return torch.cat([held, new], dim=2)
        length, wanted = held.shape[2], held.shape[2] + new.shape[2]
        room = self.rooms.get(name)
        if room is None or not _begins(room, held) or wanted > room.shape[2]:
            room = self.rooms[name] = _room(held, len(held), wanted)
            room[:, :, :length] = held
        room[:, :, length:wanted] = new
        return room[:, :, :wanted]

    def join(self, other: DynamicLayer, length: int) -> None:
        """Take in the rows of another layer after its own, both padded in front to `length`."""
        self.keys = self._stacked("keys", self.keys, other.keys, length)
        self.values = self._stacked("values", self.values, other.values, length)

    def _stacked(self, name: str, first: Tensor, second: Tensor, length: int) -> Tensor:
        room = self.rooms[name] = _room(first, len(first) + len(second), length)
        for rows, held in ((room[: len(first)], first), (room[len(first) :], second)):
            start = length - held.shape[2]
            rows[:, :, :start] = 0
            rows[:, :, start:length] = held
        return room[:, :, :length]


def _room(like: Tensor, rows: int, length: int) -> Tensor:
    """[rows, G, length and more, D], not initialized."""
    return like.new_empty(rows, like.shape[1], length + ROOM, like.shape[3])


def _begins(room: Tensor, held: Tensor) -> bool:
    """Whether `held` is the first tokens of all rows of `room`."""
    same = held.data_ptr() == room.data_ptr() and held.stride() == room.stride()
    return same and len(held) == len(room)


class MSACache(DynamicCache):
    """A `DynamicCache` that also holds, per routing layer, the selected documents' content.

    Documents are chosen once, when a context is prefilled; every later token attends to the same
    content (paper 3.4), so a layer that has content here does not route again.

    Attributes:
        contents: routing layer -> content of the selected documents.
        selections: routing layer -> which documents these are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer_class_to_replicate = RoomyLayer
        self.contents: dict[int, Content] = {}
        self.selections: dict[int, Selection] = {}

    def remember(self, layer: int, selection: Selection, content: Content) -> None:
        """Keep what a layer selected."""
        self.selections[layer] = selection
        self.contents[layer] = content

    def truncate(self, length: int) -> None:
        """Forget all local tokens but the first `length`."""
        for layer in self.layers:
            layer.keys = layer.keys[:, :, :length]
            layer.values = layer.values[:, :, :length]

    def rows(self, index: Tensor | None) -> MSACache:
        """Rows of the batch, [b] int64, as a cache of their own; None for all of them."""
        part = MSACache()
        part.contents, part.selections = dict(self.contents), dict(self.selections)
        part.layers = [copy(layer) for layer in self.layers]
        for layer in [*self.layers, *part.layers]:
            layer.rooms = {}  # neither writes into what the other reads
        if index is not None:
            part.batch_select_indices(index)
        return part

    def join(self, other: MSACache) -> None:
        """Take in the rows of another cache after its own; the shorter is padded in front."""
        longest = max(self.get_seq_length(), other.get_seq_length())
        for ours, theirs in zip(self.layers, other.layers, strict=True):
            ours.join(theirs, longest)
        for layer, theirs_too in other.contents.items():
            self.contents[layer] = _together(self.contents[layer], theirs_too)
        self.selections = {}  # rows of several memories have nothing in common

    def drop_first(self, columns: int) -> None:
        """Forget the first local tokens of every row."""
        for layer in self.layers:
            layer.keys = layer.keys[:, :, columns:]
            layer.values = layer.values[:, :, columns:]

    def _select_memory(self, rows: Tensor) -> None:
        for layer, content in self.contents.items():
            self.contents[layer] = Content(
                content.keys[rows], content.values[rows], content.mask[rows]
            )
        for layer, selection in self.selections.items():
            self.selections[layer] = Selection(selection.documents[rows], selection.scores[rows])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch, [b] int64, in that order."""
        super().batch_select_indices(indices)
        self._select_memory(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        super().batch_repeat_interleave(repeats)
        for rows in [s.documents for s in self.selections.values()][:1]:
            index = rows.new_tensor(range(len(rows))).repeat_interleave(repeats)
            self._select_memory(index)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows, for beam search."""
        super().reorder_cache(beam_idx)
        self._select_memory(beam_idx)


def _together(first: Content, second: Content) -> Content:
    """Content of the rows of both, as wide as the wider one."""
    rows = max(first.mask.shape[1], second.mask.shape[1])
    both = (first, second)

    def padded(t: Tensor) -> Tensor:
        return F.pad(t, (*(0, 0) * (t.dim() - 2), 0, rows - t.shape[1]))

    return Content(
        torch.cat([padded(c.keys) for c in both]),
        torch.cat([padded(c.values) for c in both]),
        torch.cat([padded(c.mask) for c in both]),
    )
