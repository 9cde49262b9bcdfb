"""`msa serve`: banks over HTTP."""

from __future__ import annotations

import socket
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msa.cli import output
from msa.cli.options import load_model, open_bank, quiet_transformers
from msa.errors import BankNotFoundError, ConfigError, InputError

if TYPE_CHECKING:
    import asyncio

    import uvicorn

    from msa.serve.service import Service
    from msa.serve.settings import ServeSettings

CLOSING_SECONDS = 5
"""For connections to close, once what they waited for has ended."""


def _option(help: str, env: str, *names: str, metavar: str | None = None, **more: Any) -> Any:
    """An option that says by which environment variable it can be given too."""
    text = f"{help} (env: MSA_{env})"
    return typer.Option(*names, help=text, metavar=metavar, show_default=False, **more)


def serve(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[PATHS]...",
            exists=True,
            help="Files and folders to index into the first bank meanwhile.",
        ),
    ] = None,
    bank: Annotated[
        list[str] | None,
        _option(
            "Folder of a bank, and its name; made if it is not there. Repeat for more.",
            "BANKS",
            "--bank",
            "-b",
            metavar="[NAME=]DIR",
        ),
    ] = None,
    banks_folder: Annotated[
        Path | None,
        _option(
            "Where banks are made over the API; all in it are served.",
            "BANKS_FOLDER",
            metavar="DIR",
        ),
    ] = None,
    model: Annotated[
        str | None, _option("As for msa ask.", "MODEL", "--model", "-m", metavar="MODEL")
    ] = None,
    device: Annotated[str | None, _option("As for msa ask.", "DEVICE", metavar="NAME")] = None,
    host: Annotated[
        str | None, _option("Address to listen on: 127.0.0.1 if not given.", "HOST", metavar="NAME")
    ] = None,
    port: Annotated[
        int | None,
        _option("Port to listen on: 8000 if not given, 0 takes a free one.", "PORT", metavar="N"),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        _option(
            "Ask for keys: lines of SHA-256, name, scopes, banks.", "API_KEY_FILE", metavar="FILE"
        ),
    ] = None,
    no_auth: Annotated[
        bool | None,
        _option("Let everybody in, from other machines too.", "NO_AUTH", "--no-auth"),
    ] = None,
    allowed_hosts: Annotated[
        list[str] | None,
        _option(
            "A name by which clients call this service; repeat for more.",
            "ALLOWED_HOSTS",
            "--allowed-host",
            metavar="NAME",
        ),
    ] = None,
    cors_origins: Annotated[
        list[str] | None,
        _option(
            "Origin whose pages may call this service; repeat for more.",
            "CORS_ORIGINS",
            "--cors-origin",
            metavar="URL",
        ),
    ] = None,
    public_url: Annotated[
        str | None, _option("How permalinks begin.", "PUBLIC_URL", metavar="URL")
    ] = None,
    metrics_public: Annotated[
        bool | None, _option("/metrics without a key.", "METRICS_PUBLIC", "--metrics-public")
    ] = None,
    state_folder: Annotated[
        Path | None,
        _option(
            "Where jobs and uploads lie: beside the bank if not given.",
            "STATE_FOLDER",
            metavar="DIR",
        ),
    ] = None,
    max_waiting: Annotated[
        int | None,
        _option("Questions that may wait: 64 if not given.", "MAX_WAITING", metavar="N"),
    ] = None,
    max_waiting_per_key: Annotated[
        int | None,
        _option("The same of one key: 8 if not given.", "MAX_WAITING_PER_KEY", metavar="N"),
    ] = None,
    ask_seconds: Annotated[
        float | None,
        _option("Longest time for a question: 120 if not given.", "ASK_SECONDS", metavar="S"),
    ] = None,
    shutdown_seconds: Annotated[
        float | None,
        _option(
            "What runs may go on for so long at the end: 30 if not given.",
            "SHUTDOWN_SECONDS",
            metavar="S",
        ),
    ] = None,
    ray: Annotated[
        bool | None, _option("Answer by several processes, on Ray Serve.", "RAY", "--ray")
    ] = None,
    ray_address: Annotated[
        str | None,
        _option(
            "Ray cluster to use: one is started on this machine if not given.",
            "RAY_ADDRESS",
            metavar="ADDRESS",
        ),
    ] = None,
    replicas: Annotated[
        int | None,
        _option("Processes that answer, with --ray: 2 if not given.", "REPLICAS", metavar="N"),
    ] = None,
    shards: Annotated[
        int | None,
        _option(
            "Processes that hold each bank, with --ray: 1 if not given.", "SHARDS", metavar="N"
        ),
    ] = None,
) -> None:
    """Serve banks over HTTP: for clients of OpenAI and MCP, with a native API and a page.

    With PATHS, these are indexed while it serves. Without keys only this machine gets in. Limits
    that have no option have an environment variable; see the documentation.
    """
    given = {name: value for name, value in locals().items() if name not in ("paths", "bank")}
    try:
        import uvicorn  # noqa: F401 - asked for first, so that one line says what to install

        from msa.serve.settings import ServeSettings
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"msa serve needs {error.name}; install it: pip install 'msa-memory[serve]'"
        ) from None
    settings = ServeSettings.load(banks=bank or None, **given)
    _check_ray(settings)
    _check_banks(settings)
    if paths and not settings.banks:
        raise ConfigError(f"{paths[0]} is to be indexed into which bank? give --bank DIR")
    if settings.ray:
        _run_replicas(settings, paths or [])
    else:
        _run(settings, paths or [])


