"""A W&B server that does not work, and that says in every answer that it is a fake."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Fault = Literal["refused", "hanging", "401", "429", "500"]
ANSWER = b'{"errors": [{"message": "this is a fake W&B server"}]}'


@contextmanager
def broken_wandb(fault: Fault) -> Iterator[str]:
    """Yield the address of a server on which every request ends with this fault."""
    released = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if fault == "hanging":
                released.wait()
                return
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(int(fault))
            self.send_header("Content-Length", str(len(ANSWER)))
            self.end_headers()
            self.wfile.write(ANSWER)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    if fault == "refused":
        server.server_close()
        yield address
        return
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield address
        finally:
            released.set()
            server.shutdown()
