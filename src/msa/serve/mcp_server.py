"""MCP: the tools of `mcp_tools`, over streamable HTTP and over stdio."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.server.transport_security import TransportSecuritySettings
from mcp_types import ToolAnnotations
from starlette.requests import Request

import msa
from msa.serve.errors import ServiceError, unavailable
from msa.serve.keys import READ, WRITE, Principal, principal
from msa.serve.links import base_url, permalink
from msa.serve.mcp_tools import Caller, Tools

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import Receive, Scope, Send

    from msa.serve.service import Service

PATH = "/mcp"
INSTRUCTIONS = (
    "A memory of documents. `ask` answers a question from them and names the passages it read; "
    "`search` lists passages for a query, `fetch` gives one in full. Ids are BANK/NUMBER. Say "
    "where an answer comes from, with the passage's url."
)
_READS = ToolAnnotations(read_only_hint=True, open_world_hint=False)
_WRITES = ToolAnnotations(
    read_only_hint=False, destructive_hint=True, idempotent_hint=True, open_world_hint=False
)


def build(service: Service, caller: Callable[[Context], Caller], *, write: bool) -> MCPServer[Any]:
    """A server with the tools.

    Args:
        service: whose banks they work on.
        caller: who calls, from a tool's context.
        write: with `add` and `delete`.
    """
    with _logging_left_alone():
        server: MCPServer[Any] = MCPServer(
            "msa", title="Memory", instructions=INSTRUCTIONS, version=msa.__version__
        )
    tools = Tools(service, caller)
    for read in (tools.search, tools.fetch, tools.ask, tools.status):
        server.add_tool(read, annotations=_READS)
    if write:
        for change in (tools.add, tools.delete):
            server.add_tool(change, annotations=_WRITES)
    server.resource("msa://{bank}/{number}", name="passage", mime_type="text/plain")(tools.passage)
    return server


@contextlib.contextmanager
def _logging_left_alone() -> Iterator[None]:
    """`MCPServer` would give a root logger without handlers its own."""
    handler = logging.NullHandler()
    logging.root.addHandler(handler)
    try:
        yield
    finally:
        logging.root.removeHandler(handler)


# ---- over HTTP


def _http_caller(context: Context) -> Caller:
    """The caller of a request, as `Endpoint` found it."""
    request = context.request_context.request
    assert request is not None
    caller: Caller = request.state.caller
    return caller


class Endpoint:
    """`/mcp` and `/mcp/{bank}`: for those whose key may write with the tools that do.

    Stateless: any replica can answer any request, and a client that goes stops its question.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._servers = {
            write: build(service, _http_caller, write=write) for write in (False, True)
        }
        for server in self._servers.values():
            server.streamable_http_app(
                stateless_http=True,
                # hosts and origins are checked before any route, by the app's gate
                transport_security=TransportSecuritySettings(enable_dns_rebinding_protection=False),
                max_request_body_size=service.settings.max_body_bytes,
            )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While the app runs; once."""
        async with contextlib.AsyncExitStack() as stack:
            for server in self._servers.values():
                await stack.enter_async_context(server.session_manager.run())
            yield

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, as an ASGI app."""
        request = Request(scope)
        try:
            caller = self._caller(request)
        except ServiceError as error:
            await error.response()(scope, receive, send)
            return
        request.state.caller = caller
        server = self._servers[caller.principal.allows(WRITE)]
        await server.session_manager.handle_request(scope, receive, send)

    def _caller(self, request: Request) -> Caller:
        """Who calls, and which bank the address names.

        Raises:
            ServiceError: 401, 403, 404; 503 before and after the service is ready.
        """
        holder = principal(request)
        if self._service.state != "ready":
            raise unavailable(self._service.state, f"The service is {self._service.state}.")
        bank: str | None = request.path_params.get("bank")
        if bank is not None:
            self._service.registry.get(bank, holder, READ)
        elif not holder.allows(READ):
            raise ServiceError(403, None, "bank_forbidden", "This key lacks the scope 'read'.")
        base = base_url(self._service.settings, request)
        return Caller(holder, partial(permalink, base), bank)


def serve_mcp(app: FastAPI) -> contextlib.AbstractAsyncContextManager[None]:
    """Add `PATH` to the app; what is given back has to be entered while it runs."""
    endpoint = Endpoint(app.state.service)
    for path in (PATH, f"{PATH}/{{bank}}"):
        app.router.add_route(path, endpoint, include_in_schema=False)  # type: ignore[arg-type]
    return endpoint.running()


# ---- over stdio


def local(service: Service, holder: Principal, base: str | None = None) -> MCPServer[Any]:
    """A server for one client, which needs no key: for stdio, and in memory.

    Args:
        service: with its banks loaded.
        holder: what the client may do.
        base: how permalinks begin, where a service gives them; else addresses are those of
            resources.
    """
    caller = Caller(holder, partial(permalink, base) if base else "msa://{}/{}".format)
    return build(service, lambda context: caller, write=holder.allows(WRITE))
