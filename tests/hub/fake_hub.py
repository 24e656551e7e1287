"""A hub on loopback: the API's model info, ``resolve`` with redirects, and a second host for blobs.

It has what huggingface_hub relies on: ``X-Repo-Commit``, ``X-Linked-Etag``, ``X-Linked-Size``,
error codes in headers, ranges. Switches make it drop connections, serve other bytes, refuse or
fail.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".gguf", ".safetensors", "tokenizer.json")


@dataclass
class Repo:
    """Files by path, and who may have them."""

    files: dict[str, bytes]
    commit: str = "c" * 40
    revisions: tuple[str, ...] = ("main",)
    gated: bool = False
    accepted: bool = True
    private: bool = False


@dataclass
class Seen:
    """One request, as it arrived."""

    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class Switches:
    """Faults and oddities.

    ``drops`` says after how many bytes each of the next blobs breaks off; ``busy`` answers the next
    requests to either host with a status and Retry-After; ``renamed`` redirects from old names;
    ``xet`` offers large files over the hub's other protocol as well.
    """

    drops: list[int] = field(default_factory=list)
    reset: bool = False
    corrupt: bool = False
    ignore_range: bool = False
    odd_etags: bool = False
    status: int = 0
    page: bytes = b""
    busy: list[tuple[int, str]] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    xet: bool = False


class FakeHub:
    """Two servers in threads: the hub itself, and the host that its large files redirect to."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.token = "hf_good"
        self.switches = Switches()
        self.seen: list[Seen] = []
        self._servers = [self._serve(_hub_answer), self._serve(_blob_answer)]
        self.url, self.blob_url = (
            f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers
        )

    def add(self, name: str, files: dict[str, bytes], **options: object) -> Repo:
        self.repos[name] = Repo(files, **options)  # type: ignore[arg-type]
        return self.repos[name]

    def blobs(self) -> list[Seen]:
        """Requests for the content of large files."""
        return [seen for seen in self.seen if seen.path.startswith("/blob/")]

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def _serve(self, answer: object) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"hub": self, "answer": answer})
        server = _Server(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A client that hangs up in the middle is the subject of some tests."""


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_GET(self) -> None:
        headers = self.headers
        self.hub.seen.append(
            Seen(self.command, self.path, headers["Range"], headers["Authorization"])
        )
        switches = self.hub.switches
        path = unquote(urlsplit(self.path).path)
        moved = next((old for old in switches.renamed if f"/{old}/" in f"{path}/"), None)
        if switches.busy:
            status, after = switches.busy.pop(0)
            self.reply(status, Retry_After=after)
        elif moved:
            self.reply(307, Location=self.path.replace(moved, switches.renamed[moved]))
        else:
            self.answer(path)  # type: ignore[attr-defined]

    do_HEAD = do_GET  # noqa: N815

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _hub_answer(handler: _Handler, path: str) -> None:
    """``/api/models/ORG/REPO[/revision/R]`` and ``/ORG/REPO/resolve/R/FILE``."""
    hub, switches = handler.hub, handler.hub.switches
    if switches.status or switches.page:
        return handler.reply(switches.status or 200, switches.page, Content_Type="text/html")
    is_api = path.startswith("/api/models/")
    parts = path.removeprefix("/api/models/").strip("/").split("/")
    repo = hub.repos.get("/".join(parts[:2]))
    trusted = handler.headers["Authorization"] == f"Bearer {hub.token}"
    if repo is None or (repo.private and not trusted):
        return handler.reply(401, X_Error_Code="RepoNotFound")
    rest = "/".join(parts[3:]) or "main"
    revision = next(
        (r for r in (*repo.revisions, repo.commit) if f"{rest}/".startswith(r + "/")), None
    )
    if revision is None:
        return handler.reply(404, X_Error_Code="RevisionNotFound")
    if is_api:
        return handler.reply(200, _info("/".join(parts[:2]), repo), Content_Type="application/json")
    if repo.gated and not trusted:
        return handler.reply(401, X_Error_Code="GatedRepo")
    if repo.gated and not repo.accepted:
        return handler.reply(403, X_Error_Code="GatedRepo")
    return _resolve(handler, repo, rest[len(revision) + 1 :])


def _info(name: str, repo: Repo) -> bytes:
    siblings = []
    for path, content in repo.files.items():
        entry = {"rfilename": path, "size": len(content), "blobId": git_id(content)}
        if path.endswith(LFS_SUFFIXES):
            entry["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 134}
        siblings.append(entry)
    return json.dumps({"id": name, "sha": repo.commit, "siblings": siblings}).encode()


def _resolve(handler: _Handler, repo: Repo, path: str) -> None:
    content = repo.files.get(path)
    if content is None:
        return handler.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=repo.commit)
    if not path.endswith(LFS_SUFFIXES):
        return handler.reply(200, content, X_Repo_Commit=repo.commit, ETag=f'"{git_id(content)}"')
    etag = git_id(content) if handler.hub.switches.odd_etags else sha256(content)
    xet = {"X_Xet_Hash": sha256(b"xet" + content)} if handler.hub.switches.xet else {}
    return handler.reply(
        302,
        Location=f"{handler.hub.blob_url}/blob/{sha256(content)}",
        X_Repo_Commit=repo.commit,
        X_Linked_Etag=f'"{etag}"',
        X_Linked_Size=str(len(content)),
        **xet,
    )


def _blob_answer(handler: _Handler, path: str) -> None:
    """``/blob/SHA256``, whole or from an offset on."""
    hub, switches = handler.hub, handler.hub.switches
    requested = path.removeprefix("/blob/")
    contents = (content for repo in hub.repos.values() for content in repo.files.values())
    content = next(content for content in contents if sha256(content) == requested)
    if switches.corrupt:
        content = bytes([content[0] ^ 1]) + content[1:]
    start = 0
    if handler.headers["Range"] and not switches.ignore_range:
        start = int(handler.headers["Range"].removeprefix("bytes=").rstrip("-"))
    body = content[start:]
    handler.send_response(206 if start else 200)
    handler.send_header("Content-Length", str(len(body)))
    if start:
        handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    handler.end_headers()
    keep = switches.drops.pop(0) if switches.drops else len(body)
    handler.wfile.write(body[:keep])
    if keep < len(body) and switches.reset:
        handler.wfile.flush()
        linger = struct.pack("ii", 1, 0)  # closing then sends RST instead of FIN
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        handler.connection.close()
