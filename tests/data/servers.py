"""Servers on localhost that misbehave on purpose: a web server, a TCP proxy, and an S3 store in its own process."""

from __future__ import annotations

import contextlib
import http.server
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


class Server:
    """What serves in a thread for a `with` block."""

    def __init__(self, handler: type[http.server.BaseHTTPRequestHandler], host: str = "127.0.0.1") -> None:
        self.server = http.server.ThreadingHTTPServer((host, 0), handler)
        self.port = self.server.server_port
        self.url = f"http://{host}:{self.port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


class Web(Server):
    """A web server: `routes` maps a path (without query) to what answers it, `seen` lists what was asked for."""

    def __init__(self, host: str = "127.0.0.1", certificate: Path | None = None) -> None:
        self.routes: dict[str, Answer] = {}
        self.seen: list[str] = []
        self.headers: list[dict[str, str]] = []
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:
                """Stay silent."""

            def do_GET(self) -> None:
                web.seen.append(self.path)
                web.headers.append(dict(self.headers))
                with contextlib.suppress(ConnectionError):
                    web.routes.get(self.path.split("?")[0], status(404))(self)

        super().__init__(Handler, host)
        if certificate is not None:
            self.url = self.url.replace("http:", "https:")
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)


def certificate(path: Path) -> Path:
    """Write a key and a certificate for 127.0.0.1, signed by itself."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a test")])
    begin = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, begin, begin + datetime.timedelta(days=1))
    made = made.add_extension(x509.SubjectAlternativeName([address]), critical=False)
    plain = serialization.NoEncryption()
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    path.write_bytes(secret + made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    return path


def send(handler: http.server.BaseHTTPRequestHandler, code: int, body: bytes = b"", **headers: str) -> None:
    handler.send_response(code)
    for name, value in {"Content_Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def body(content: bytes, **headers: str) -> Answer:
    return lambda handler: send(handler, 200, content, **headers)


def status(code: int, **headers: str) -> Answer:
    return lambda handler: send(handler, code, b"", **headers)


def redirect(location: str, code: int = 302) -> Answer:
    return status(code, Location=location)


def ranged(content: bytes, tag: str, cut: int | None = None) -> Answer:
    """Answer a request for a range if it is for this version, as servers with strong ETags do; cut after so much."""

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        asked = handler.headers.get("Range")
        begin = int(asked[6:-1]) if asked and handler.headers["If-Range"] == tag else 0
        rest = content[begin:]
        headers = {"Content_Length": str(len(rest)), "ETag": tag}
        if begin:
            headers["Content_Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        send(handler, 206 if begin else 200, rest[:cut], **headers)

    return answer


def in_turn(*answers: Answer) -> Answer:
    """Answer the first request with the first, and all that follow the last with the last."""
    left = list(answers)
    return lambda handler: (left.pop(0) if len(left) > 1 else left[0])(handler)


class Proxy:
    """A TCP proxy: delays, cuts and refuses. `gets` lists the GET requests that passed.

    `pause`: seconds before each 32 KiB to the client; `cuts`: for each coming connection with a GET, the bytes after
    which it is cut; `refuse`: close every connection at once.
    """

    def __init__(self, port: int) -> None:
        self.behind = port
        self.pause = 0.0
        self.cuts: list[int] = []
        self.refuse = False
        self.gets: list[str] = []
        self.passed = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                if self.refuse:
                    client.close()
                    continue
                try:
                    server = socket.create_connection(("127.0.0.1", self.behind), timeout=30)
                except OSError:
                    client.close()
                    continue
                cut: list[int] = []
                threading.Thread(target=self._up, args=(client, server, cut), daemon=True).start()
                threading.Thread(target=self._down, args=(server, client, cut), daemon=True).start()

    def _up(self, client: socket.socket, server: socket.socket, cut: list[int]) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                if data.startswith(b"GET "):
                    self.gets.append(data.split(b" ")[1].decode())
                    if self.cuts:
                        cut.append(self.cuts.pop(0))
                server.sendall(data)
        _end(server)

    def _down(self, server: socket.socket, client: socket.socket, cut: list[int]) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(32768):
                time.sleep(self.pause)
                if cut:
                    data = data[: cut[0]]
                    cut[0] -= len(data)
                client.sendall(data)
                self.passed += len(data)
                if cut and cut[0] == 0:
                    break
        _end(client)
        _end(server)


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testkey",
    "AWS_SECRET_ACCESS_KEY": "testsecret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class Store:
    """moto's S3 server in a process of its own, which can be killed and started again (empty) on the same port."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, objects: dict[str, bytes]) -> None:
        """Serve these objects, `bucket/key` -> content."""
        from botocore.session import get_session

        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(600):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                break
            time.sleep(0.05)
        session = get_session()
        session.set_credentials("testkey", "testsecret")
        client = session.create_client("s3", region_name="us-east-1", endpoint_url=f"http://127.0.0.1:{self.port}")
        for bucket in {name.split("/")[0] for name in objects}:
            client.create_bucket(Bucket=bucket)
        for name, content in objects.items():
            bucket, _, key = name.partition("/")
            client.put_object(Bucket=bucket, Key=key, Body=content)
        client.close()

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@contextmanager
def store(objects: dict[str, bytes]) -> Iterator[Store]:
    server = Store()
    server.start(objects)
    try:
        yield server
    finally:
        server.kill()
