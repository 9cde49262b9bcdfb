"""Synthetic worlds: invented documents that refer to each other, and questions about them."""

from __future__ import annotations

from msa.synthetic_worlds.compose import render_question
from msa.synthetic_worlds.generate import COMMUNITY_SIZE, generate_world, iter_world_documents
from msa.synthetic_worlds.names import is_held_out
from msa.synthetic_worlds.schema import World, WorldDocument, WorldQuestion

__all__ = [
    "COMMUNITY_SIZE",
    "World",
    "WorldDocument",
    "WorldQuestion",
    "generate_world",
    "is_held_out",
    "iter_world_documents",
    "render_question",
]
