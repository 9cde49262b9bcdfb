"""Routing keys that are searched without reading all of them (ours; off unless asked for).

`ClusteredIndex` holds the routing keys of one layer in blocks of alike ones (`msa.ops.pruning`) and
reads the blocks that can hold a question's best documents. With `slack` 1 it selects what a full
scan selects, always; below 1 nearly that, for a fraction of the work. Documents that are added
later lie behind, in a tail that is read in full until the next `build`.

Shapes: B batch, T query tokens, N documents, C chunks, M blocks, G KV heads, D head dim, K selected
documents per row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from msa.errors import InputError
from msa.ops.kernels import route_documents
from msa.ops.pruning import BlockScan, KeyBlocks, cluster_order, describe_blocks
from msa.ops.routing import check_routing, select_documents
from msa.types import Selection

# A layer that has grown to so many times the chunks of its blocks is parted anew.
REBUILD = 1.25


@dataclass(frozen=True, slots=True, kw_only=True)
class PruningSettings:
    """How keys are parted into blocks, and how many of them are read.

    Attributes:
        slack: 1 reads every block that can hold a document of the top-k: exact. Less than 1 trusts
            that a block's best key does not use up that share of its bound: nearly exact.
        block_size: chunks of a mean block. Smaller blocks have sharper bounds, and more of them.
        seed: of the clustering.

    Raises:
        InputError: slack outside 0 to 1, block_size below 1.
    """

    slack: float = 1.0
    block_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.slack <= 1.0:
            raise InputError(f"slack={self.slack}: expected 0 to 1; 1 is exact")
        if self.block_size < 1:
            raise InputError(f"block_size={self.block_size}: expected at least 1")


@dataclass(frozen=True, slots=True)
class ClusteredIndex:
    """The routing keys of one layer, in blocks, with a tail. Frozen: views may share it.

    Attributes:
        settings: of the build.
        num_documents: N, those of the tail included.
    """

    settings: PruningSettings
    num_documents: int
    _blocks: KeyBlocks
    _blocked_documents: int
    _tail_keys: Tensor
    _tail_counts: Tensor
    _tail_scales: Tensor | None

    @classmethod
    def build(
        cls,
        routing_keys: Tensor,
        chunk_counts: Tensor,
        settings: PruningSettings | None = None,
        *,
        scales: Tensor | None = None,
    ) -> ClusteredIndex:
        """Part the keys of a layer into blocks; they are copied into another order.

        Args:
            routing_keys: [C, G, D] on the CPU; float32, bfloat16 or float16; int8 with `scales`.
            chunk_counts: [N] int64, chunks of each document, in the order of the keys.
            settings: exact by default.
            scales: [C] float32, for int8 keys.

        Raises:
            InputError: keys on another device, or of a shape that does not belong to the counts.
        """
        settings = settings or PruningSettings()
        _check_keys(routing_keys, chunk_counts, scales)
        keys = routing_keys.detach().flatten(1)
        order, sizes = cluster_order(keys, settings.block_size, settings.seed, scales)
        documents = torch.repeat_interleave(chunk_counts).int()[order]
        keys, scales = keys[order], None if scales is None else scales[order]
        means, radii, norm = describe_blocks(keys, sizes, scales)
        outline = torch.cat([means, radii[:, None]], dim=1)
        blocks = KeyBlocks(keys, documents, sizes.cumsum(0), outline, norm, scales)
        tail = None if scales is None else scales[:0]
        count = len(chunk_counts)
        return cls(settings, count, blocks, count, routing_keys[:0], chunk_counts[:0], tail)

    @property
    def num_bytes(self) -> int:
        """Memory that is held."""
        blocks = self._blocks
        held = [blocks.keys, blocks.documents, blocks.ends, blocks.outline, blocks.scales]
        held += [self._tail_keys, self._tail_counts, self._tail_scales]
        return sum(t.nbytes for t in held if t is not None)

    @property
    def num_tail_chunks(self) -> int:
        """Chunks that every search reads in full; `build` again when they are many."""
        return len(self._tail_keys)

    def with_slack(self, slack: float) -> ClusteredIndex:
        """The same keys, searched with another slack."""
        return replace(self, settings=replace(self.settings, slack=slack))

    def with_documents(
        self, routing_keys: Tensor, chunk_counts: Tensor, *, scales: Tensor | None = None
    ) -> ClusteredIndex:
        """These keys with more documents behind; they share all but the tail, which is copied.

        Args:
            routing_keys: [c, G, D], dtype as before.
            chunk_counts: [n] int64.
            scales: [c] float32, for int8 keys.

        Raises:
            InputError: another dtype or shape than those before.
        """
        _check_keys(routing_keys, chunk_counts, scales)
        before = self._tail_keys
        if routing_keys.dtype != before.dtype or routing_keys.shape[1:] != before.shape[1:]:
            raise InputError(
                f"keys of {routing_keys.dtype} {list(routing_keys.shape[1:])} behind keys of "
                f"{before.dtype} {list(before.shape[1:])}: expected the same; give keys of one bank"
            )
        old, new = self._tail_scales, scales
        return replace(
            self,
            num_documents=self.num_documents + len(chunk_counts),
            _tail_keys=torch.cat([before, routing_keys.detach()]),
            _tail_counts=torch.cat([self._tail_counts, chunk_counts]),
            _tail_scales=None if old is None or new is None else torch.cat([old, new]),
        )

    @classmethod
    def followed(
        cls,
        before: ClusteredIndex | None,
        routing_keys: Tensor,
        chunk_counts: Tensor,
        settings: PruningSettings,
        *,
        scales: Tensor | None = None,
    ) -> ClusteredIndex:
        """The keys of a layer that has grown since `before` was made of its first documents.

        New documents become the tail, which is not copied: the caller must leave these keys as they
        are. All is built anew when there is nothing before, or the tail has grown to a quarter.

        Args:
            before: of the first documents of the same layer, or None.
            routing_keys, chunk_counts, scales: of the whole layer, as in `build`.
            settings: for a new build; those of `before` are kept otherwise.

        Raises:
            InputError: see `build`.
        """
        if before is None or len(routing_keys) > REBUILD * len(before._blocks.keys):
            return cls.build(routing_keys, chunk_counts, settings, scales=scales)
        _check_keys(routing_keys, chunk_counts, scales)
        keys, documents = len(before._blocks.keys), before._blocked_documents
        return replace(
            before,
            num_documents=len(chunk_counts),
            _tail_keys=routing_keys.detach()[keys:],
            _tail_counts=chunk_counts[documents:],
            _tail_scales=None if scales is None else scales[keys:],
        )

    @torch.no_grad()
    def search(
        self,
        vectors: Tensor,
        routing_mask: Tensor,
        top_k: int,
        document_mask: Tensor | None = None,
    ) -> Selection:
        """The top-k documents of every row of a batch.

        Args:
            vectors: [B, T, G*D] float32, of `msa.ops.routing.routing_vectors`.
            routing_mask: [B, T] bool.
            top_k: k >= 1.
            document_mask: [N] bool, or [B, N]; False for documents that must not be chosen.

        Returns:
            Selection with K = min(top_k, N), as that of `msa.ops.routing.route_documents`: to the
            last bit if the slack is 1. Else documents may be missing, and a score may be that of
            another chunk of the document than its best.

        Raises:
            InputError: shapes that do not belong together, top_k below 1.

        Source: MSA 3.2.1, Eq. 2; the pruning is ours.
        """
        self._check_search(vectors, top_k, document_mask)
        count = min(top_k, self.num_documents)
        documents = torch.full((len(vectors), count), -1)
        scores = vectors.new_full((len(vectors), count), -math.inf)
        first = self._blocked_documents
        masks = None if document_mask is None else document_mask.expand(len(vectors), -1)
        for row, (some, routes) in enumerate(zip(vectors, routing_mask, strict=True)):
            mask = None if masks is None else masks[row]
            routing = some[routes]
            if not len(routing) or not count:
                continue
            found = self._scan(routing, count, None if mask is None else mask[:first])
            tail = self._search_tail(routing, top_k, None if mask is None else mask[first:])
            # blocked documents are the lower rows, so ties stay in favour of them
            merged = torch.cat([found.scores, tail.scores[0]])
            best = select_documents(merged[None], count)
            places = best.documents[0]
            rows = torch.cat([found.documents, tail.documents[0] + first])[places.clamp(min=0)]
            size = len(places)
            documents[row, :size] = rows.masked_fill(places < 0, -1)
            scores[row, :size] = best.scores[0]
        return Selection(documents, scores)

    def _scan(self, routing: Tensor, count: int, mask: Tensor | None) -> BlockScan:
        scan = BlockScan(self._blocks, routing, count, mask)
        scan.run(self.settings.slack)
        return scan

    def _search_tail(self, routing: Tensor, top_k: int, mask: Tensor | None) -> Selection:
        every = torch.ones(1, len(routing), dtype=torch.bool)
        return route_documents(
            routing[None],
            every,
            self._tail_keys,
            self._tail_counts,
            top_k,
            mask,
            self._tail_scales,
        )

    def _check_search(self, vectors: Tensor, top_k: int, document_mask: Tensor | None) -> None:
        width, num_documents = self._blocks.keys.shape[1], self.num_documents
        if top_k < 1:
            raise InputError(f"top_k={top_k}: expected at least 1")
        if vectors.shape[-1] != width:
            raise InputError(
                f"vectors of {vectors.shape[-1]} numbers and keys of {width}: expected the same; "
                "use the vectors of routing_vectors for these keys"
            )
        shapes = [(num_documents,), (len(vectors), num_documents)]
        if document_mask is not None and tuple(document_mask.shape) not in shapes:
            raise InputError(
                f"document_mask of shape {list(document_mask.shape)}: expected [{num_documents}] "
                f"or [{len(vectors)}, {num_documents}]"
            )


def _check_keys(routing_keys: Tensor, chunk_counts: Tensor, scales: Tensor | None) -> None:
    """Refuse keys that do not belong together.

    Raises:
        InputError: wrong device or shape, int8 keys without scales.
    """
    if routing_keys.device.type != "cpu":
        raise InputError(
            f"routing keys on {routing_keys.device}: pruning works on the CPU; leave it out there"
        )
    if routing_keys.dim() != 3:
        raise InputError(
            f"routing keys of shape {list(routing_keys.shape)}: expected [C, G, D]; give those of "
            "one layer"
        )
    vectors = torch.empty(0, 0, routing_keys.shape[1] * routing_keys.shape[2])
    check_routing(vectors, routing_keys, chunk_counts, 1, None, scales)
