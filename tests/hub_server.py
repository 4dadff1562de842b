"""A small Hub on the loopback interface: what huggingface_hub's client asks of the real one, kept in memory.

It speaks the HTTP API of model repositories: creation, `validate-yaml`, `preupload`, LFS (basic and multipart), commits
as ndjson, branches and pull requests, repository info, and `resolve` with the Hub's headers. Large files are answered
by a redirect to another origin, as the Hub's to its CDN. Faults are ordered by the tests: see `HubServer.fail`.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


class HubError(Exception):
    """An answer other than 200: status, the Hub's error code, further headers."""

    def __init__(self, status: int, code: str = "", message: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers


class Dropped(Exception):
    """The server hangs up."""


@dataclass
class Repository:
    """Branches (and `refs/pr/N`) point to commits; a commit is a whole tree."""

    owner: str
    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)  # titles of commits, oldest first
    claimed_sizes: dict[str, Any] = field(default_factory=dict)  # lies told in the repository's info

    def commit(self, ref: str, tree: dict[str, bytes], title: str) -> str:
        """Add a commit; the ref moves to it."""
        oid = hashlib.sha1(f"{len(self.commits)} {title} {sorted(tree)}".encode()).hexdigest()
        self.commits[oid] = tree
        self.refs[ref] = oid
        self.log.append(title)
        return oid

    def tree(self, revision: str = "main") -> dict[str, bytes]:
        """The files of a branch or commit."""
        return self.commits[self.oid(revision)]

    def oid(self, revision: str) -> str:
        """The commit of a revision."""
        oid = self.refs.get(revision, revision)
        if oid not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid


@dataclass
class Fault:
    """What happens to requests that match, `times` times.

    Attributes:
        method: HTTP method.
        path: regular expression, searched in the path.
        times: how often.
        status: answer with this status.
        headers: of that answer.
        html: answer with a web page, as a proxy or a failing gateway does.
        drop_upload: hang up after so many bytes of the request's body.
        drop_download: hang up after so many bytes of the answer's body.
    """

    method: str
    path: str
    times: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    html: bool = False
    drop_upload: int | None = None
    drop_download: int | None = None


