"""Write the table of OpenAI's endpoints in docs/serving.md: what of them this service takes.

It compares the app's own OpenAPI document with the request types of the `openai` client, so it
needs that package beside the extra `serve`.

Usage: python tools/conformance.py [docs/serving.md]; without a file, prints the table.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msa.serve.app import create_app
from msa.serve.settings import ServeSettings

BEGIN = "<!-- written by tools/conformance.py -->"
END = "<!-- end of what tools/conformance.py writes -->"
HEAD = (
    "| endpoint | taken | at these values only | refused by name | beside OpenAI's |\n"
    "|---|---|---|---|---|\n"
)
_PLACEHOLDER = re.compile(r"{[^}]*}")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An endpoint of OpenAI's.

    Attributes:
        call: method and path, as OpenAI documents it.
        params: the client's type of its parameters below `openai.types`, as MODULE.CLASS; empty if
            it has none.
    """

    call: str
    params: str = ""


ENDPOINTS = (
    Endpoint("GET /v1/models"),
    Endpoint("GET /v1/models/{model}"),
    Endpoint(
        "POST /v1/chat/completions",
        "chat.completion_create_params.CompletionCreateParamsNonStreaming",
    ),
    Endpoint(
        "POST /v1/responses", "responses.response_create_params.ResponseCreateParamsNonStreaming"
    ),
    Endpoint("GET /v1/responses/{response_id}"),
    Endpoint("DELETE /v1/responses/{response_id}"),
    Endpoint("POST /v1/files", "file_create_params.FileCreateParams"),
    Endpoint("GET /v1/files", "file_list_params.FileListParams"),
    Endpoint("GET /v1/files/{file_id}"),
    Endpoint("DELETE /v1/files/{file_id}"),
    Endpoint("GET /v1/files/{file_id}/content"),
    Endpoint("POST /v1/vector_stores", "vector_store_create_params.VectorStoreCreateParams"),
    Endpoint("GET /v1/vector_stores", "vector_store_list_params.VectorStoreListParams"),
    Endpoint("GET /v1/vector_stores/{id}"),
    Endpoint("POST /v1/vector_stores/{id}", "vector_store_update_params.VectorStoreUpdateParams"),
    Endpoint("DELETE /v1/vector_stores/{id}"),
    Endpoint(
        "POST /v1/vector_stores/{id}/search", "vector_store_search_params.VectorStoreSearchParams"
    ),
    Endpoint(
        "POST /v1/vector_stores/{id}/files", "vector_stores.file_create_params.FileCreateParams"
    ),
    Endpoint("GET /v1/vector_stores/{id}/files", "vector_stores.file_list_params.FileListParams"),
    Endpoint("GET /v1/vector_stores/{id}/files/{file_id}"),
    Endpoint(
        "POST /v1/vector_stores/{id}/files/{file_id}",
        "vector_stores.file_update_params.FileUpdateParams",
    ),
    Endpoint("DELETE /v1/vector_stores/{id}/files/{file_id}"),
    Endpoint("GET /v1/vector_stores/{id}/files/{file_id}/content"),
    Endpoint(
        "POST /v1/vector_stores/{id}/file_batches",
        "vector_stores.file_batch_create_params.FileBatchCreateParams",
    ),
    Endpoint("GET /v1/vector_stores/{id}/file_batches/{batch_id}"),
    Endpoint("POST /v1/vector_stores/{id}/file_batches/{batch_id}/cancel"),
    Endpoint(
        "GET /v1/vector_stores/{id}/file_batches/{batch_id}/files",
        "vector_stores.file_batch_list_files_params.FileBatchListFilesParams",
    ),
    Endpoint("POST /v1/completions", "completion_create_params.CompletionCreateParamsNonStreaming"),
    Endpoint("POST /v1/embeddings", "embedding_create_params.EmbeddingCreateParams"),
    Endpoint("POST /v1/batches", "batch_create_params.BatchCreateParams"),
)


def theirs(endpoint: Endpoint) -> set[str]:
    """The parameters that the client can send, but for those of the path."""
    if not endpoint.params:
        return set()
    module, _, name = endpoint.params.rpartition(".")
    kind = getattr(importlib.import_module(f"openai.types.{module}"), name)
    in_path = set(re.findall(r"{(\w+)}", endpoint.call)) | {"vector_store_id"}
    return set(kind.__required_keys__ | kind.__optional_keys__) - in_path


def ours(schema: dict[str, Any], operation: dict[str, Any]) -> dict[str, list[Any] | None]:
    """The parameters that an operation takes, of its query and of its body.

    Returns:
        Name -> the only values that it may have beside null; None where it may have others.
    """
    names: dict[str, list[Any] | None] = {
        p["name"]: None for p in operation.get("parameters", ()) if p["in"] == "query"
    }
    for content in operation.get("requestBody", {}).get("content", {}).values():
        names.update(_properties(schema, content["schema"]))
    return names


def _properties(
    schema: dict[str, Any], body: dict[str, Any]
) -> Iterator[tuple[str, list[Any] | None]]:
    if "$ref" in body:
        body = schema["components"]["schemas"][body["$ref"].rpartition("/")[2]]
    for name, field in body.get("properties", {}).items():
        values = field.get("enum", [])
        yield name, [value for value in values if value is not None] if None in values else None
    for part in (*body.get("anyOf", ()), *body.get("allOf", ()), *body.get("oneOf", ())):
        yield from _properties(schema, part)


def rows() -> Iterator[str]:
    """The table's lines below its head."""
    schema = create_app(ServeSettings(banks={})).openapi()
    served = {
        (method.upper(), _PLACEHOLDER.sub("{}", path)): operation
        for path, item in schema["paths"].items()
        for method, operation in item.items()
    }
    for endpoint in ENDPOINTS:
        method, path = endpoint.call.split()
        operation = served.get((method, _PLACEHOLDER.sub("{}", path)))
        if operation is None:
            yield f"| `{endpoint.call}` | not served: 404 | | | |\n"
            continue
        given, taken = theirs(endpoint), ours(schema, operation)
        bound = {name: values for name, values in taken.items() if values is not None}
        cells = (
            _names((given & taken.keys()) - bound.keys()) or "yes",
            ", ".join(_with_values(name, bound[name]) for name in sorted(given & bound.keys())),
            _names(given - taken.keys()),
            _names(taken.keys() - given - bound.keys()),
        )
        yield f"| `{endpoint.call}` | {' | '.join(cells)} |\n"


def _with_values(name: str, values: list[Any]) -> str:
    shown = ", ".join(f"`{json.dumps(value)}`" for value in values) or "null"
    return f"`{name}` ({shown})"


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def table() -> str:
    """The whole table."""
    return HEAD + "".join(rows())


def renewed(page: str) -> str:
    """The page with the table between its marks.

    Raises:
        ValueError: the page lacks them.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks the marks {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{table()}{END}{after}"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        target = Path(sys.argv[1])
        target.write_text(renewed(target.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table(), end="")
