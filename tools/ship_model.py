"""Put the result of a training run into the package as the default model.

    python tools/ship_model.py runs/default/model

Weights are stored in bfloat16, which halves them; commands load them in float32. The card
(README.md) is written by hand and kept.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

from msa.default_model import WEIGHTS, load_model
from msa.inference.options import AskOptions

# Chosen on another generated world than those of the published figures.
OPTIONS = AskOptions(
    max_rounds=3,
    max_documents_per_round=1,
    max_new_tokens=32,
    prior_weight=5.0,
    prior_temperature=0.03,
)


def main() -> None:
    source = Path(sys.argv[1])
    loaded = load_model(source)
    card = WEIGHTS / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else None
    shutil.rmtree(WEIGHTS, ignore_errors=True)
    loaded.model.to(torch.bfloat16).save_pretrained(WEIGHTS)
    loaded.tokenizer.save_pretrained(WEIGHTS)
    loaded.template.save(WEIGHTS)
    OPTIONS.save(WEIGHTS)
    if text is not None:
        card.write_text(text, encoding="utf-8")
    for path in WEIGHTS.iterdir():
        path.chmod(0o644)
        print(path.name, path.stat().st_size)


if __name__ == "__main__":
    main()
