"""A Hugging Face hub of one repository, on a port of this machine."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "0123456789" * 4


@contextmanager
def served(folder: Path, repository: str) -> Iterator[str]:
    """Yield the address under which a folder is the repository of that name."""
    names = sorted(path.name for path in folder.iterdir())

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith(f"/api/models/{repository}/tree/"):
                self.answer(json.dumps([{"type": "file", "path": name, "oid": name, "size": 1} for name in names]))
            elif self.path.startswith(f"/api/models/{repository}"):
                found = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
                self.answer(json.dumps(found))
            elif self.path.rpartition("/")[2] in names:
                self.answer((folder / self.path.rpartition("/")[2]).read_bytes())
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", "0")
                self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def answer(self, content: str | bytes) -> None:
            content = content.encode() if isinstance(content, str) else content
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Nothing on the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
