"""A stand-in of the Hub's interface for pushes: repositories, and commits of small files.

In: requests of huggingface_hub. Out: the repositories that were made, with their files, and the tokens that
came with requests.
"""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

OWNER = "someone"


@dataclass
class Hub:
    """A running stand-in.

    Attributes:
        url: For HF_ENDPOINT.
        private: Of each repository, such as "models/someone/run": whether it was made private.
        files: Of each repository: contents by path.
        tokens: What requests were authorized with.
        refusals: How many of the next commits are refused.
    """

    url: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    tokens: set[str | None] = field(default_factory=set)
    refusals: int = 0

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        kind = f"{body.get('type') or 'model'}s"
        name = f"{body.get('organization') or OWNER}/{body['name']}"
        is_private = body.get("private", body.get("visibility") == "private")
        self.private.setdefault(f"{kind}/{name}", is_private)
        self.files.setdefault(f"{kind}/{name}", {})
        prefix = "" if kind == "models" else f"{kind}/"
        return {"url": f"{self.url}/{prefix}{name}", "id": name}

    def commit(self, repository: str, body: bytes) -> dict[str, Any]:
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.files[repository][line["value"]["path"]] = content
        url = f"{self.url}/{repository.removeprefix('models/')}/commit/0"
        return {"success": True, "commitOid": "0" * 40, "commitUrl": url}


@contextmanager
def serving_hub() -> Iterator[Hub]:
    """Serve until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def _reply(self, content: Any, status: int = 200) -> None:
            sent = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def do_GET(self) -> None:
            hub.tokens.add(self.headers.get("Authorization"))
            if self.path == "/api/whoami-v2":
                self._reply({"type": "user", "name": OWNER, "orgs": [], "auth": {}})
            else:
                self._reply({"sha": "0" * 40, "id": self.path.split("/api/")[-1], "siblings": []})

        def do_POST(self) -> None:
            hub.tokens.add(self.headers.get("Authorization"))
            length = int(self.headers.get("Content-Length") or 0)
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(length)
            parts = self.path.removeprefix("/api/").split("?")[0].split("/")
            if parts == ["repos", "create"]:
                self._reply(hub.create(json.loads(body)))
            elif parts == ["validate-yaml"]:
                self._reply({"errors": [], "warnings": []})
            elif parts[3] == "preupload":
                paths = [file["path"] for file in json.loads(body)["files"]]
                modes = {"uploadMode": "regular", "shouldIgnore": False}
                self._reply({"files": [{"path": path, **modes} for path in paths]})
            elif hub.refusals:
                hub.refusals -= 1
                self._reply({"error": "You don't have the rights to push."}, 403)
            else:
                self._reply(hub.commit("/".join(parts[:3]), body))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
