"""What clients are told when something fails: one shape of error, and no details of ours."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from msa.errors import (
    BankLockedError,
    BudgetError,
    ConfigError,
    DocumentNotFoundError,
    DuplicateDocumentError,
    EmptyBankError,
    InputError,
    MSAError,
    QuestionTooLongError,
    StorageError,
    WorkerError,
)

_log = logging.getLogger("msa.serve")
CLIENT_GONE = 499
"""Status in logs and metrics of a request whose client went away; it is never received."""
RETRY_SECONDS = 2
_TYPES = {
    408: "timeout_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    410: "gone",
    413: "request_too_large",
    415: "unsupported_file",
    429: "rate_limit_error",
    503: "unavailable",
    507: "storage_error",
}


class ErrorDetail(BaseModel):
    """What went wrong.

    Attributes:
        message: one line for people.
        type: the kind of error, such as "invalid_request_error".
        param: the field of the request that it is about.
        code: the error itself, such as "bank_not_found".
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """Body of every error."""

    error: ErrorDetail


class ServiceError(MSAError, HTTPException):
    """An error that a client is told.

    Attributes:
        status: of HTTP.
        type, code, message, param: see `ErrorDetail`.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        type: str | None,
        code: str | None,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        HTTPException.__init__(self, status, message, dict(headers or {}))
        self.args = (message,)
        self.status = status
        self.type = type or _type_of(status)
        self.code = code
        self.message = message
        self.param = param

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        detail = ErrorDetail(message=self.message, type=self.type, param=self.param, code=self.code)
        return ErrorBody(error=detail).model_dump()

    def response(self) -> JSONResponse:
        """The whole response."""
        return JSONResponse(self.body(), self.status, self.headers)


def unavailable(code: str, message: str, retry_after: int = RETRY_SECONDS) -> ServiceError:
    """503: not now; the client may come again after so many seconds."""
    return ServiceError(503, None, code, message, headers={"Retry-After": str(retry_after)})


def draining() -> ServiceError:
    """503: the service is being stopped."""
    return unavailable("draining", "The service is stopping.", 5)


def conflict(code: str, message: str, param: str | None = None) -> ServiceError:
    """409, with the header that keeps OpenAI's clients from trying again."""
    return ServiceError(409, None, code, message, param, {"x-should-retry": "false"})


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ServiceError:
    """400: the request cannot be met as it is."""
    return ServiceError(400, None, code, message, param)


def service_error(error: BaseException) -> ServiceError:
    """What a client is told of any error.

    The messages of banks name folders of this machine; clients get others. What no client can
    cause is logged here, and told as 500.
    """
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, RequestValidationError):
        return _of_validation(error)
    if isinstance(error, HTTPException):
        return _of_http(error)
    if isinstance(error, EmptyBankError):
        message = "The bank holds no document, or none that passes the filter."
        return invalid(message, code="empty_bank")
    if isinstance(error, DuplicateDocumentError):
        return conflict("duplicate_document", str(error))
    if isinstance(error, QuestionTooLongError):
        return invalid(str(error), code="question_too_long")
    if isinstance(error, InputError | ConfigError):
        return invalid(str(error))
    if isinstance(error, DocumentNotFoundError):
        return ServiceError(404, None, "document_not_found", "The bank holds no such document.")
    if isinstance(error, BankLockedError):
        message = (
            "Another process has opened the bank for writing; when that one has ended, this "
            "service has to be started again to write."
        )
        return conflict("bank_locked", message)
    log_failure(error)
    if isinstance(error, StorageError):
        return ServiceError(507, None, "disk_full", "The disk refused to write.")
    if isinstance(error, BudgetError):
        return unavailable("budget", "The bank does not fit into memory now.", 30)
    if isinstance(error, WorkerError):
        return unavailable("worker_away", "A process that holds a part of the bank is not there.")
    return ServiceError(500, None, "internal_error", "The service failed; its log has the details.")


def log_failure(error: BaseException) -> None:
    """Log where an error arose; not its message, which may hold texts of clients."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        frames.append(f"{code.co_filename}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    _log.error("failure", extra={"fields": {"error": type(error).__name__, "trace": frames}})


def add_handlers(app: FastAPI) -> None:
    """Let every error that routes raise have the one shape; `RequestLog` does so for others."""
    for kind in (ServiceError, MSAError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _handle)


async def _handle(request: Request, error: Exception) -> JSONResponse:
    return service_error(error).response()


def _type_of(status: int) -> str:
    return _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")


def _of_http(error: HTTPException) -> ServiceError:
    """Starlette's own: no such route, method not allowed, body that cannot be parsed."""
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    return ServiceError(error.status_code, None, code, error.detail, headers=error.headers)


def _of_validation(error: RequestValidationError) -> ServiceError:
    """FastAPI's 422 as 400, for the first thing that is wrong."""
    first = jsonable_encoder(error.errors(), exclude={"input", "ctx", "url"})[0]
    where, *names = first["loc"] or ("request",)
    param = ".".join(str(name) for name in names) or str(where)
    if first["type"] == "json_invalid":
        return invalid("The body is not valid JSON.", code="invalid_json")
    if first["type"] == "extra_forbidden":
        message = f"{param} is not supported here."
        return invalid(message, param, "unsupported_parameter")
    return invalid(f"{param}: {first['msg'].removeprefix('Value error, ')}", param)
