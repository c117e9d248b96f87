"""Whether the process answers, and whether the node is ready."""

from __future__ import annotations

from fastapi import APIRouter, Response

from app.api.current import CurrentContext
from app.documents import Live, Readiness
from app.node.holding import NOTHING

router = APIRouter(tags=["health"])


@router.head("/livez", include_in_schema=False)
@router.get("/livez", summary="The process answers")
async def livez() -> Live:
    return Live()


@router.head("/readyz", include_in_schema=False)
@router.get(
    "/readyz",
    summary="Every block placed here is published, sealed, registered and attachable",
    responses={503: {"model": Readiness, "description": "Not ready: the body names each check."}},
)
def readyz(context: CurrentContext, response: Response) -> Readiness:
    holding = context.node.holding
    checks = holding.checks() if holding else NOTHING
    ready = all(checks.values())
    if not ready:
        response.status_code = 503
    missing = len(holding.missing()) if holding else 0
    return Readiness(
        ready=ready, state=context.node.state, checks=checks, missing=missing, detail=context.node.problem()
    )
