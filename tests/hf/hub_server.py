"""A Hugging Face hub with one model, for a test: `python hub_server.py DIRECTORY` prints its port and serves."""

from __future__ import annotations

import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(sys.argv[1])
COMMIT = "c0ffee"


class Hub(BaseHTTPRequestHandler):
    """Model information, file list and files of any repository name: always those of ROOT."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        names = sorted(item.name for item in ROOT.iterdir())
        if "/resolve/" in path:
            name = path.split("/")[-1]
            if name not in names:
                return self.send_error(404)
            data = (ROOT / name).read_bytes()
        elif "/tree/" in path:
            data = json.dumps(
                [{"type": "file", "path": name, "size": (ROOT / name).stat().st_size, "oid": name} for name in names]
            ).encode()
        else:
            model = {"id": "me/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            data = json.dumps(model).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(data)
        return None

    def log_message(self, *_: object) -> None:
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
print(server.server_port, flush=True)
server.serve_forever()
