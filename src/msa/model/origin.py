"""Which base a converted checkpoint was made from, so that adapters trained on it can name it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from msa.errors import ConfigError
from msa.model.bases import Base
from msa.model.home import sha256_of
from msa.model.pretrained import hub_options, is_hub_id

ORIGIN_FILE = "base.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Origin:
    """What a converted checkpoint shares with its base; `base.json` in its folder.

    Attributes:
        base: the file of the plain backbone.
        own_weights: weights beside the routers that differ from the base's (enlarged embeddings).
        own_tokenizer: tokens were added to the base's tokenizer.
    """

    base: Base
    own_weights: tuple[str, ...] = ()
    own_tokenizer: bool = False

    def save(self, folder: str | Path) -> None:
        """Write `base.json`."""
        values = {
            "base": self.base.to_dict(),
            "own_weights": list(self.own_weights),
            "own_tokenizer": self.own_tokenizer,
        }
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        Path(folder, ORIGIN_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Origin | None:
        """Read `base.json`; None if there is none.

        Raises:
            ConfigError: it is damaged.
        """
        path = Path(folder, ORIGIN_FILE)
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            base, own, tokenizer = (
                values["base"],
                values.get("own_weights", []),
                values.get("own_tokenizer", False),
            )
            if not isinstance(base, Mapping) or not isinstance(tokenizer, bool):
                raise TypeError("base or own_tokenizer is of another type")
            own_weights = tuple(str(name) for name in own)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path}: cannot be read ({error!r}); convert the base again"
            ) from error
        return cls(Base.from_dict(base, path), own_weights, tokenizer)


def base_of(source: str | Path) -> Base | None:
    """The base that a plain model is; None when its weights are more files than one.

    Args:
        source: what `msa.model.pretrained.read_model` has read: a GGUF file, a folder or a Hub id.
    """
    path, hub = Path(source), ""
    if path.is_dir():
        path = path / WEIGHTS_FILE
    elif not path.is_file() and is_hub_id(str(source)):
        repository, options = hub_options(str(source))
        found = try_to_load_from_cache(repository, WEIGHTS_FILE, revision=options.get("revision"))
        if not isinstance(found, str):
            return None
        path = Path(found)
        hub = f"{repository}@{path.parent.name}"  # the commit: the same bytes for ever
    if not path.is_file():
        return None
    name = hub.partition("@")[0] or (path.stem if path.name != WEIGHTS_FILE else path.parent.name)
    return Base(
        name=name, file=path.name, sha256=sha256_of(path), size=path.stat().st_size, hub=hub
    )
