"""A small Hugging Face hub on localhost: the endpoints that pushing and downloading a model use, and nothing else.

Large files go through the LFS protocol (batch, upload, verify) and are downloaded by a redirect, as on the hub; there
is no Xet storage.
"""

from __future__ import annotations

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlsplit

import yaml

from tests.data.servers import Server

TOKEN = "hf_test_token"


class Repository:
    """Files of every commit, the newest last."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.commits: list[tuple[str, dict[str, bytes]]] = [(_commit("0"), {})]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


class Hub(Server):
    """The server: `repositories` by `org/name`, `seen` lists what was asked for as `METHOD path`."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.seen: list[str] = []
        self.down = False
        hub = self

        class Handler(_Handler):
            def answer(self) -> None:
                hub.seen.append(f"{self.command} {self.path}")
                _route(hub, self)

            do_GET = do_HEAD = do_POST = do_PUT = answer

        super().__init__(Handler)

    def files(self, repository: str) -> dict[str, bytes]:
        return self.repositories[repository].commits[-1][1]

    def publish(self, repository: str, files: dict[str, bytes]) -> str:
        """Put files there as somebody else would, and return the commit."""
        found = self.repositories.setdefault(repository, Repository(private=False))
        found.commits.append((_commit(f"{repository} {len(found.commits)}"), files))
        return found.commits[-1][0]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def reply(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def json(self, content: object, status: int = 200) -> None:
        self.reply(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    @property
    def authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"


def _commit(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _large(name: str, size: int) -> bool:
    return size > 10_000 or name.endswith((".safetensors", ".bin"))


def _route(hub: Hub, request: _Handler) -> None:
    body = request.body()
    path = unquote(urlsplit(request.path).path)
    parts = path.strip("/").split("/")
    if hub.down:
        request.reply(503)
    elif path == "/api/repos/create":
        _create(hub, request, json.loads(body))
    elif path == "/api/validate-yaml":
        _validate(request, json.loads(body)["content"])
    elif parts[0] in ("lfs", "cdn"):
        _object(hub, request, parts, body)
    elif parts[:2] == ["api", "models"]:
        _models(hub, request, "/".join(parts[2:4]), parts[4:], body)
    elif path.endswith(".git/info/lfs/objects/batch"):
        _batch(hub, request, json.loads(body))
    elif len(parts) > 4 and parts[2] == "resolve":
        _resolve(hub, request, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
    else:
        request.reply(404)


def _create(hub: Hub, request: _Handler, asked: dict[str, object]) -> None:
    name = f"{asked['organization']}/{asked['name']}"
    if not request.authorized:
        request.json({"error": "Invalid credentials"}, 401)
    elif name in hub.repositories:
        request.json({"error": "exists", "url": f"{hub.url}/{name}"}, 409)
    else:
        private = asked.get("visibility") == "private" or asked.get("private") is True
        hub.repositories[name] = Repository(private)
        request.json({"url": f"{hub.url}/{name}"})


def _validate(request: _Handler, content: str) -> None:
    """Read the metadata of a model card as the hub does."""
    errors = []
    try:
        found = yaml.safe_load(content.split("---")[1])
        if not isinstance(found.get("license", ""), str):
            errors.append({"message": "license must be a string"})
    except Exception as error:
        errors.append({"message": str(error)})
    request.json({"errors": errors, "warnings": []}, 400 if errors else 200)


def _object(hub: Hub, request: _Handler, parts: list[str], body: bytes) -> None:
    if parts[1] == "verify":
        asked = json.loads(body)
        request.json({}, 200 if len(hub.objects.get(asked["oid"], b"")) == asked["size"] else 404)
    elif request.command == "PUT":
        right = hashlib.sha256(body).hexdigest() == parts[1]
        hub.objects.update({parts[1]: body} if right else {})
        request.reply(200 if right else 400)
    else:
        _content(request, hub.objects[parts[1]], {})


def _content(request: _Handler, data: bytes, headers: dict[str, str]) -> None:
    """Send a file, or the rest of one."""
    begin = int(request.headers.get("Range", "bytes=0-")[len("bytes=") :].split("-")[0])
    if begin:
        headers = {**headers, "Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"}
    request.reply(206 if begin else 200, data[begin:], headers)


def _batch(hub: Hub, request: _Handler, asked: dict[str, list[dict[str, object]]]) -> None:
    actions = [
        {
            **wanted,
            "actions": {
                "upload": {"href": f"{hub.url}/lfs/{wanted['oid']}"},
                "verify": {"href": f"{hub.url}/lfs/verify"},
            },
        }
        for wanted in asked["objects"]
    ]
    request.json({"transfer": "basic", "objects": actions})


def _readable(hub: Hub, request: _Handler, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
    found = hub.repositories.get(name)
    if found is None or (found.private and not request.authorized):
        request.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        return None
    commit = found.at(revision)
    if commit is None:
        request.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
    return commit


def _models(hub: Hub, request: _Handler, name: str, rest: list[str], body: bytes) -> None:
    kind, revision = (rest[0], "/".join(rest[1:]).split("/")[0]) if rest else ("revision", "main")
    commit = _readable(hub, request, name, revision)
    if commit is None:
        return
    oid, files = commit
    if kind == "revision":
        request.json({"id": name, "sha": oid, "siblings": [{"rfilename": file} for file in files]})
    elif kind == "tree":
        request.json([_entry(file, data) for file, data in files.items()])
    elif not request.authorized:
        request.json({"error": "forbidden"}, 403)
    elif kind == "preupload":
        request.json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if _large(file["path"], file["size"]) else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
            }
        )
    elif kind == "commit":
        made = _apply(hub, files, [json.loads(line) for line in body.splitlines()])
        new = hub.publish(name, made)
        request.json({"commitUrl": f"{hub.url}/{name}/commit/{new}", "commitOid": new})
    else:
        request.reply(404)


def _entry(name: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": _git(data)}
    if _large(name, len(data)):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


def _apply(hub: Hub, files: dict[str, bytes], operations: list[dict[str, dict[str, str]]]) -> dict[str, bytes]:
    made = dict(files)
    for operation in operations:
        value = operation["value"]
        if operation["key"] == "file":
            made[value["path"]] = base64.b64decode(value["content"])
        elif operation["key"] == "lfsFile":
            made[value["path"]] = hub.objects[value["oid"]]
        elif operation["key"] == "deletedFile":
            del made[value["path"]]
    return made


def _resolve(hub: Hub, request: _Handler, name: str, revision: str, file: str) -> None:
    commit = _readable(hub, request, name, revision)
    if commit is None:
        return
    oid, files = commit
    if file not in files:
        request.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid})
        return
    data = files[file]
    headers = {"X-Repo-Commit": oid, "ETag": f'"{_git(data)}"'}
    if _large(file, len(data)):
        digest = hashlib.sha256(data).hexdigest()
        hub.objects[digest] = data
        headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data)), "ETag": f'"{digest}"'}
        elsewhere = hub.url.replace("127.0.0.1", "localhost")  # the hub's large files have a host of their own
        request.reply(302, b"", {**headers, "Location": f"{elsewhere}/cdn/{digest}"})
    else:
        _content(request, data, headers)
