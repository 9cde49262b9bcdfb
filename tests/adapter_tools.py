"""An adapter on a tiny plain Llama that stands for a base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import SMALL, make_tiny_tokenizer
from msa.inference.options import AskOptions
from msa.model.adapters import save_adapter
from msa.model.bases import Base
from msa.model.convert import convert_backbone
from msa.model.home import sha256_of
from msa.text.prompts import PromptTemplate

RANK, SCALE = 2, 2.0
UPDATED = ("model.layers.0.mlp.up_proj", "model.layers.2.self_attn.q_proj")


@dataclass
class Parts:
    """What an adapter is made of: random updates of two modules, and the routers."""

    backbone: Any
    model: Any
    tokenizer: Any
    base: Base
    base_file: Path
    state: dict

    def save(self, folder: Path) -> Path:
        return save_adapter(
            self.state, self.base, folder, config=self.model.config, template=PromptTemplate(),
            tokenizer=self.tokenizer, ask_options=AskOptions(max_rounds=2),
            merged_dtype=torch.float32,
        )  # fmt: skip


def make_parts(folder: Path) -> Parts:
    """The base's file goes into the folder."""
    torch.manual_seed(0)
    tokenizer = make_tiny_tokenizer()
    config = LlamaConfig(**{**SMALL, "vocab_size": len(tokenizer)}, max_position_embeddings=2048)
    backbone = LlamaForCausalLM(config).eval()
    path = folder / "base.safetensors"
    save_file({name: tensor.clone() for name, tensor in backbone.state_dict().items()}, path)
    base = Base(name="Tiny", file=path.name, sha256=sha256_of(path), size=path.stat().st_size)
    model = convert_backbone(backbone, chunk_size=8, top_k_documents=4, routing_layers=[1, 2])
    weights = model.state_dict()
    state: dict = {name: weights[name] for name in weights if ".router_" in name}
    for name in UPDATED:
        out, inner = weights[name + ".weight"].shape
        state[name] = (torch.randn(RANK, inner), torch.randn(out, RANK), SCALE)
    return Parts(backbone, model, tokenizer, base, path, state)
