"""The Hugging Face Hub on loopback, as far as huggingface_hub speaks to it to publish and load models.

It keeps repositories of branches of commits of files, large files by their SHA-256 beside them, and a list of all
requests. Large files come by Git LFS: huggingface_hub is to be told HF_HUB_DISABLE_XET.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from linearize.hub.metadata import LICENSES

# That tests push to.
REPO = "somebody/linear"
# Smaller files than the Hub's 10 MB are large here, as are all weights.
LARGE = 100_000
FIRST = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
# What a card may say.
RELATIONS = {"adapter", "merge", "quantized", "finetune"}
REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass
class Blob:
    """A file: what it holds, and whether git has only a pointer to it."""

    data: bytes
    large: bool = False

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


@dataclass
class Repository:
    private: bool
    # Revision -> commits, each a dictionary of files.
    revisions: dict[str, list[dict[str, Blob]]] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """What stands in a revision's files."""
        return {path: blob.data for path, blob in self.revisions[revision][-1].items()}

    def find(self, revision: str) -> dict[str, Blob] | None:
        if revision in self.revisions:
            return self.revisions[revision][-1]
        commits = [commit for commits in self.revisions.values() for commit in commits]
        return next((commit for commit in commits if commit_oid(commit) == revision), None)


@dataclass
class Account:
    """Whoever a token belongs to; `writes` are namespaces, or repositories."""

    name: str
    role: str = "write"
    orgs: dict[str, str] = field(default_factory=dict)
    scopes: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class Request:
    method: str
    path: str
    size: int

    @property
    def changes(self) -> bool:
        """Whether anything on the Hub may be another after it."""
        harmless = ("/preupload/", "/api/validate-yaml", "/info/lfs/objects/batch", "/verify")
        return self.method not in ("GET", "HEAD") and not any(part in self.path for part in harmless)


def commit_oid(files: dict[str, Blob]) -> str:
    listing = [f"{path} {blob.oid}" for path, blob in sorted(files.items())]
    return hashlib.sha1("\n".join(listing).encode()).hexdigest()


class Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address) -> None:
        """Whoever talks to it may end at any time."""


class Hub:
    """The server and what it holds; a context manager.

    Attributes:
        accounts: by token.
        before_upload: called with the path of each PUT; where it raises ConnectionError, the connection is dropped.
    """

    def __init__(self):
        self.accounts = {"hf_writes": Account("somebody")}
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.before_upload: Callable[[str], None] = lambda path: None
        self.lock = threading.Lock()
        self.server = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def create(self, name: str, files: dict[str, bytes] | None = None, private: bool = False) -> Repository:
        blobs = {path: Blob(data) for path, data in (FIRST | (files or {})).items()}
        self.repositories[name] = Repository(private, {"main": [blobs]})
        return self.repositories[name]

    def uploads(self) -> list[str]:
        """SHA-256 of the large files that arrived, as often as they did."""
        return [request.path.removeprefix("/lfs/") for request in self.requests if request.method == "PUT"]

    def changing(self) -> list[Request]:
        return [request for request in self.requests if request.changes]


class Refused(Exception):
    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


