"""The native API: what OpenAI's has no words for."""

from __future__ import annotations

from fastapi import APIRouter

from msa.serve.service import CallerDep, ServiceDep

router = APIRouter(prefix="/api", tags=["banks"])


@router.get("/banks")
async def list_banks(service: ServiceDep, caller: CallerDep) -> dict[str, list[str]]:
    """Names of the banks of this key."""
    return {"banks": service.registry.names(caller)}
