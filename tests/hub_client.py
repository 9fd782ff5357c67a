"""Puts huggingface_hub, in this process or another, in front of the tests' Hub; and keeps sockets on this machine."""

from __future__ import annotations

import importlib
import ipaddress
import os
import select
import socket
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from time_limits import hang_seconds

if TYPE_CHECKING:
    from hub_server import HubServer

_UNWANTED_VARIABLES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_OIDC_RESOURCE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE",
    "HF_XET_CACHE", "HF_ASSETS_CACHE", "HF_HUB_DISABLE_IMPLICIT_TOKEN", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_XET",
)  # fmt: skip


def environment(server: HubServer, home: Path, *, token: str | None = "hf_good", xet: bool = False) -> dict[str, str]:
    """The environment of a process that takes `server` for the Hub; `home` is its cache (and token file)."""
    variables = {name: value for name, value in os.environ.items() if name not in _UNWANTED_VARIABLES}
    variables |= {
        "HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost",
    }  # fmt: skip
    if token is not None:
        variables["HF_TOKEN"] = token
    if not xet:
        variables["HF_HUB_DISABLE_XET"] = "1"
    return variables


def client_httpx() -> Any:
    """The HTTP library whose errors huggingface_hub lets through: httpx2, or httpx in its earlier versions."""
    used = importlib.import_module("huggingface_hub.utils._http")
    return importlib.import_module("httpx2" if hasattr(used, "httpx2") else "httpx")


def online(
    monkeypatch: pytest.MonkeyPatch,
    server: HubServer,
    home: Path,
    *,
    token: str | None = "hf_good",
    xet: bool = False,
) -> None:
    """Makes this process's huggingface_hub take `server` for the Hub, until the test is over.

    huggingface_hub reads the environment once, when it is imported, and conftest.py imports it offline. So its constants
    are set here, with the few copies that other modules took of them by value: the URL template, the host list, and the
    endpoint of the one HfApi object whose methods are the module's functions. The environment is set too, for processes
    that the test starts, and because the token is read from it at every call.

    Waits between retries are recorded in `server.waits` and not slept. The shared client is closed, since it may hold
    proxies or connections from before. May be called again in a test, with another token, for example.

    Args:
        token: None for nobody.
        xet: whether uploads go the way they go by default in production (the server has no Xet storage: LFS uploads
            then fail, regular ones work).
    """
    import huggingface_hub
    from huggingface_hub import close_session, constants, hf_api

    close_session()
    # Its LFS uploads hand a file to httpx2 under an old name. pytest takes the filter back after the test.
    warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)
    for name in _UNWANTED_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment(server, home, token=token, xet=xet).items():
        if os.environ.get(name) != value:
            monkeypatch.setenv(name, value)
    hub = home / "hub"
    values: dict[str, Any] = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_URL_HOSTS": frozenset({"hf.co", "huggingface.co", urlsplit(server.url).hostname}),
        "HF_HUB_OFFLINE": False,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(hub),
        "HUGGINGFACE_HUB_CACHE": str(hub),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HF_XET_CACHE": str(home / "xet"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "AGENT_HARNESSES_PATH": str(home / ".agent_harnesses.json"),
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_XET": not xet,
        "HF_HUB_ETAG_TIMEOUT": hang_seconds(),
        "HF_HUB_DOWNLOAD_TIMEOUT": hang_seconds(),
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value, raising=False)  # not every version has every one
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    module = importlib.import_module  # some submodules' names in their package are functions of the same name
    monkeypatch.setattr(module("huggingface_hub.utils._cache_manager"), "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(module("huggingface_hub.utils.tqdm"), "progress_bar_states", {"_global": False})
    clock = SimpleNamespace(**{**vars(time), "sleep": server.waits.append})
    for name in ("utils._http", "file_download"):
        monkeypatch.setattr(module(f"{huggingface_hub.__name__}.{name}"), "time", clock)


def impatient(monkeypatch: pytest.MonkeyPatch, server: HubServer) -> None:
    """Let a connection's time limit pass at the moment at which the server hangs, however long the limit is.

    A limit that a test could wait for would also end requests that a busy machine is slow to answer.
    """
    receive = socket.socket.recv

    def recv(self: socket.socket, *arguments: Any) -> bytes:
        limit = self.gettimeout()
        until = time.monotonic() + (limit or 0.0)
        while time.monotonic() < until and not select.select([self], [], [], 0.005)[0]:
            if self.getsockname() in server.hanging:
                raise TimeoutError("timed out")
        return receive(self, *arguments)

    monkeypatch.setattr(socket.socket, "recv", recv)


def loopback_only(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every Python socket that would leave this machine raises RuntimeError; the list names the hosts it was for.

    RuntimeError, because clients take an OSError for a network that is down and go on. Native code (hf_xet) has sockets
    of its own, which this cannot see.
    """
    refused: list[str] = []

    def check(host: Any) -> None:
        name = host.decode() if isinstance(host, bytes) else host
        if name is None or name == "localhost":
            return
        try:
            if ipaddress.ip_address(name).is_loopback:
                return
        except ValueError:
            pass
        refused.append(str(name))
        raise RuntimeError(f"a test tried to reach {name}; only this machine may be contacted")

    def guard_method(name: str, address_of: Any) -> None:
        original = getattr(socket.socket, name)

        def guarded(self: socket.socket, *arguments: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6):
                check(address_of(arguments)[0])
            return original(self, *arguments)

        monkeypatch.setattr(socket.socket, name, guarded)

    def guard_function(name: str) -> None:
        original = getattr(socket, name)

        def guarded(host: Any, *arguments: Any, **options: Any) -> Any:
            check(host)
            return original(host, *arguments, **options)

        monkeypatch.setattr(socket, name, guarded)

    guard_method("connect", lambda arguments: arguments[0])
    guard_method("connect_ex", lambda arguments: arguments[0])
    guard_method("sendto", lambda arguments: arguments[-1])
    for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
        guard_function(name)
    return refused
