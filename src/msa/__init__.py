"""Memory Sparse Attention: a language model that routes over a memory of documents.

Public names are imported lazily, so that `import msa` costs nothing until one is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msa.inference.engine import MemoryEngine as MemoryEngine
    from msa.memory.bank import MemoryBank as MemoryBank
    from msa.model.checkpoint import Checkpoint as Checkpoint
    from msa.model.configuration_msa import MSAConfig as MSAConfig
    from msa.model.loading import load as load
    from msa.model.modeling_msa import MSAForCausalLM as MSAForCausalLM
    from msa.types import Answer as Answer
    from msa.types import Document as Document

__version__ = "0.1.0"

_EXPORTS = {
    "Answer": "msa.types",
    "Checkpoint": "msa.model.checkpoint",
    "Document": "msa.types",
    "MSAConfig": "msa.model.configuration_msa",
    "MSAForCausalLM": "msa.model.modeling_msa",
    "MemoryBank": "msa.memory.bank",
    "MemoryEngine": "msa.inference.engine",
    "load": "msa.model.loading",
}
__all__ = [*sorted(_EXPORTS), "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use."""
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'msa' has no attribute {name!r}")
