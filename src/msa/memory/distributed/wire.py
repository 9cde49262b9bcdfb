"""Messages between the ranks of a bulk encoding: JSON over TCP."""

from __future__ import annotations

import json
import select
import socket
import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from msa.memory.distributed.bulk_ingest import Assignment, Window
from msa.memory.ingest.pipeline import DocumentKey, PendingWrite, WriteDecision
from msa.memory.ingest.splitter import TokenizedDocument
from msa.memory.store.records import SegmentEntry, WrittenFile
from msa.types import Document

MESSAGE_BYTES = 1 << 32


class Channel:
    """JSON messages over a socket: 8 bytes of length, then the text. Any thread may send.

    Args:
        connection: connected.
        timeout: seconds that one message may take, and that a dead host may go unnoticed.
    """

    def __init__(self, connection: socket.socket, timeout: float) -> None:
        connection.settimeout(timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        step = max(1, min(30, int(timeout / 8)))
        for name, value in (("IDLE", 2 * step), ("INTVL", step), ("CNT", 4)):
            if hasattr(socket, f"TCP_KEEP{name}"):
                option = getattr(socket, f"TCP_KEEP{name}")
                connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self._socket = connection
        self._sending = threading.Lock()

    def send(self, message: Any) -> None:
        """Send one message.

        Raises:
            OSError: the other side is gone.
        """
        data = json.dumps(message).encode()
        with self._sending:
            self._socket.sendall(len(data).to_bytes(8, "little") + data)

    def receive(self, limit: int = MESSAGE_BYTES) -> Any:
        """The next message.

        Raises:
            TimeoutError: none came in time.
            OSError: the other side is gone, or sends what is no message of at most `limit` bytes.
        """
        length = int.from_bytes(self._read(8), "little")
        if length > limit:
            raise OSError(f"a message of {length} bytes")
        try:
            return json.loads(self._read(length))
        except ValueError as error:
            raise OSError(f"no message: {error}") from error

    def _read(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            piece = self._socket.recv(min(length - len(data), 1 << 20))
            if not piece:
                raise ConnectionResetError("the connection was closed")
            data += piece
        return bytes(data)

    def has_message(self) -> bool:
        """True when `receive` would find something: a message, or the end."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


def claim_out(claim: DocumentKey) -> list[str]:
    """A claim as JSON."""
    return [claim.id, claim.content_hash.hex(), claim.metadata]


def claim_in(value: Sequence[str]) -> DocumentKey:
    """What `claim_out` wrote."""
    return DocumentKey(value[0], bytes.fromhex(value[1]), value[2])


def answer_out(answer: Assignment | str | None) -> Any:
    """An answer to a claim as JSON."""
    if not isinstance(answer, Assignment):
        return answer
    return [answer.verdict.encode, answer.verdict.replaces, answer.number]


def answer_in(value: Any) -> Assignment | str | None:
    """What `answer_out` wrote."""
    if value is None or isinstance(value, str):
        return value
    return Assignment(WriteDecision(value[0], tuple(value[1])), value[2])


def window_out(window: Window) -> dict[str, Any]:
    """A window as JSON, without the tokens, which are not stored."""
    return {
        "documents": window.documents,
        "unchanged": window.unchanged,
        "failed": window.failed,
        "pending": [
            [
                claim_out(p.claim),
                p.verdict.encode,
                p.verdict.replaces,
                [
                    [q.number, q.document.id, q.document.title, q.document.text, len(q.tokens)]
                    for q in p.pieces
                ],
            ]
            for p in window.pending
        ],
        "files": [[f.name, asdict(f.entry), f.numbers] for f in window.files],
    }


def window_in(value: dict[str, Any]) -> Window:
    """What `window_out` wrote; of each piece's tokens it has the number only."""
    pending = []
    for claim, encode, replaces, pieces in value["pending"]:
        # of the metadata, the claim's text is what is stored
        made = [
            TokenizedDocument(n, Document(i, text, title), range(t))
            for n, i, title, text, t in pieces
        ]
        pending.append(
            PendingWrite(claim_in(claim), WriteDecision(encode, tuple(replaces)), tuple(made))
        )
    files = [WrittenFile(n, SegmentEntry(**e), tuple(numbers)) for n, e, numbers in value["files"]]
    failed = [(name, reason) for name, reason in value["failed"]]
    return Window(value["documents"], value["unchanged"], failed, pending, files)
