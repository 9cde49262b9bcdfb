"""What a request may change of how a question is retrieved, in whichever API it comes."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field


def _whole(value: Any) -> Any:
    """JSON knows one kind of number: 7.0 is a whole number too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
_Weight = Annotated[float, Field(ge=0, le=1000)]


class RetrievalChanges(BaseModel):
    """Fields of `msa.inference.options.AskOptions` up to the answer; what is None stays."""

    max_rounds: Annotated[Whole, Field(ge=1, le=32)] | None = None
    max_documents_per_round: Annotated[Whole, Field(ge=1, le=64)] | None = None
    min_documents_per_round: Annotated[Whole, Field(ge=1, le=64)] | None = None
    candidates: Annotated[Whole, Field(ge=1, le=4096)] | None = None
    lexical_weight: _Weight | None = None
    prior_weight: _Weight | None = None
    prior_temperature: Annotated[float, Field(ge=0.001, le=1000)] | None = None
    end_bias: Annotated[float, Field(ge=-1000, le=1000)] | None = None
    end_weight: _Weight | None = None
    judged_documents: Annotated[Whole, Field(ge=1, le=16)] | None = None
    judge_margin: _Weight | None = None
    judge_weight: _Weight | None = None
    evidence_weight: _Weight | None = None
    answer_beginnings: Annotated[Whole, Field(ge=1, le=8)] | None = None
    refusal_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    allow_unread: bool | None = None
