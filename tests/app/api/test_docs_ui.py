import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin

import httpx
import pytest
import uvicorn
from fastapi import APIRouter, FastAPI

from app.api.docs_ui import ASSETS_DIRECTORY, mount_docs

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DEADLINE_S = 60


def documented_app() -> FastAPI:
    app = FastAPI(title="Thirteen experts")
    mount_docs(app)

    @app.get("/v1/things/{thing_id}", summary="One thing of many", tags=["things"])
    async def thing(thing_id: int) -> dict[str, int]:
        return {"thing": thing_id}

    return app


async def get(path: str, **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(documented_app()), base_url="http://localhost"
    ) as client:
        return await client.get(path, headers=headers)


def links(page: str) -> list[str]:
    return re.findall(r"""(?:src|href)=["']([^"']+)["']""", page) + re.findall(r"url: '([^']+)'", page)


async def test_the_page_names_no_external_url_and_all_it_names_is_served() -> None:
    page = await get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert not re.search(r"(?:https?:)?//[a-z]", re.sub(r"<!--.*?-->|^\s*//.*$", "", page.text, flags=re.M))
    named = links(page.text)
    assert len(named) == 4  # script, style, icon and document
    for link in named:
        answer = await get(urljoin("/docs", link))
        assert answer.status_code == 200, link
        assert answer.content


async def test_the_page_may_fetch_only_from_its_own_node() -> None:
    policy = (await get("/docs")).headers["content-security-policy"]
    assert policy.startswith("default-src 'self';")
    assert "http" not in policy


async def test_the_page_is_always_asked_for_and_its_files_are_kept() -> None:
    assert (await get("/docs")).headers["cache-control"] == "no-cache"
    script = await get("/docs/assets/swagger-ui-bundle.js")
    assert script.headers["cache-control"] == "public, max-age=86400"
    assert "javascript" in script.headers["content-type"]
    again = await get("/docs/assets/swagger-ui-bundle.js", **{"if-none-match": script.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


async def test_pages_that_load_from_the_internet_are_gone() -> None:
    for path in ("/redoc", "/docs/oauth2-redirect"):
        assert (await get(path)).status_code == 404


async def test_nothing_outside_the_assets_is_served() -> None:
    for path in ("/docs/assets/../README.md", "/docs/assets/%2e%2e/README.md", "/docs/assets/none.js", "/docs/assets/"):
        assert (await get(path)).status_code == 404


def test_the_page_is_not_part_of_the_api() -> None:
    assert list(documented_app().openapi()["paths"]) == ["/v1/things/{thing_id}"]


async def test_routers_that_were_there_before_stay() -> None:
    app = FastAPI(docs_url=None, redoc_url=None)
    router = APIRouter()
    router.add_api_route("/livez", lambda: 3)
    app.include_router(router)
    mount_docs(app)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        assert (await client.get("/livez")).json() == 3


def test_the_files_come_with_their_licence() -> None:
    assert "Apache License" in (ASSETS_DIRECTORY / "LICENSE").read_text()
    assert (ASSETS_DIRECTORY / "NOTICE").exists()


@pytest.fixture
def url() -> Iterator[str]:
    """The app behind a real server on a free port of this machine."""
    server = uvicorn.Server(uvicorn.Config(documented_app(), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + DEADLINE_S
    while not server.started and time.monotonic() < deadline:
        thread.join(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(DEADLINE_S)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, to see that the page renders: apt-get install chromium")
def test_a_browser_renders_the_operations(url: str, tmp_path: Path) -> None:
    assert CHROMIUM
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path}",
             "--virtual-time-budget=5000", "--dump-dom"]  # fmt: skip
    browser = subprocess.run([CHROMIUM, *flags, f"{url}/docs"], capture_output=True, text=True, timeout=DEADLINE_S)
    assert browser.returncode == 0, browser.stderr
    assert "One thing of many" in browser.stdout
    assert 'class="opblock opblock-get"' in browser.stdout
    assert "Failed to load" not in browser.stdout
