"""A small Google Cloud Storage server on loopback that keeps its objects on disk: the client library's JSON calls for
objects, ranged reads, and the XML multipart upload, which the emulators on PyPI lack. One process per connection; bodies are
streamed.

    python tests/gcs_server.py FOLDER [MEGABYTES]      # prints http://127.0.0.1:PORT and serves; a bucket is a folder in FOLDER

MEGABYTES limits the megabytes per second of each connection, as with a remote store.

A body that ends early, or whose CRC-32C is not the announced one, is discarded, as in the real service.
"""

import base64
import json
import math
import os
import sys
import time
import uuid
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from socketserver import ForkingMixIn
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.etree import ElementTree

import google_crc32c

PIECE = 2**20
ZEROS = bytes(PIECE)


def combine(first: int, second: int, size: int) -> int:
    """CRC-32C of two concatenated strings from those of each; `size` is the length of the second."""
    crc = first ^ 0xFFFFFFFF
    while size:
        crc = google_crc32c.extend(crc, ZEROS[:size])
        size -= min(size, PIECE)
    return crc ^ 0xFFFFFFFF ^ second


def encoded(crc: int) -> str:
    return base64.b64encode(crc.to_bytes(4, "big")).decode()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 2**16
    root: Path
    limit: float  # bytes per second for each connection

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
        parts = url.path.removeprefix("/upload").removeprefix("/download").split("/")
        if parts[1:4] == ["storage", "v1", "b"]:
            self.bucket, self.name = parts[4], unquote(parts[6]) if len(parts) > 6 else ""
            work = {"POST": self.insert, "PUT": self.resume, "GET": self.get, "DELETE": self.delete}[self.command]
        else:  # the XML interface
            self.bucket, self.name = parts[1], unquote("/".join(parts[2:]))
            work = {"POST": self.multipart, "PUT": self.part, "DELETE": self.abort}[self.command]
        if not (self.root / self.bucket).is_dir():
            self.body_to(Path(os.devnull))
            self.answer(404, {"error": {"message": "The specified bucket does not exist."}})
        else:
            work()

    do_GET = do_POST = do_PUT = do_DELETE = handle_request  # noqa: N815

    # what is stored: data files, and one JSON file per object that lists them in order

    def meta_file(self, name: str) -> Path:
        return self.root / self.bucket / f"{quote(name, safe='')}.json"

    def data_file(self) -> Path:
        return self.root / self.bucket / f"{uuid.uuid4().hex}.data"

    def meta(self) -> dict | None:
        return self.read_meta(self.meta_file(self.name))

    @staticmethod
    def read_meta(path: Path) -> dict | None:
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            return None

    def keep(self, segments: list[tuple[str, int, int]]) -> dict | None:
        """Store an object made of data files, each given by its path, size and CRC-32C; None if it must not exist but does."""
        crc = size = 0
        for _, length, part in segments:
            crc, size = combine(crc, part, length), size + length
        meta = {"name": self.name, "bucket": self.bucket, "size": str(size), "crc32c": encoded(crc), "generation": "1"}
        scratch = self.data_file()
        scratch.write_text(json.dumps(meta | {"segments": segments}))
        if self.query.get("ifGenerationMatch") != "0":
            scratch.replace(self.meta_file(self.name))
            return meta
        try:
            os.link(scratch, self.meta_file(self.name))
        except FileExistsError:
            return None
        finally:
            scratch.unlink()
        return meta

    def body_to(self, path: Path) -> tuple[str, int, int]:
        """Stream the body of the request to a file; return its path, size and CRC-32C."""
        size = left = int(self.headers.get("Content-Length") or 0)
        crc, start = 0, time.monotonic()
        with path.open("wb") as file:
            while left:
                piece = self.rfile.read(min(left, PIECE))
                if not piece:
                    self.close_connection = True
                    raise ConnectionError("the body ended early")
                crc = google_crc32c.extend(crc, piece)
                file.write(piece)
                left -= len(piece)
                self.hold_back(start, size - left)
        return str(path), size, crc

    def hold_back(self, start: float, moved: int) -> None:
        """Wait until the limit allows this connection to have moved that many bytes."""
        time.sleep(max(start + moved / self.limit - time.monotonic(), 0))

    def answer(self, status: int, body: dict | bytes = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    # the JSON interface

    def insert(self) -> None:
        if self.query["uploadType"] == "resumable":
            upload = self.data_file()
            upload.write_text(json.dumps({**json.loads(self.rfile.read(int(self.headers["Content-Length"]))), "segments": []}))
            host = self.headers["Host"]
            self.answer(200, {}, Location=f"http://{host}/upload/storage/v1/b/{self.bucket}/o?upload_id={upload.name}")
            return
        line = b"--" + self.headers.get_boundary().encode()
        _, meta, media, _ = self.rfile.read(int(self.headers["Content-Length"])).split(line)
        told = json.loads(meta.partition(b"\r\n\r\n")[2])
        data = media.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")
        self.name, crc, path = told["name"], google_crc32c.value(data), self.data_file()
        if told.get("crc32c", encoded(crc)) != encoded(crc):
            self.answer(400, {"error": {"message": "Provided CRC32C doesn't match calculated CRC32C."}})
            return
        path.write_bytes(data)
        kept = self.keep([(str(path), len(data), crc)])
        if kept:
            self.answer(200, kept)
        else:
            self.answer(412, {"error": {"message": "At least one of the pre-conditions you specified did not hold."}})

    def resume(self) -> None:
        upload = self.root / self.bucket / self.query["upload_id"]
        told = json.loads(upload.read_text())
        self.name, segments = told["name"], told["segments"]
        span, _, total = self.headers["Content-Range"].removeprefix("bytes ").partition("/")
        if span != "*":  # otherwise it asks how much of an interrupted upload was stored
            segments.append(self.body_to(self.data_file()))
            upload.write_text(json.dumps(told))
        kept = sum(size for _, size, _ in segments)
        if str(kept) == total:
            self.answer(200, self.keep(segments))
        else:
            self.answer(308, **({"Range": f"bytes=0-{kept - 1}"} if kept else {}))

    def get(self) -> None:
        if urlsplit(self.path).path.endswith(f"/b/{self.bucket}"):
            self.answer(200, {"name": self.bucket})
        elif not self.name:
            metas = [meta for path in sorted((self.root / self.bucket).glob("*.json")) if (meta := self.read_meta(path))]
            self.answer(200, {"items": [meta for meta in metas if meta["name"].startswith(self.query.get("prefix", ""))]})
        elif (meta := self.meta()) is None:
            self.answer(404, {"error": {"message": f"No such object: {self.bucket}/{self.name}"}})
        elif self.query.get("alt") == "media":
            self.send_media(meta)
        else:
            self.answer(200, meta)

    def send_media(self, meta: dict) -> None:
        size = int(meta["size"])
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last or size) + 1, size)
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(end - start))
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.send_header("X-Goog-Hash", f"crc32c={meta['crc32c']}")
        self.end_headers()
        self.wfile.flush()
        moved, begun = 0, time.monotonic()
        for path, length, _ in meta["segments"]:
            offset, stop = max(start, 0), min(end, length)
            with Path(path).open("rb") as file:
                while offset < stop:
                    sent = os.sendfile(self.connection.fileno(), file.fileno(), offset, min(stop - offset, PIECE))
                    offset, moved = offset + sent, moved + sent
                    self.hold_back(begun, moved)
            start, end = start - length, end - length

    def delete(self) -> None:
        self.meta_file(self.name).unlink()
        self.answer(204)

    # the XML multipart upload

    def multipart(self) -> None:
        if "uploads" in self.query:
            self.body_to(Path(os.devnull))
            root = ElementTree.Element("InitiateMultipartUploadResult", xmlns="http://s3.amazonaws.com/doc/2006-03-01/")
            ElementTree.SubElement(root, "UploadId").text = uuid.uuid4().hex
            self.answer(200, ElementTree.tostring(root))
            return
        body = ElementTree.fromstring(self.rfile.read(int(self.headers["Content-Length"])))
        tags = [json.loads(unquote(tag.text)) for tag in body.iter("ETag")]
        self.keep(tags)
        self.answer(200, b"<CompleteMultipartUploadResult/>")

    def part(self) -> None:
        segment = self.body_to(self.data_file())
        hashes = self.headers.get("X-Goog-Hash", "")
        if "crc32c=" in hashes and f"crc32c={encoded(segment[2])}" not in hashes:
            self.answer(400, b"<Error><Code>BadDigest</Code></Error>")
        else:  # the tag holds everything needed to assemble the object
            self.answer(200, ETag=quote(json.dumps(segment)), X_Goog_Hash=f"crc32c={encoded(segment[2])}")

    def abort(self) -> None:
        self.answer(204)

    def log_message(self, *_: object) -> None:
        pass


class Server(ForkingMixIn, HTTPServer):
    request_queue_size = 64
    max_children = 200  # clients keep their connections open


def main() -> None:
    Handler.root = Path(sys.argv[1]).absolute()
    Handler.limit = float(sys.argv[2]) * 1e6 if len(sys.argv) > 2 else math.inf
    with Server(("127.0.0.1", 0), Handler) as server:
        print(f"http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
