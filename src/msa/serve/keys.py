"""API keys: who asks, and what they may do.

A key file has one key a line: the key's SHA-256 in hexadecimal, a name, scopes and banks, such as

    5e88...42d8  alice  read,write  notes,team-*
"""

from __future__ import annotations

import base64
import binascii
import fnmatch
import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import HTTPConnection

from msa.errors import ConfigError
from msa.serve.errors import ServiceError

READ, WRITE, ADMIN = "read", "write", "admin"
SCOPES = (READ, WRITE, ADMIN)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_GLOB = re.compile(r"[A-Za-z0-9._*?\[\]!-]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Principal:
    """Who makes a request.

    Attributes:
        name: of the key; in logs, limits and metrics it stands for the key.
        scopes: some of `SCOPES`; each is given by itself.
        banks: globs of the names of banks that it may know of.
    """

    name: str
    scopes: frozenset[str]
    banks: tuple[str, ...]

    def knows(self, bank: str) -> bool:
        """True for a bank that it may know of."""
        return any(fnmatch.fnmatchcase(bank, glob) for glob in self.banks)

    def allows(self, scope: str, bank: str | None = None) -> bool:
        """True if it may do this, to this bank."""
        return scope in self.scopes and (bank is None or self.knows(bank))

    @property
    def sees_all(self) -> bool:
        """True if it may know of every bank there is or will be."""
        return "*" in self.banks


ANONYMOUS = Principal("anonymous", frozenset(SCOPES), ("*",))
"""Everybody, where no keys are asked for."""


class Keys:
    """The keys of a service.

    Args:
        principals: SHA-256 of the key -> who holds it; None lets everybody in.
    """

    def __init__(self, principals: dict[bytes, Principal] | None) -> None:
        self._principals = principals

    @property
    def required(self) -> bool:
        """True if every request needs a key."""
        return self._principals is not None

    @classmethod
    def load(cls, path: Path | None) -> Keys:
        """Read a key file; without one, everybody gets in.

        Raises:
            ConfigError: it cannot be read, or a line of it.
        """
        if path is None:
            return cls(None)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise ConfigError(f"key file {path} cannot be read: {error}") from error
        found: dict[bytes, Principal] = {}
        for number, line in enumerate(lines, 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            digest, principal = _parsed(words, f"key file {path}, line {number}")
            if digest in found or principal.name in {p.name for p in found.values()}:
                raise ConfigError(
                    f"key file {path}, line {number}: this key or name stands there twice"
                )
            found[digest] = principal
        if not found:
            raise ConfigError(f"key file {path} holds no key; add one, or start without the file")
        return cls(found)

    def find(self, key: str | None) -> Principal:
        """Who holds a key.

        The comparison takes the same time whichever key it is, or none.

        Raises:
            ServiceError: 401.
        """
        if self._principals is None:
            return ANONYMOUS
        digest = hashlib.sha256((key or "").encode("utf-8", "surrogateescape")).digest()
        holder: Principal | None = None
        for known, principal in self._principals.items():
            if hmac.compare_digest(digest, known):
                holder = principal
        if holder is None or key is None:
            raise _unauthorized(
                "Give an API key: 'Authorization: Bearer KEY'."
                if key is None
                else "This API key is not valid."
            )
        return holder


def principal(request: HTTPConnection) -> Principal:
    """Who makes this request; a FastAPI dependency.

    Raises:
        ServiceError: 401; for browsers with the header that makes them ask for a key.
    """
    keys: Keys = request.app.state.service.keys
    try:
        found = principal_of(keys, request.headers, request.scope.get("method", ""))
    except ServiceError as error:
        if "text/html" in request.headers.get("accept", ""):
            error.headers = {"WWW-Authenticate": 'Basic realm="msa", charset="UTF-8"'}
        raise
    request.state.principal = found
    return found


def principal_of(keys: Keys, headers: Mapping[str, str], method: str = "POST") -> Principal:
    """Who makes a request with these headers, whose names are in lower case.

    A key comes as `Authorization: Bearer KEY`. Browsers, which cannot be told to send that, may
    give it as the password of Basic authentication, to read only.

    Raises:
        ServiceError: 401.
    """
    return keys.find(_given_key(headers.get("authorization", ""), method))


def _given_key(authorization: str, method: str) -> str | None:
    scheme, _, rest = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip() or None
    if scheme.lower() == "basic" and method in ("GET", "HEAD"):
        try:
            return base64.b64decode(rest, validate=True).decode().partition(":")[2] or None
        except (binascii.Error, ValueError):
            return None
    return None


def _unauthorized(message: str) -> ServiceError:
    headers = {"WWW-Authenticate": "Bearer"}
    return ServiceError(401, None, "invalid_api_key", message, headers=headers)


def _parsed(words: Sequence[str], where: str) -> tuple[bytes, Principal]:
    """One line of a key file.

    Raises:
        ConfigError: with what was expected.
    """
    if len(words) != 4:
        raise ConfigError(
            f"{where} has {len(words)} words: expected 4, SHA-256 of the key, name, scopes, banks"
        )
    digest, name, scopes, banks = words
    if not _SHA256.fullmatch(digest.lower()):
        raise ConfigError(
            f"{where}: the first word is no SHA-256; make it with: printf %s KEY | sha256sum"
        )
    if not _NAME.fullmatch(name) or name == ANONYMOUS.name:
        raise ConfigError(f"{where}: {name!r} is no name; use letters, digits, '.', '_' and '-'")
    unknown = sorted(set(scopes.split(",")) - set(SCOPES))
    if unknown:
        raise ConfigError(f"{where}: scope {unknown[0]!r}; expected some of {','.join(SCOPES)}")
    globs = banks.split(",")
    if not all(_GLOB.fullmatch(glob) for glob in globs):
        raise ConfigError(f"{where}: {banks!r} are no names of banks; such as notes,team-* or *")
    return bytes.fromhex(digest), Principal(name, frozenset(scopes.split(",")), tuple(globs))
