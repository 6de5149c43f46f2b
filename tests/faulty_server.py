"""An HTTP server in front of another that lets requests fail as servers of object stores do."""

import http.client
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FaultyServer(ThreadingHTTPServer):
    """Passes requests on to a server, except those that a fault is for.

    Args:
        server: address of the other server.
        host: address to listen at.

    Attributes:
        fault: called with the method, path and headers of a request; returns a status to answer with, "reset" to close the
            connection without an answer, the seconds by which to delay the answer, or None.
        received, sent: bytes of the bodies that came in and went out.
    """

    daemon_threads = True

    def __init__(self, server: str, host: str = "127.0.0.1") -> None:
        super().__init__((host, 0), Handler)
        self.server, self.lock = server.removeprefix("http://"), threading.Lock()
        self.fault = lambda method, path, headers: None
        self.received = self.sent = 0
        self.url = f"http://{host}:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """Ignore it: clients go away, which is what these tests provoke."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_one_request(self):
        """Read any method's request, and answer it."""
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        if self.headers.get("Expect") == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        body = (
            self._chunks()
            if self.headers.get("Transfer-Encoding")
            else self.rfile.read(int(self.headers.get("Content-Length", 0)))
        )
        fault = self.server.fault(self.command, self.path, self.headers)
        if fault == "reset":
            self.close_connection = True
            return
        if isinstance(fault, int):
            self._answer(fault, [("Retry-After", "1")], b"")
            return
        if isinstance(fault, float):
            time.sleep(fault)
        connection = http.client.HTTPConnection(self.server.server)
        headers = {name: value for name, value in self.headers.items() if name not in ("Expect", "Transfer-Encoding")}
        connection.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
        answer = connection.getresponse()
        content = answer.read()
        with self.server.lock:
            self.server.received += len(body)
            self.server.sent += len(content)
        self._answer(answer.status, answer.getheaders(), content)

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return body

    def _answer(self, status, headers, content):
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        length = next((value for name, value in headers if name.lower() == "content-length"), len(content))
        self.send_header("Content-Length", str(length if self.command == "HEAD" else len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        self.wfile.flush()


@contextmanager
def in_front_of(server: str, host: str = "127.0.0.1"):
    """A faulty server in front of another, while the block runs."""
    with FaultyServer(server, host) as faulty:
        threading.Thread(target=faulty.serve_forever, daemon=True).start()
        try:
            yield faulty
        finally:
            faulty.shutdown()
