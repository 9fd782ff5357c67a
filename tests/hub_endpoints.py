"""What the tests' Hub answers at each of its addresses, and to whom."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from urllib.parse import parse_qs, quote, unquote

from hub_http import INVALID_TOKEN, Call, Fault, HubError, Reply, Request, json_reply, part_reply
from hub_repositories import (
    Commit,
    Etags,
    Repository,
    card_problems,
    default_upload_mode,
    etag,
    file_entry,
    folder_entry,
    sha256,
)  # fmt: skip

DATE = "2026-01-01T00:00:00.000Z"


class HubEndpoints:
    """The state of a Hub and the endpoints that read and change it, one call at a time; `HubServer` runs them."""

    def __init__(self, *, etags: Etags = "digest") -> None:
        self.repositories: dict[str, Repository] = {}
        self.tokens = {"hf_good": "someone"}
        self.organisations: dict[str, set[str]] = {}
        self.upload_mode: Callable[[str, int], str] = default_upload_mode
        self.blobs: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.etags: Etags = etags
        self.page_size = 1000
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.waits: list[float] = []
        self.errors: list[str] = []
        self.stopping = threading.Event()
        self.hanging: set[Any] = set()
        self.lock = threading.RLock()
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def route(self, method: str, path: str) -> tuple[str, Callable[[Call], Reply]]:
        """The endpoint's name, and what answers there."""
        for methods, pattern, endpoint, function in ROUTES:
            if method in methods.split("|") and (match := re.fullmatch(pattern, path)):
                parts = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                return endpoint, partial(function, self, **parts)

        def unknown(call: Call) -> Reply:
            raise HubError(404, f"no such address: {method} {path}")

        return "unknown", unknown

    def mode(self, path: str, size: int) -> str:
        return self.upload_mode(path, size) if size else "regular"

    # Who may do what

    def _user(self, call: Call) -> str | None:
        if call.token and call.token not in self.tokens:
            raise HubError(401, INVALID_TOKEN)
        return self.tokens.get(call.token)

    def _owns(self, user: str | None, namespace: str) -> bool:
        return user is not None and (user == namespace or user in self.organisations.get(namespace, ()))

    def _readable(self, call: Call, repo_id: str) -> Repository:
        user = self._user(call)
        repository = self.repositories.get(repo_id)
        if repository is None or (repository.private and not self._owns(user, repo_id.split("/")[0])):
            raise HubError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repository

    def _writable(self, call: Call, repo_id: str) -> Repository:
        """With `create_pr`, anybody with a token may propose a change."""
        if self._user(call) is None:
            # At a repository's addresses the client takes an https 401 for a missing repository, but not an http one.
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        repository = self._readable(call, repo_id)
        if not call.flag("create_pr"):
            self._check_owner(call, repo_id.split("/")[0])
        return repository

    def _check_owner(self, call: Call, namespace: str) -> None:
        user = self._user(call)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if not self._owns(user, namespace):
            raise HubError(403, f'You don\'t have the rights to write under the namespace "{namespace}"')

    def _head(self, repository: Repository, revision: str) -> Commit:
        commit = repository.head(revision)
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # Repositories

    def whoami(self, call: Call) -> Reply:
        user = self._user(call)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        organisations = [name for name, members in self.organisations.items() if user in members]
        token = {"accessToken": {"displayName": "test", "role": "write"}}
        return json_reply({
            "type": "user", "id": user, "name": user, "fullname": user, "orgs": [{"name": o} for o in organisations],
            "auth": {"type": "access_token", **token},
        })  # fmt: skip

    def create_repo(self, call: Call) -> Reply:
        request = call.json()
        namespace = request.get("organization") or self._user(call) or ""
        self._check_owner(call, namespace)
        repo_id = f"{namespace}/{request['name']}"
        reply: dict[str, Any] = {"url": f"{self.url}/{repo_id}", "name": repo_id}
        if repo_id in self.repositories:
            return json_reply({**reply, "error": "You already created this model repo"}, 409)
        self.repositories[repo_id] = Repository(repo_id, private=request.get("visibility") == "private")
        return json_reply(reply)

    def delete_repo(self, call: Call) -> Reply:
        request = call.json()
        repo_id = f"{request.get('organization') or self._user(call)}/{request['name']}"
        self._writable(call, repo_id)
        del self.repositories[repo_id]
        return Reply()

    def repo_info(self, call: Call, repo_id: str, revision: str = "main") -> Reply:
        repository = self._readable(call, repo_id)
        head = self._head(repository, revision)
        siblings: list[dict[str, Any]] = []
        for path in sorted(head.files):
            entry = file_entry(head, path, self.etags)
            details = {"size": entry["size"], "blobId": entry["oid"]}
            if lfs := entry.get("lfs"):
                details["lfs"] = {"size": lfs["size"], "sha256": lfs["oid"], "pointerSize": lfs["pointerSize"]}
            siblings.append({"rfilename": path, **(details if call.flag("blobs") else {})})
        return json_reply({
            "_id": repo_id, "id": repo_id, "modelId": repo_id, "author": repo_id.split("/")[0], "sha": head.oid,
            "private": repository.private, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0,
            "createdAt": DATE, "lastModified": DATE,
        })  # fmt: skip

    def refs(self, call: Call, repo_id: str) -> Reply:
        repository = self._readable(call, repo_id)

        def listed(refs: Mapping[str, str], prefix: str) -> list[dict[str, str]]:
            return [{"name": name, "ref": prefix + name, "targetCommit": oid} for name, oid in refs.items()]

        proposals = listed(repository.pull_requests, "") if call.flag("include_prs") else []
        return json_reply({
            "branches": listed(repository.branches, "refs/heads/"), "tags": listed(repository.tags, "refs/tags/"),
            "converts": [], "pullRequests": proposals,
        })  # fmt: skip

    def create_branch(self, call: Call, repo_id: str, branch: str) -> Reply:
        repository = self._writable(call, repo_id)
        if branch.startswith("refs/"):
            raise HubError(400, f"Invalid reference for a branch: {branch}")
        if branch in repository.branches:
            raise HubError(409, f"Reference already exists: refs/heads/{branch}")
        repository.branches[branch] = self._head(repository, call.json().get("startingPoint") or "main").oid
        return Reply()

    def delete_branch(self, call: Call, repo_id: str, branch: str) -> Reply:
        repository = self._writable(call, repo_id)
        if branch == "main":
            raise HubError(403, "Cannot delete the default branch")
        if branch not in repository.branches:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        del repository.branches[branch]
        return Reply()

    def create_tag(self, call: Call, repo_id: str, revision: str) -> Reply:
        repository = self._writable(call, repo_id)
        tag = call.json()["tag"]
        if tag in repository.tags:
            raise HubError(409, f"Tag {tag} already exists")
        repository.tags[tag] = self._head(repository, revision).oid
        return Reply()

    def commits(self, call: Call, repo_id: str, revision: str) -> Reply:
        repository = self._readable(call, repo_id)
        history = repository.history(self._head(repository, revision))
        return json_reply([
            {"id": c.oid, "title": c.message.split("\n")[0], "message": c.message.partition("\n")[2].strip(),
             "authors": [{"user": "someone"}], "date": DATE}
            for c in history
        ])  # fmt: skip

    # Files

    def tree(self, call: Call, repo_id: str, revision: str, folder: str = "") -> Reply:
        head = self._head(self._readable(call, repo_id), revision)
        prefix = f"{folder.strip('/')}/" if folder else ""
        entries = [folder_entry(path) for path in head.folders()]
        entries += [file_entry(head, path, self.etags) for path in head.files]
        entries = sorted((e for e in entries if e["path"].startswith(prefix)), key=lambda e: e["path"])
        if folder and not entries:
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        if not call.flag("recursive"):
            entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(prefix)]
        start = int(call.query.get("cursor", ["0"])[0])
        end = start + self.page_size
        reply = json_reply(entries[start:end])
        if end < len(entries):
            at = "/".join(quote(part, safe="") for part in (revision, *folder.split("/")) if part)
            recursive = str(call.flag("recursive")).lower()
            following = f"{self.url}/api/models/{repo_id}/tree/{at}?recursive={recursive}&cursor={end}"
            reply.headers["Link"] = f'<{following}>; rel="next"'
        return reply

    def paths_info(self, call: Call, repo_id: str, revision: str) -> Reply:
        head = self._head(self._readable(call, repo_id), revision)
        paths = parse_qs(call.body.decode()).get("paths", [])
        folders = set(head.folders())
        found = [file_entry(head, path, self.etags) for path in paths if path in head.files]
        return json_reply(found + [folder_entry(path) for path in paths if path in folders])

    def file(self, call: Call, repo_id: str, revision: str, path: str) -> Reply:
        """An LFS file too is served at once: after a redirect to the same host the client would miss its headers."""
        head = self._head(self._readable(call, repo_id), revision)
        headers = {"X-Repo-Commit": head.oid}
        if path not in head.files:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        content = head.files[path]
        headers |= {"ETag": f'"{etag(head, path, self.etags)}"', "Accept-Ranges": "bytes"}
        if path in head.lfs:
            headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(content))}
        return part_reply(content, headers, call.headers.get("Range", ""))

    # Uploads

    def validate_yaml(self, call: Call) -> Reply:
        self._user(call)
        errors, warnings = card_problems(call.json()["content"])
        reply: dict[str, Any] = {"errors": [{"message": text} for text in errors]}
        reply["warnings"] = [{"message": text} for text in warnings]
        return json_reply({**reply, "error": "\n".join(errors)}, 400) if errors else json_reply(reply)

    def preupload(self, call: Call, repo_id: str, revision: str) -> Reply:
        head = self._head(self._writable(call, repo_id), revision)
        return json_reply({
            "files": [
                {"path": file["path"], "uploadMode": self.mode(file["path"], file["size"]), "shouldIgnore": False,
                 "oid": head.digest(file["path"]) if file["path"] in head.files else None}
                for file in call.json()["files"]
            ],
            "commitOid": head.oid,
        })  # fmt: skip

    def lfs_batch(self, call: Call, repo_id: str) -> Reply:
        if not self._user(call):
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        self._readable(call, repo_id)
        objects: list[dict[str, Any]] = []
        for wanted in call.json()["objects"]:
            oid = wanted["oid"]
            entry: dict[str, Any] = {"oid": oid, "size": wanted["size"]}
            if oid not in self.blobs:
                verify = {"href": f"{self.url}/{repo_id}.git/info/lfs/objects/verify"}
                entry["actions"] = {"upload": {"href": f"{self.url}/lfs/{oid}"}, "verify": verify}
            objects.append(entry)
        return json_reply({"transfer": "basic", "objects": objects})

    def lfs_put(self, call: Call, oid: str) -> Reply:
        """No token is needed: the address is the permission, as with the storage that the Hub sends clients to."""
        self.uploads.append(oid)
        if sha256(call.body) != oid:
            raise HubError(400, f"the bytes do not have the SHA-256 {oid}")
        self.blobs[oid] = call.body
        return Reply()

    def lfs_verify(self, call: Call, repo_id: str) -> Reply:
        self._readable(call, repo_id)
        announced = call.json()
        if len(self.blobs.get(announced["oid"], b"")) != announced["size"]:
            raise HubError(404, f"no object {announced['oid']} of {announced['size']} bytes")
        return Reply()

    def xet_token(self, call: Call, repo_id: str, revision: str) -> Reply:
        self._head(self._writable(call, repo_id), revision)
        raise HubError(404, "This Hub has no Xet storage")

    def commit_request(self, call: Call, repo_id: str, revision: str) -> Reply:
        repository = self._writable(call, repo_id)
        head = self._head(repository, revision)
        items = [(item["key"], item["value"]) for item in map(json.loads, call.body.splitlines())]
        header = next(value for key, value in items if key == "header")
        parent = header.get("parentCommit")
        if parent is not None and not head.oid.startswith(parent):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        if revision not in {**repository.branches, **repository.pull_requests}:
            raise HubError(400, f"{revision} is not a branch")
        files, lfs = self._applied(head, items)
        message = f"{header['summary']}\n{header.get('description', '')}".strip()
        commit = repository.add_commit(head.oid, message, files, lfs)
        reply = {"success": True, "commitOid": commit.oid, "commitUrl": f"{self.url}/{repo_id}/commit/{commit.oid}"}
        if call.flag("create_pr"):
            reference = repository.open_pull_request(commit.oid)
            reply["pullRequestUrl"] = f"{self.url}/{repo_id}/discussions/{reference.split('/')[-1]}"
        else:
            repository.move(revision, commit.oid)
        return json_reply(reply)

    def _applied(self, head: Commit, items: list[tuple[str, Any]]) -> tuple[dict[str, bytes], frozenset[str]]:
        """The files after a commit's operations, and those that are LFS."""
        files, lfs = dict(head.files), set(head.lfs)
        for key, value in items:
            path = value.get("path", "")
            if key == "file":
                files[path] = base64.b64decode(value["content"])
                lfs.discard(path)
                if path == "README.md" and (errors := card_problems(files[path].decode())[0]):
                    raise HubError(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
            elif key == "lfsFile":
                if value["oid"] not in self.blobs:
                    raise HubError(400, f"LFS pointer of {path} points to an object that was not uploaded")
                files[path] = self.blobs[value["oid"]]
                lfs.add(path)
            elif key in ("deletedFile", "deletedFolder"):
                gone = [
                    p for p in files if p == path or (key == "deletedFolder" and p.startswith(f"{path.rstrip('/')}/"))
                ]
                if not gone:
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                for name in gone:
                    del files[name]
                lfs -= set(gone)
            elif key != "header":
                raise HubError(400, f"unknown operation {key}")
        return files, frozenset(lfs)

    # Pull requests

    def discussions(self, call: Call, repo_id: str, number: str = "") -> Reply:
        repository = self._readable(call, repo_id)
        if call.body:
            if not self._user(call):
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            reference = repository.open_pull_request(repository.branches["main"])
            return json_reply({"num": int(reference.split("/")[-1])})
        known = [self._discussion(repo_id, reference) for reference in repository.pull_requests]
        if not number:
            return json_reply({"discussions": known, "count": len(known), "start": 0})
        found = next((entry for entry in known if entry["num"] == int(number)), None)
        if found is None:
            raise HubError(404, f"no discussion {number}", "EntryNotFound")
        changes = {"base": "refs/heads/main", "mergeCommitId": None}
        return json_reply({**found, "events": [], "filesWithConflicts": [], "changes": changes})

    def _discussion(self, repo_id: str, reference: str) -> dict[str, Any]:
        repository = self.repositories[repo_id]
        title = repository.commits[repository.pull_requests[reference]].message.split("\n")[0]
        return {
            "num": int(reference.split("/")[-1]), "title": title, "author": {"name": "someone"}, "createdAt": DATE,
            "status": "open", "isPullRequest": True, "repo": {"name": repo_id, "type": "model"},
        }  # fmt: skip


_ID = r"(?P<repo_id>[^/]+/[^/]+)"
_API = f"/api/models/{_ID}"
# Addresses are matched as they are sent and their parts unquoted after: a revision may hold a quoted slash.
ROUTES: list[tuple[str, str, str, Callable[..., Reply]]] = [
    ("GET", "/api/whoami-v2", "whoami", HubEndpoints.whoami),
    ("POST", "/api/repos/create", "create_repo", HubEndpoints.create_repo),
    ("DELETE", "/api/repos/delete", "delete_repo", HubEndpoints.delete_repo),
    ("POST", "/api/validate-yaml", "validate_yaml", HubEndpoints.validate_yaml),
    ("GET", _API, "repo_info", HubEndpoints.repo_info),
    ("GET", f"{_API}/revision/(?P<revision>[^/]+)", "repo_info", HubEndpoints.repo_info),
    ("GET", f"{_API}/refs", "refs", HubEndpoints.refs),
    ("GET", f"{_API}/commits/(?P<revision>[^/]+)", "commits", HubEndpoints.commits),
    ("GET", f"{_API}/tree/(?P<revision>[^/]+)(/(?P<folder>.*))?", "tree", HubEndpoints.tree),
    ("GET", f"{_API}/xet-write-token/(?P<revision>[^/]+)", "xet_token", HubEndpoints.xet_token),
    ("POST", f"{_API}/paths-info/(?P<revision>[^/]+)", "paths_info", HubEndpoints.paths_info),
    ("POST", f"{_API}/preupload/(?P<revision>[^/]+)", "preupload", HubEndpoints.preupload),
    ("POST", f"{_API}/commit/(?P<revision>[^/]+)", "commit", HubEndpoints.commit_request),
    ("POST", f"{_API}/branch/(?P<branch>[^/]+)", "create_branch", HubEndpoints.create_branch),
    ("DELETE", f"{_API}/branch/(?P<branch>[^/]+)", "delete_branch", HubEndpoints.delete_branch),
    ("POST", f"{_API}/tag/(?P<revision>[^/]+)", "create_tag", HubEndpoints.create_tag),
    ("GET|POST", f"{_API}/discussions(/(?P<number>[0-9]+))?", "discussions", HubEndpoints.discussions),
    ("POST", f"/{_ID}[.]git/info/lfs/objects/batch", "lfs_batch", HubEndpoints.lfs_batch),
    ("POST", f"/{_ID}[.]git/info/lfs/objects/verify", "lfs_verify", HubEndpoints.lfs_verify),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put", HubEndpoints.lfs_put),
    ("HEAD", f"/{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "head_file", HubEndpoints.file),
    ("GET", f"/{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "get_file", HubEndpoints.file),
]
