"""The OpenAPI page at /docs, from files shipped in the package: it needs no internet, and may reach none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles

ASSETS_DIRECTORY = Path(__file__).parent / "static" / "swagger-ui"
DOCS_PATH = "/docs"
ASSETS_PATH = "/docs/assets"
ASSETS_MAX_AGE_S = 86_400  # a new release may bring new files under the same names

# The page is a generated document with one inline script; the browser refuses whatever it would fetch from elsewhere.
_CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
_PAGE_HEADERS = {"Cache-Control": "no-cache", "Content-Security-Policy": _CONTENT_SECURITY_POLICY}


class _Assets(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = f"public, max-age={ASSETS_MAX_AGE_S}"
        return response


def _page(app: FastAPI) -> HTMLResponse:
    # Relative URLs hold behind a proxy that serves the node under a prefix.
    page = get_swagger_ui_html(
        openapi_url=(app.openapi_url or "/openapi.json").lstrip("/"),
        title=f"{app.title} API",
        swagger_js_url="docs/assets/swagger-ui-bundle.js",
        swagger_css_url="docs/assets/swagger-ui.css",
        swagger_favicon_url="docs/assets/favicon-32x32.png",
        swagger_ui_parameters={"validatorUrl": None, "tryItOutEnabled": True},
    )
    page.headers.update(_PAGE_HEADERS)
    return page


def mount_docs(app: FastAPI) -> None:
    """Serve GET /docs and its files. Replaces FastAPI's own /docs and /redoc, which load from the internet."""
    replaced = {app.docs_url, app.redoc_url, app.swagger_ui_oauth2_redirect_url, DOCS_PATH} - {None}
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) not in replaced]

    async def docs() -> HTMLResponse:
        return _page(app)

    app.add_api_route(DOCS_PATH, docs, include_in_schema=False, response_class=HTMLResponse)
    app.mount(ASSETS_PATH, _Assets(directory=ASSETS_DIRECTORY), name="docs-assets")
