"""Every error that this package raises.

A message says what was given, what was expected and what to do next, in one line. All errors
derive from `MSAError`, so that callers can catch one class; where a built-in class is natural
(`ValueError`, `KeyError`), they derive from that too.
"""

from __future__ import annotations


class MSAError(Exception):
    """Base class of every error raised by this package."""


class InputError(MSAError, ValueError):
    """A value, text or file that was given cannot be used as it is."""


class QuestionTooLongError(InputError):
    """A question leaves no position for its answer; the message says how many it needs."""


class MissingMaterialError(InputError):
    """A task of the evaluation needs texts or question sets, and no folder was given."""


class ConfigError(MSAError, ValueError):
    """A configuration is inconsistent, incomplete or of an unknown format."""


class ModelError(MSAError):
    """A model cannot be found, loaded or trusted (unknown path, missing or NaN weights)."""


class FetchError(ModelError):
    """What a model needs could not be fetched or kept (network, checksum, disk, offline)."""


class BankError(MSAError):
    """A memory bank cannot be created, opened or used."""


class BankNotFoundError(BankError):
    """The folder given is not a memory bank."""


class BankMismatchError(BankError):
    """The bank was made with another model, tokenizer, chunk size or format version."""


class BankLockedError(BankError):
    """Another process is writing to the bank; the message says who."""


class BankCorruptError(BankError):
    """A segment or the catalog is damaged; the message names it."""


class LexicalIndexError(BankError):
    """A bank cannot be searched by words; the message says why and what to type."""


class EmptyBankError(BankError):
    """A question was asked of a bank without documents."""


class DocumentNotFoundError(BankError, KeyError):
    """No document with this id."""

    def __str__(self) -> str:  # KeyError would print the repr of its argument
        return str(self.args[0]) if self.args else ""


class DuplicateDocumentError(InputError):
    """The same document id was given twice in one call."""


class StorageError(BankError, OSError):
    """The disk refused a write (full, read-only, permission); the bank is as it was before."""


class BudgetError(BankError):
    """A bank does not fit into the memory there is; the message says what would help."""


class WorkerError(BankError):
    """A process of those that build or hold a bank together failed, ended or fell silent."""


class TrainingError(MSAError):
    """Training cannot start or go on."""


class JudgeError(MSAError):
    """A judge of answers cannot be asked any further; what it has said is kept."""
