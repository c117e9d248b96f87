"""Prometheus metrics, computed when they are asked for."""

from __future__ import annotations

from fastapi import APIRouter, Response

from app.api.current import CurrentContext
from app.api.metrics import render
from app.api.problems import problem_responses

router = APIRouter(tags=["health"])


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}}, **problem_responses(401)},
)
def get_metrics(context: CurrentContext) -> Response:
    body, media_type = render(context)
    return Response(body, headers={"Content-Type": media_type})