def card_problems(content: str) -> list[str]:
    """What the Hub finds wrong with a card, by its documented rules for what it checks: licence, base model, data sets
    and model-index."""
    data = yaml.safe_load(content.split("---\n")[1])
    found = []
    names = data.get("license", [])
    found += [f'"license" {name}' for name in ([names] if isinstance(names, str) else names) if name not in LICENSES]
    if not re.fullmatch(r"[a-z0-9.-]+", data.get("license_name", "a")):
        found.append('"license_name"')
    if not re.match(r"https?://|LICENSE(\.md|\.txt)?$", data.get("license_link", "LICENSE")):
        found.append('"license_link"')
    if data.get("base_model_relation", "finetune") not in RELATIONS:
        found.append('"base_model_relation"')
    for name in ("base_model", "datasets"):
        values = data.get(name, [])
        values = [values] if isinstance(values, str) else values
        found += [f'"{name}" {value}' for value in values if not REPOSITORY.fullmatch(value)]
    for model in data.get("model-index", []):
        for result in model["results"]:
            required = [("task", "type"), ("dataset", "type"), ("dataset", "name")]
            found += [f'"model-index" {part}.{key}' for part, key in required if not result.get(part, {}).get(key)]
            found += ['"model-index" metrics' for it in result["metrics"] if not {"type", "value"} <= it.keys()]
    return found


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        body = self.read_body()
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        if self.command == "PUT":
            try:
                self.hub.before_upload(url.path)
            except ConnectionError:
                self.close_connection = True
                return
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, url.path, len(body)))
            try:
                self.route(url.path, body)
            except Refused as refused:
                headers = {"X-Error-Code": refused.code, "X-Error-Message": str(refused)}
                self.reply({"error": str(refused)}, refused.status, headers)

    def route(self, path: str, body: bytes) -> None:
        routes = {
            r"GET /api/whoami-v2": self.whoami,
            r"POST /api/repos/create": self.create,
            r"POST /api/validate-yaml": self.validate,
            r"GET /api/models/([^/]+/[^/]+)/refs": self.refs,
            r"GET /api/models/([^/]+/[^/]+)/auth-check/write": self.may_write,
            r"POST /api/models/([^/]+/[^/]+)/branch/([^/]+)": self.branch,
            r"POST /api/models/([^/]+/[^/]+)/preupload/([^/]+)": self.preupload,
            r"POST /api/models/([^/]+/[^/]+)/commit/([^/]+)": self.commit,
            r"GET /api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?": self.tree,
            r"GET /api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?": self.info,
            r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch": self.batch,
            r"POST /verify": lambda body: self.reply({}),
            r"PUT /lfs/(\w+)": self.upload,
            r"(?:GET|HEAD) /lfs/(\w+)": self.download,
            r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)": self.resolve,
        }
        for pattern, respond in routes.items():
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                respond(*(part and unquote(part) for part in match.groups()), body)
                return
        raise Refused(404, "", f"the server knows no {self.command} {path}")

    # What tokens may do.

    def account(self) -> Account:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.hub.accounts:
            raise Refused(401, "", "Invalid username or password.")
        return self.hub.accounts[token]

    def check_write(self, name: str) -> None:
        account, namespace = self.account(), name.partition("/")[0]
        mine = namespace == account.name or account.orgs.get(namespace) in ("write", "admin")
        if account.role == "fineGrained":
            mine = any("repo.write" in account.scopes.get(scope, []) for scope in (namespace, name))
        if account.role == "read" or not mine:
            raise Refused(403, "", "You don't have the rights to do this")

    def whoami(self, body: bytes) -> None:
        account = self.account()
        token = {"displayName": "a token", "role": account.role}
        if account.role == "fineGrained":
            scopes = account.scopes.items()
            scoped = [{"entity": {"type": "user", "name": name}, "permissions": rights} for name, rights in scopes]
            token["fineGrained"] = {"canReadGatedRepos": True, "global": [], "scoped": scoped}
        orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in account.orgs.items()]
        auth = {"type": "access_token", "accessToken": token}
        self.reply({"type": "user", "name": account.name, "orgs": orgs, "auth": auth})

    def may_write(self, name: str, body: bytes) -> None:
        self.repository(name)
        self.check_write(name)
        self.reply({})

    # Repositories.

    def repository(self, name: str) -> Repository:
        repository = self.hub.repositories.get(name)
        hidden = repository is not None and repository.private and "Authorization" not in self.headers
        if repository is None or hidden:
            raise Refused(401 if hidden else 404, "RepoNotFound", "Repository not found")
        return repository

    def files(self, name: str, revision: str | None) -> dict[str, Blob]:
        files = self.repository(name).find(revision or "main")
        if files is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return files

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization'] or self.account().name}/{asked['name']}"
        if name in self.hub.repositories:
            raise Refused(409, "", "You already created this model repo")
        self.check_write(name)
        self.hub.create(name, private=asked.get("visibility") == "private" or asked.get("private") is True)
        self.reply({"url": f"{self.hub.url}/{name}", "name": name})

    def refs(self, name: str, body: bytes) -> None:
        repository = self.repository(name)
        found = {
            revision: {"name": revision, "ref": revision, "targetCommit": commit_oid(commits[-1])}
            for revision, commits in repository.revisions.items()
        }
        branches = [ref | {"ref": f"refs/heads/{name}"} for name, ref in found.items() if not name.startswith("refs/")]
        requests = [ref for name, ref in found.items() if name.startswith("refs/pr/")]
        tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": "0" * 40} for tag in repository.tags]
        self.reply({"branches": branches, "tags": tags, "converts": [], "pullRequests": requests})

    def branch(self, name: str, branch: str, body: bytes) -> None:
        self.check_write(name)
        repository = self.repository(name)
        if branch in repository.revisions:
            raise Refused(409, "", "Reference already exists")
        repository.revisions[branch] = repository.revisions["main"][-1:]
        self.reply({})

    def info(self, name: str, revision: str | None, body: bytes) -> None:
        files = self.files(name, revision)
        siblings = [
            {"rfilename": path, "size": len(blob.data), "blobId": blob.oid}
            | ({"lfs": {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": 130}} if blob.large else {})
            for path, blob in files.items()
        ]
        private = self.repository(name).private
        self.reply({"_id": "0", "id": name, "sha": commit_oid(files), "private": private, "siblings": siblings})

    def tree(self, name: str, revision: str, folder: str | None, body: bytes) -> None:
        prefix = f"{folder}/" if folder else ""
        found = [
            {"type": "file", "path": path, "size": len(blob.data), "oid": blob.oid}
            for path, blob in self.files(name, revision).items()
            if path.startswith(prefix)
        ]
        if folder and not found:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist")
        self.reply(found)

    # Uploads.

    def validate(self, body: bytes) -> None:
        asked = json.loads(body)
        problems = card_problems(asked["content"]) if asked["repoType"] == "model" else ['"repoType"']
        status = 400 if problems else 200
        if self.headers["Accept"] == "text/plain":
            self.send("\n- ".join(["Invalid metadata in README.md.", *problems]).encode(), status)
        else:
            self.reply({"errors": [{"message": problem} for problem in problems], "warnings": []}, status)

    def preupload(self, name: str, revision: str, body: bytes) -> None:
        there = self.files(name, revision)
        if not self.query.get("create_pr"):
            self.check_write(name)
        answers = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(".safetensors") or file["size"] > LARGE
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if blob := there.get(file["path"]):
                answer["oid"] = blob.sha256 if blob.large else blob.oid
            answers.append(answer)
        self.reply({"files": answers, "commitOid": commit_oid(there)})

    def batch(self, name: str, body: bytes) -> None:
        self.repository(name)
        objects = []
        for item in json.loads(body)["objects"]:
            if item["oid"] not in self.hub.large:
                actions = {"upload": f"{self.hub.url}/lfs/{item['oid']}", "verify": f"{self.hub.url}/verify"}
                item["actions"] = {action: {"href": href} for action, href in actions.items()}
            objects.append(item)
        self.reply({"transfer": "basic", "objects": objects})

    def upload(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "", "the content is another one")
        self.hub.large[oid] = body
        self.reply({})

    def commit(self, name: str, revision: str, body: bytes) -> None:
        repository, files = self.repository(name), dict(self.files(name, revision))
        pull_request = bool(self.query.get("create_pr"))
        if not pull_request:
            self.check_write(name)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = Blob(base64.b64decode(value["content"]))
                case "lfsFile":
                    if value["oid"] not in self.hub.large:
                        raise Refused(400, "", f"LFS object {value['oid']} has not been uploaded")
                    files[value["path"]] = Blob(self.hub.large[value["oid"]], large=True)
                case "deletedFile":
                    del files[value["path"]]
        number = 1 + sum(name.startswith("refs/pr/") for name in repository.revisions)
        target = f"refs/pr/{number}" if pull_request else revision
        repository.revisions.setdefault(target, list(repository.revisions[revision])).append(files)
        oid = commit_oid(files)
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"}
        if pull_request:
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{number}"
        self.reply(answer)

    # Downloads.

    def resolve(self, name: str, revision: str, path: str, body: bytes) -> None:
        files = self.files(name, revision)
        headers = {"X-Repo-Commit": commit_oid(files)}
        if path not in files:
            raise Refused(404, "EntryNotFound", "Entry not found")
        blob = files[path]
        if blob.large:
            headers |= {"X-Linked-Size": str(len(blob.data)), "X-Linked-ETag": f'"{blob.sha256}"'}
            # From another host, as the Hub's large files come.
            headers["Location"] = f"{self.hub.url.replace('127.0.0.1', 'localhost')}/lfs/{blob.sha256}"
            self.send(b"", HTTPStatus.FOUND, headers)
        else:
            self.send(blob.data, headers=headers | {"ETag": f'"{blob.oid}"'})

    def download(self, oid: str, body: bytes) -> None:
        self.send(self.hub.large[oid], headers={"ETag": f'"{oid}"'})

    # HTTP.

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def reply(self, answer: dict | list, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(json.dumps(answer).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


# What tests of publishing share.


def pushed(linearize, *arguments) -> str:
    result = linearize("push", *arguments)
    assert result.code == 0, result.stderr
    return result.stdout.strip()


def local(model: Path) -> dict[str, bytes]:
    """What stands in a model's files, apart from the card."""
    files = {path.relative_to(model).as_posix(): path for path in model.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != "README.md"}
