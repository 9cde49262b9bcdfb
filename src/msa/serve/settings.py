"""Settings of the service; every one has an environment name, `MSA_` and the field's."""

from __future__ import annotations

import ipaddress
import re
import socket
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from msa.errors import ConfigError

BANK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MIB = 1 << 20
_List = Annotated[tuple[str, ...], NoDecode]


class ServeSettings(BaseSettings):
    """How a service runs.

    Attributes:
        banks: name -> folder; in the environment `NAME=DIR,NAME=DIR`.
        banks_folder: where banks lie that are made over the API; all that lie there are served.
        model, device: as `msa ask --model --device`.
        host, port: to listen on.
        api_key_file: see `msa.serve.keys`.
        no_auth: let everybody in, from other machines too.
        allowed_hosts: names by which clients may call this service, beside this machine's own.
        cors_origins: origins whose pages may call it, such as "https://chat.example.org".
        public_url: how permalinks begin; by default as the request's own address.
        metrics_public: /metrics without a key, and then without the names of banks.
        state_folder: where jobs and uploads lie; by default beside each bank.
        max_rows: questions that run through the model together.
        max_waiting, max_waiting_per_key: questions that wait for that, of all and of one key.
        queue_seconds: longest wait; ask_seconds: longest question, its wait included.
        shutdown_seconds: what runs may go on for so long when the service is told to stop.
        ping_seconds: between signs of life in a stream.
        max_body_bytes: of a JSON body; max_file_bytes: of an uploaded file; max_upload_bytes: of a
            request with files.
        body_seconds: in which a JSON body must have come, and the next piece of an upload.
        parse_seconds: in which an uploaded PDF, HTML or DOCX file must have been converted.
        max_encode_jobs: index jobs that wait.
        encode_share: part of the time that index work gets at least while questions run.
        ray: run replicas on Ray Serve; see `msa.serve.replicas`.
        ray_address: of the cluster; one is started on this machine if not given.
        replicas: processes that answer; shards: processes that hold each bank, for all of them.
    """

    model_config = SettingsConfigDict(env_prefix="MSA_", extra="forbid", frozen=True)

    banks: Annotated[dict[str, Path], NoDecode] = {}
    banks_folder: Path | None = None
    model: str | None = None
    device: str | None = None
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    api_key_file: Path | None = None
    no_auth: bool = False
    allowed_hosts: _List = ()
    cors_origins: _List = ()
    public_url: str | None = None
    metrics_public: bool = False
    state_folder: Path | None = None
    max_rows: int = Field(64, ge=1)
    max_waiting: int = Field(64, ge=0)
    max_waiting_per_key: int = Field(8, ge=0)
    queue_seconds: float = Field(30.0, gt=0)
    ask_seconds: float = Field(120.0, gt=0)
    shutdown_seconds: float = Field(30.0, ge=0)
    ping_seconds: float = Field(15.0, gt=0)
    max_body_bytes: int = Field(MIB, ge=1024)
    max_file_bytes: int = Field(64 * MIB, ge=1024)
    max_upload_bytes: int = Field(256 * MIB, ge=1024)
    body_seconds: float = Field(30.0, gt=0)
    parse_seconds: float = Field(300.0, gt=0)
    max_encode_jobs: int = Field(100, ge=1)
    encode_share: float = Field(0.2, gt=0, le=1)
    ray: bool = False
    ray_address: str | None = None
    replicas: int = Field(2, ge=1)
    shards: int = Field(1, ge=1)

    @field_validator("banks", mode="before")
    @classmethod
    def _banks(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [part for part in value.split(",") if part]
        if isinstance(value, list | tuple):
            value = named_folders(value)
        for name in value if isinstance(value, dict) else ():
            if not BANK_NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r} is no name of a bank; use letters, digits, '.', '_' and '-', "
                    "64 at most, such as --bank notes=DIR"
                )
        return value

    @field_validator("allowed_hosts", "cors_origins", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (
            [v.strip() for v in value.split(",") if v.strip()] if isinstance(value, str) else value
        )

    @field_validator("public_url")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        if value is not None and not re.match(r"https?://[^/?#\s]+", value):
            raise ValueError(f"{value!r} is no address; give one such as https://msa.example.org")
        return value.rstrip("/") if value else None

    @classmethod
    def load(cls, **given: Any) -> ServeSettings:
        """What was given, else what the environment says, else the defaults.

        Raises:
            ConfigError: a value cannot be used; the message names it.
        """
        try:
            settings = cls(**{k: v for k, v in given.items() if v is not None})
        except ValidationError as error:
            first = error.errors()[0]
            name = "_".join(str(part) for part in first["loc"][:1])
            raise ConfigError(
                f"--{name.replace('_', '-')} (MSA_{name.upper()}): "
                f"{first['msg'].removeprefix('Value error, ')}"
            ) from None
        settings.check_exposure()
        return settings

    def check_exposure(self) -> None:
        """Refuse to be open to other machines unless there are keys, or that was asked for.

        Raises:
            ConfigError: with what to do.
        """
        if not self.loopback and self.api_key_file is None and not self.no_auth:
            raise ConfigError(
                f"--host {self.host} lets other machines in, and there are no keys; give "
                "--api-key-file FILE, or --no-auth if everybody may read and change the banks"
            )

    @property
    def loopback(self) -> bool:
        """True if only this machine can reach the service."""
        return is_loopback(self.host)

    @property
    def known_hosts(self) -> frozenset[str]:
        """Names in the Host header that are answered, beside addresses; with "*", any."""
        public = urlsplit(self.public_url or "").hostname
        own = {"localhost", socket.gethostname().lower(), self.host.lower()}
        return frozenset({*own, *map(str.lower, self.allowed_hosts), *filter(None, [public])})


def is_loopback(host: str) -> bool:
    """True for an address, or name, of this machine that no other can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def named_folders(values: list[str] | tuple[str, ...]) -> dict[str, Path]:
    """`NAME=DIR`, or `DIR` by the folder's own name, as name -> folder.

    Raises:
        ValueError: a name is given twice.
    """
    found: dict[str, Path] = {}
    for value in values:
        name, equals, folder = value.partition("=")
        path = Path(folder if equals else value)
        name = name if equals else path.resolve().name
        if name in found:
            raise ValueError(f"two banks are named {name!r}; name them: --bank NAME=DIR")
        found[name] = path
    return found