def _check_ray(settings: ServeSettings) -> None:
    """Refuse what would have no effect.

    Raises:
        ConfigError: with what is missing.
    """
    unused = settings.model_fields_set & {"ray_address", "replicas", "shards"}
    if unused and not settings.ray:
        name = min(unused)
        raise ConfigError(
            f"--{name.replace('_', '-')} (MSA_{name.upper()}) is for several processes; give --ray "
            "(MSA_RAY=1) too, or leave it out"
        )


def _check_banks(settings: ServeSettings) -> None:
    """Say what is wrong before a model is loaded.

    Raises:
        BankError: a folder cannot be a bank, or another process writes to it.
        ConfigError: there is nothing to serve.
    """
    if not settings.banks and settings.banks_folder is None:
        raise ConfigError("there is no bank to serve; give --bank DIR, or --banks-folder DIR")
    for name, folder in settings.banks.items():
        try:
            open_bank(folder, write=True).close()
        except BankNotFoundError:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise
            output.print_note(f"bank '{name}' is new: {folder}")


def _run(settings: ServeSettings, paths: list[Path]) -> None:
    """Serve until told to stop.

    Raises:
        MSAError: the model or a bank cannot be loaded.
        OSError: the address is taken.
    """
    from msa.serve.app import create_app
    from msa.serve.request_log import log_to_stderr

    quiet_transformers()
    load = partial(load_model, settings.model, settings.device, quiet=True)
    listening = _listen(settings.host, settings.port)
    try:
        log_to_stderr()
        app = create_app(settings, load, paths)
        service: Service = app.state.service
        output.print_note(f"Serving at {_address(listening)}; loading the model")
        _server(app, service).run(sockets=[listening])
    finally:
        listening.close()
    if service.failure is not None:
        raise service.failure


def _run_replicas(settings: ServeSettings, paths: list[Path]) -> None:
    """Serve on a cluster until told to stop.

    Raises:
        MSAError: see `msa.serve.replicas.serve_replicas`.
    """
    from msa.serve.replicas import serve_replicas

    with _listen(settings.host, settings.port) as free:  # taken again by Ray Serve
        address = _address(free)
        settings = settings.model_copy(update={"port": free.getsockname()[1]})
    output.print_note(f"Starting {settings.replicas} replicas")
    serve_replicas(settings, paths, lambda: output.print_note(f"Serving at {address}"))


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family)
    except OSError as error:
        raise InputError(
            f"cannot listen on {host}, port {port}: {error.strerror}; choose another --host or "
            "--port"
        ) from error


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _server(app: Any, service: Service) -> uvicorn.Server:
    """A web server that lets the service end its work before it closes the door."""
    import asyncio

    import uvicorn

    class Server(uvicorn.Server):
        told = False
        draining: asyncio.Task[None] | None = None

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            """The first signal ends the work, the second does not wait for it."""
            if self.told:
                super().handle_exit(sig, frame)
            self.told = True

        async def on_tick(self, counter: int) -> bool:
            if self.told and self.draining is None:
                self.draining = asyncio.create_task(service.drain())
            drained = self.draining is not None and self.draining.done()
            if drained or service.failure is not None:
                self.should_exit = True
            return await super().on_tick(counter)

    config = uvicorn.Config(
        app,
        loop="asyncio",  # not what happens to be installed, so that figures can be compared
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=CLOSING_SECONDS,
    )
    return Server(config)
