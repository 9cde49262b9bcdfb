"""`msa mcp`: banks as tools of an agent on this machine, over stdin and stdout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from msa.cli.options import DeviceOption, ModelOption, load_model, open_bank
from msa.errors import ConfigError

if TYPE_CHECKING:
    from msa.model.checkpoint import Checkpoint
    from msa.serve.settings import ServeSettings


def mcp(
    bank: Annotated[
        list[str],
        typer.Option(
            "--bank",
            "-b",
            metavar="[NAME=]DIR",
            help="Folder of a memory bank; repeat for more.",
            show_default=False,
        ),
    ],
    write: Annotated[
        bool,
        typer.Option(
            "--write",
            help="Let the agent add and delete documents; no other process can write meanwhile.",
        ),
    ] = False,
    public_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Where `msa serve` serves these banks, for links to passages.",
            show_default=False,
        ),
    ] = None,
    model: ModelOption = None,
    device: DeviceOption = None,
) -> None:
    """Offer banks to an agent by the Model Context Protocol, over stdin and stdout.

    For programs that start their MCP servers themselves, such as editors and desktop assistants.
    Without --write the banks are only read: any number of agents may, beside one process that
    writes. With it, a bank that is not there is made. `msa serve` has the same tools over HTTP.
    """
    try:
        import anyio

        from msa.serve.settings import ServeSettings
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"msa mcp needs the package {error.name}: pip install 'msa-memory[serve]'"
        ) from error
    settings = ServeSettings.load(banks=bank, public_url=public_url)
    if not write:
        for folder in settings.banks.values():
            open_bank(folder).close()  # a folder that is no bank is said before a model is loaded
    anyio.run(_serve, settings, load_model(model, device), write)


async def _serve(settings: ServeSettings, checkpoint: Checkpoint, write: bool) -> None:
    """Serve one client until it closes stdin.

    Raises:
        MSAError: a bank cannot be opened.
    """
    from msa.serve.keys import READ, WRITE, Principal
    from msa.serve.mcp_server import local
    from msa.serve.request_log import log_to_stderr
    from msa.serve.service import Service

    log_to_stderr()
    holder = Principal("stdio", frozenset({READ, WRITE} if write else {READ}), ("*",))
    async with Service.running(settings, checkpoint, read_only=not write) as service:
        await local(service, holder, settings.public_url).run_stdio_async()
