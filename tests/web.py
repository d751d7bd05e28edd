"""A local web server that can fail in the ways in which real web servers fail."""

import http.server
import socket
import struct
import threading
import time
from contextlib import contextmanager


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.content. The first part of the URL path selects a failure: "none", "ends", "stalls" and others."""

    def do_GET(self):
        kind, content, status = self.path.split("/")[1], self.server.content, 200
        asked = self.headers.get("Range", "")
        self.server.asked.append(asked)
        if kind == "none":
            return self.send_error(404)
        if kind == "garbage":
            return self.wfile.write(b"what is this\r\n\r\n" * 9)
        place = {}
        if asked and kind != "no-ranges":
            start, whole = int(asked.removeprefix("bytes=").rstrip("-")), len(content)
            status = 206 if start < whole else 416
            place["Content-Range"] = f"bytes {start}-{whole - 1}/{whole}" if status == 206 else f"bytes */{whole}"
            content = content[start:] if status == 206 else b"an error page"
        half = content[: len(content) // 2]
        if kind == "chunked":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            return self.wfile.write(b"%x\r\n%s\r\n%x\r\n" % (len(half), half, len(half)))
        self.send_response(status)
        sent = {"page": b"<html>Please log in</html>", "nothing": b""}
        sent = sent.get(kind, half if kind in ("ends", "resets", "stalls", "cut") else content)
        if kind != "unsaid":
            place["Content-Length"] = len(content if kind in ("ends", "resets", "stalls") else sent)
        for name, value in place.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(sent)
        if kind == "resets":
            self.wfile.flush()
            time.sleep(0.1)  # so that the client receives the first half before the reset
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        if kind == "stalls":
            self.server.released.wait(60)

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, address):
        pass


@contextmanager
def serving(content):
    """Start a web server that serves `content`, and yield the server.

    server.address(kind) is the URL for a kind of failure; server.asked lists the Range header of each request, or "".
    """
    server = Server(("127.0.0.1", 0), Handler)
    server.content, server.asked, server.released = content, [], threading.Event()
    server.address = lambda kind: f"http://127.0.0.1:{server.server_port}/{kind}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
