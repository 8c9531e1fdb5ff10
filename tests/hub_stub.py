"""A hub on this machine, with as much of its HTTP interface as uploads and downloads of a model ask for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What lies on it and what it was asked for."""

    def __init__(self) -> None:
        self.url = ""
        self.files: dict[str, dict[str, bytes]] = {}
        """Repository -> path -> content."""
        self.created: list[dict[str, Any]] = []
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.tokens: set[str] = set()
        self.status = 200
        """Of every answer, where it is not 200."""


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Give a hub that answers at its `url`."""
    hub = Hub()

    class Handler(_Handler):
        of = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    of: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._serve(b"")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._serve(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    do_PUT = do_POST

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self, body: bytes) -> None:
        hub, path = self.of, self.path.partition("?")[0]
        hub.asked.append(f"{self.command} {path}")
        if not path.startswith("/large/"):
            hub.tokens.add(self.headers.get("Authorization", ""))
        if hub.status != 200:
            return self._answer({"error": f"no, {self.headers.get('Authorization')}"}, status=hub.status)
        if path.startswith("/large/"):
            hub.large[path.removeprefix("/large/")] = body
            return self._answer({})
        if "/resolve/" in path:
            return self._file(path)
        name, answers = _name(path), {"create": self._create, "validate-yaml": lambda name, body: {}}
        answers |= {"preupload": self._modes, "batch": self._batch, "commit": self._commit}
        for word, answer in answers.items():
            if f"/{word}" in path:
                return self._answer(answer(name, body))
        if name not in hub.files:
            return self._answer({"error": "Repository not found"}, status=404, code="RepoNotFound")
        if "/tree/" in path:
            return self._answer(
                [
                    {"type": "file", "path": inside, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for inside, content in hub.files[name].items()
                ]
            )
        return self._answer({"id": name, "sha": COMMIT, "siblings": []})

    def _create(self, name: str, body: bytes) -> Any:
        asked = json.loads(body)
        self.of.created.append(asked)
        self.of.files.setdefault(f"{asked['organization']}/{asked['name']}", {})
        return {"url": f"{self.of.url}/{asked['organization']}/{asked['name']}"}

    def _modes(self, name: str, body: bytes) -> Any:
        paths = [file["path"] for file in json.loads(body)["files"]]
        large = (".safetensors", ".onnx")
        return {
            "files": [
                {"path": path, "uploadMode": "lfs" if path.endswith(large) else "regular", "shouldIgnore": False}
                for path in paths
            ]
        }

    def _batch(self, name: str, body: bytes) -> Any:
        objects = json.loads(body)["objects"]
        return {
            "transfer": "basic",
            "objects": [
                {**one, "actions": {"upload": {"href": f"{self.of.url}/large/{one['oid']}"}}} for one in objects
            ],
        }

    def _commit(self, name: str, body: bytes) -> Any:
        import base64

        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.of.files[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.of.files[name][value["path"]] = self.of.large[value["oid"]]
        return {"commitUrl": f"{self.of.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT}

    def _file(self, path: str) -> None:
        name, _, inside = path.removeprefix("/").partition("/resolve/")
        content = self.of.files[name][inside.partition("/")[2]]
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _answer(self, value: Any, *, status: int = 200, code: str | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        if code is not None:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _name(path: str) -> str:
    """Return OWNER/NAME of a path of the hub, or a name alone."""
    parts = path.removeprefix("/api/models").removeprefix("/").removesuffix(".git/info/lfs/objects/batch").split("/")
    ends = ("revision", "tree", "preupload", "commit")
    place = next((index for index, part in enumerate(parts) if part in ends), len(parts))
    return "/".join(parts[:place])
