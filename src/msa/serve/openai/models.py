"""/v1/models: every bank is a model; and the sentence for what is not here."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Literal

from fastapi import APIRouter, Depends
from pydantic import BaseModel

from msa.serve.banks import ServedBank
from msa.serve.errors import ServiceError, unavailable
from msa.serve.keys import principal
from msa.serve.openai.requests import MODEL_PREFIX, bank_of
from msa.serve.service import CallerDep, ServiceDep

router = APIRouter(prefix="/v1", tags=["openai"])

_ABSENT = {
    "/embeddings": "MSA has no single embedding of a text; ask at /v1/chat/completions, or search "
    "at /v1/vector_stores/{id}/search.",
    "/completions": "Only chats are answered; use /v1/chat/completions or /v1/responses.",
    "/assistants": "There are no assistants; use /v1/responses with the model of a bank.",
    "/assistants/{path:path}": "There are no assistants; use /v1/responses with the model of a "
    "bank.",
    "/threads": "There are no threads; send the whole conversation to /v1/responses.",
    "/threads/{path:path}": "There are no threads; send the whole conversation to /v1/responses.",
    "/conversations": "Conversations are not stored; send the whole one to /v1/responses.",
    "/conversations/{path:path}": "Conversations are not stored; send the whole one to "
    "/v1/responses.",
    "/responses/{path:path}": "Responses are not stored; their answer to POST /v1/responses is all "
    "there is.",
    "/chat/completions/{path:path}": "Chat completions are not stored; their answer to POST "
    "/v1/chat/completions is all there is.",
}


class Model(BaseModel):
    """A bank, as a model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["msa"] = "msa"


class ModelList(BaseModel):
    """The banks of a key."""

    object: Literal["list"] = "list"
    data: list[Model]


@router.get("/models")
async def list_models(service: ServiceDep, caller: CallerDep) -> ModelList:
    """One model for every bank that the key may read, `msa/BANK`."""
    if not service.registry.loaded:
        raise unavailable("loading", "The model and the banks are being loaded.")
    names = service.registry.names(caller)
    return ModelList(data=[_model(service.registry.get(name, caller)) for name in names])


@router.get("/models/{model:path}")
async def get_model(model: str, service: ServiceDep, caller: CallerDep) -> Model:
    """One of them."""
    return _model(bank_of(model, service, caller))


def _model(served: ServedBank) -> Model:
    return Model(id=MODEL_PREFIX + served.name, created=served.created_at)


def _absence(message: str) -> Callable[[], Coroutine[Any, Any, None]]:
    async def absent() -> None:
        raise ServiceError(404, None, "not_supported", message)

    return absent


_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]
absent = APIRouter(prefix="/v1", dependencies=[Depends(principal)], include_in_schema=False)
"""What clients of OpenAI may look for, and what to do in its place."""
for _path, _message in _ABSENT.items():
    absent.add_api_route(_path, _absence(_message), methods=_METHODS, response_model=None)
