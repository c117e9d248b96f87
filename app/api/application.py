"""The application: routes, problems, and the node's life around them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio import to_thread
from fastapi import Depends, FastAPI

from app.api import problems
from app.api.access import Gate, token_scheme
from app.api.context import Context
from app.api.docs_ui import mount_docs
from app.api.lanes import THREADS, Lanes
from app.api.routes import cluster, consumers, health, metrics, node, restores
from app.settings import Settings
from app.version import VERSION

DESCRIPTION = """Keeps a mixture-of-experts model's expert weights hot in host memory, and brings them back from the
nearest memory when ranks or nodes die. Weight bytes never travel here: they go through shared memory and the transfer
engine. Errors are RFC 9457 problem documents."""


def create_app(settings: Settings, context: Context | None = None) -> FastAPI:
    """The application of one node. Without a context it opens its own when it starts, and closes it when it stops.

    Builds its OpenAPI document with no configuration and touches nothing until it is started.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        to_thread.current_default_thread_limiter().total_tokens = THREADS
        opened = context if context is not None else await to_thread.run_sync(Context.open, settings)
        app.state.context = opened
        await to_thread.run_sync(opened.start)
        try:
            yield
        finally:
            app.state.context = None
            await to_thread.run_sync(opened.stop)

    app = FastAPI(
        title="Hotspare",
        version=VERSION,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_tags=[
            {"name": "health", "description": "For probes and Prometheus."},
            {"name": "node", "description": "This node."},
            {"name": "cluster", "description": "All nodes, as this one sees them."},
            {"name": "restores", "description": "Bringing blocks back."},
            {"name": "consumers", "description": "Engines whose memory restores may go to."},
        ],
    )
    app.state.settings = settings
    app.add_middleware(Lanes)
    app.add_middleware(Gate)  # before the lanes: whoever may not ask takes no place
    problems.install(app)
    app.include_router(health.router, responses=problems.problem_responses(403))
    for router in (metrics.router, node.router, cluster.router, restores.router, consumers.router):
        app.include_router(router, dependencies=[Depends(token_scheme)], responses=problems.problem_responses(403, 503))
    mount_docs(app)
    return app