class HubServer:
    """`with HubServer() as hub:` serves at `hub.url`.

    Attributes:
        tokens: token → (user, whether it may write).
        repositories: by id.
        objects: LFS objects by SHA-256.
        large: whether a path and size go to LFS; the Hub decides by `.gitattributes` and size.
        part_size: of a multipart upload; None for one part.
        requests: "METHOD path" of each request.
        leaked: authorization headers that arrived at the CDN.
    """

    def __init__(self) -> None:
        self.tokens: dict[str, tuple[str, bool]] = {}
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.large: Callable[[str, int], bool] = lambda path, size: path.endswith(".safetensors")
        self.part_size: int | None = None
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.leaked: list[str] = []
        self.lock = threading.Lock()

    def __enter__(self) -> "HubServer":
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.cdn = f"http://localhost:{self.http.server_port}"  # another origin by its name
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def add(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> Repository:
        """A repository with one commit, large files in LFS."""
        repository = self.repositories[repo_id] = Repository(repo_id.split("/")[0], private)
        repository.commit("main", files, "initial commit")
        return repository

    def fail(self, method: str, path: str, **what: Any) -> None:
        """Order a fault."""
        self.faults.append(Fault(method, path, **what))

    def due_fault(self, method: str, path: str) -> Fault | None:
        """The next fault for this request, used up by asking."""
        with self.lock:
            self.requests.append(f"{method} {path}")
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


def git_oid(content: bytes) -> str:
    """Git's name of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One request; `hub` is set by the server."""

    protocol_version = "HTTP/1.1"
    hub: HubServer

    def handle_one_request(self) -> None:
        with suppress(ConnectionError):
            super().handle_one_request()

    def log_message(self, *_: Any) -> None:
        """Nothing: the tests read `hub.requests`."""

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        fault = self.hub.due_fault(self.command, url.path) or Fault("", "")
        self.drop_download = fault.drop_download
        try:
            self.body = self.read_body(fault.drop_upload)
            if fault.html:
                self.send(fault.status or 200, b"<html>Please log in</html>", {"Content-Type": "text/html"})
                return
            if fault.status:
                raise HubError(fault.status, message="ordered by the test", **fault.headers)
            for method, pattern, route in ROUTES:
                if self.command in method.split() and (match := re.fullmatch(pattern, url.path)):
                    with self.hub.lock:
                        answer = route(self, *map(unquote, match.groups()))
                    break
            else:
                raise HubError(404, message=f"no route for {self.command} {url.path}")
            if isinstance(answer, dict):
                self.send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
            else:
                self.send(*answer)
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message, **error.headers}
            body = json.dumps({"error": error.message, "url": f"{self.hub.url}/{error.message}"}).encode()
            self.send(error.status, body, {key: value for key, value in headers.items() if value})
        except Dropped:
            self.close_connection = True

    def read_body(self, drop: int | None) -> bytes:
        if drop is not None:
            self.rfile.read(drop)
            raise Dropped
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.drop_download is not None:
            self.wfile.write(body[: self.drop_download])
            raise Dropped
        self.wfile.write(body)

    # Who asks, and what for

    def user(self) -> tuple[str | None, bool]:
        header = self.headers.get("Authorization", "")
        if not header:
            return None, False
        token = header.removeprefix("Bearer ")
        if token not in self.hub.tokens:
            raise HubError(401, message="Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def repository(self, repo_id: str) -> Repository:
        user, _ = self.user()
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and user != repository.owner):
            raise HubError(404 if user else 401, "RepoNotFound", "Repository not found")
        return repository

    def writable(self, repo_id: str) -> Repository:
        repository = self.repository(repo_id)
        user, writes = self.user()
        if user is None:
            raise HubError(401, message="Invalid username or password.")
        if not self.query.get("create_pr") and (user != repository.owner or not writes):
            raise HubError(403, message="You don't have the rights to write to this repository")
        return repository

    def json(self) -> Any:
        return json.loads(self.body)

    # Routes

    def create(self) -> dict[str, Any]:
        asked = self.json()
        user, writes = self.user()
        if user is None:
            raise HubError(401, message="Invalid username or password.")
        owner = asked["organization"] or user
        repo_id = f"{owner}/{asked['name']}"
        if owner != user or not writes:
            raise HubError(403, message=f'You don\'t have the rights to create a model under the namespace "{owner}"')
        if repo_id in self.hub.repositories:
            raise HubError(409, message=repo_id)  # the client takes the id from the answer's url
        repository = self.hub.repositories[repo_id] = Repository(owner, asked.get("visibility") == "private")
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return {"url": f"{self.hub.url}/{repo_id}"}

    def validate_yaml(self) -> dict[str, Any]:
        content = self.json()["content"]
        try:
            metadata = yaml.safe_load(re.match(r"---\r?\n(.*?)\n---\r?\n", content, re.S)[1])
            index = metadata.get("model-index", [])
            wrong = [result for model in index for result in model["results"] if not result["dataset"].get("type")]
            if wrong or not isinstance(metadata.get("license", ""), str):
                raise ValueError("model-index or license")
        except (TypeError, ValueError, KeyError, AttributeError, yaml.YAMLError) as error:
            raise HubError(400, message=f"Invalid metadata: {type(error).__name__}") from error
        return {"errors": [], "warnings": []}

    def preupload(self, repo_id: str, revision: str) -> dict[str, Any]:
        repository = self.writable(repo_id)
        tree = repository.tree(revision)
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if self.hub.large(file["path"], file["size"]) else "regular",
                    "shouldIgnore": False,
                    "oid": self.blob_oid(file["path"], tree[file["path"]]) if file["path"] in tree else None,
                }
                for file in self.json()["files"]
            ]
        }

    def blob_oid(self, path: str, content: bytes) -> str:
        large = self.hub.large(path, len(content))
        return hashlib.sha256(content).hexdigest() if large else git_oid(content)

    def lfs_batch(self, repo_id: str) -> dict[str, Any]:
        self.repository(repo_id)
        objects = []
        for wanted in self.json()["objects"]:
            oid, size, part = wanted["oid"], wanted["size"], self.hub.part_size
            answer = {"oid": oid, "size": size, "authenticated": True}
            if oid not in self.hub.objects:
                upload: dict[str, Any] = {"href": f"{self.hub.cdn}/lfs/{oid}"}
                if part:
                    count = -(-size // part)
                    urls = {str(i): f"{self.hub.cdn}/lfs/{oid}?part={i}" for i in range(1, count + 1)}
                    upload = {"href": f"{self.hub.url}/lfs/{oid}/complete", "header": {"chunk_size": str(part), **urls}}
                verify = {"href": f"{self.hub.url}/{repo_id}.git/info/lfs/objects/verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        return {"transfer": "multipart" if self.hub.part_size else "basic", "objects": objects}

    def lfs_put(self, oid: str) -> tuple[int, bytes, dict[str, str]]:
        self.note_leak()
        if part := self.query.get("part"):
            self.hub.parts[oid, int(part)] = self.body
        elif hashlib.sha256(self.body).hexdigest() == oid:
            self.hub.objects[oid] = self.body
        else:
            raise HubError(400, message="content does not match its hash")
        return 200, b"", {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'}

    def lfs_complete(self, oid: str) -> dict[str, Any]:
        content = b"".join(self.hub.parts[oid, part["partNumber"]] for part in self.json()["parts"])
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, message="the parts do not match the hash")
        self.hub.objects[oid] = content
        return {"success": True}

    def lfs_verify(self, repo_id: str) -> dict[str, Any]:
        asked = self.json()
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise HubError(404, message="no such object")
        return {}

    def commit(self, repo_id: str, revision: str) -> dict[str, Any]:
        repository = self.writable(repo_id)
        tree, title = dict(repository.tree(revision)), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise HubError(400, message=f"LFS object {value['oid']} was not uploaded")
                tree[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile":
                del tree[value["path"]]
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
        pull_request = bool(self.query.get("create_pr"))
        oid = repository.commit(f"refs/pr/{number}" if pull_request else revision, tree, title)
        url = f"{self.hub.url}/{repo_id}"
        request = {"pullRequestUrl": f"{url}/discussions/{number}"} if pull_request else {}
        return {"success": True, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}", **request}

    def branch(self, repo_id: str, name: str) -> dict[str, Any]:
        repository = self.writable(repo_id)
        if name in repository.refs:
            raise HubError(409, message=f"Reference already exists: {name}")
        repository.refs[name] = repository.oid(self.json().get("startingPoint", "main"))
        return {}

    def info(self, repo_id: str, revision: str = "main") -> dict[str, Any]:
        repository = self.repository(repo_id)
        siblings = []
        for path, content in repository.tree(revision).items():
            size = repository.claimed_sizes.get(path, len(content))
            siblings.append({"rfilename": path, "size": size, "blobId": git_oid(content)})
            if self.hub.large(path, len(content)):
                siblings[-1]["lfs"] = {"sha256": self.blob_oid(path, content), "size": size, "pointerSize": 134}
        return {
            "id": repo_id,
            "modelId": repo_id,
            "sha": repository.oid(revision),
            "private": repository.private,
            "siblings": siblings,
            "tags": [],
        }

    def refs(self, repo_id: str) -> dict[str, Any]:
        refs = self.repository(repo_id).refs
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
            for name, oid in refs.items()
            if not name.startswith("refs/")
        ]
        return {"branches": branches, "tags": [], "converts": []}

    def resolve(self, repo_id: str, revision: str, path: str) -> tuple[int, bytes, dict[str, str]]:
        repository = self.repository(repo_id)
        commit = repository.oid(revision)
        if path not in repository.commits[commit]:
            raise HubError(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit})
        content = repository.commits[commit][path]
        oid = self.blob_oid(path, content)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
        if not self.hub.large(path, len(content)):
            return self.ranged(content, headers)
        self.hub.objects[oid] = content
        linked = {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        return 302, b"", {**headers, **linked, "Location": f"{self.hub.cdn}/cdn/{oid}"}

    def from_cdn(self, oid: str) -> tuple[int, bytes, dict[str, str]]:
        self.note_leak()
        return self.ranged(self.hub.objects[oid], {"ETag": f'"{oid}"'})

    def ranged(self, content: bytes, headers: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted is None:
            return 200, content, headers
        start = int(wanted[1])
        return 206, content[start:], {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}

    def note_leak(self) -> None:
        if header := self.headers.get("Authorization"):
            self.hub.leaked.append(header)


_ID = r"([^/]+/[^/]+?)"
ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("POST", rf"/api/models/{_ID}/preupload/([^/]+)", Handler.preupload),
    ("POST", rf"/api/models/{_ID}/commit/([^/]+)", Handler.commit),
    ("POST", rf"/api/models/{_ID}/branch/([^/]+)", Handler.branch),
    ("GET", rf"/api/models/{_ID}/refs", Handler.refs),
    ("GET", rf"/api/models/{_ID}/revision/([^/]+)", Handler.info),
    ("GET", rf"/api/models/{_ID}", Handler.info),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/verify", Handler.lfs_verify),
    ("PUT", r"/lfs/(\w+)", Handler.lfs_put),
    ("POST", r"/lfs/(\w+)/complete", Handler.lfs_complete),
    ("GET HEAD", rf"/{_ID}/resolve/([^/]+)/(.+)", Handler.resolve),
    ("GET HEAD", r"/cdn/(\w+)", Handler.from_cdn),
]
