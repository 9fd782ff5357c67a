"""What the Hub of the tests holds: repositories with commits, branches, tags and pull requests; and its check of a card."""

from __future__ import annotations

import binascii
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

Etags = Literal["digest", "opaque"]
"""`opaque`: a mirror, whose ETags and listings say nothing about a file's content."""

INITIAL_FILES = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
_REPOSITORY_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FRONT_MATTER = re.compile(r"\s*---[\r\n]+(.*?)[\r\n]+---(?:\r\n|\n|\Z)", re.DOTALL)


def default_upload_mode(path: str, size: int) -> Literal["lfs", "regular"]:
    return "lfs" if path.endswith((".safetensors", ".png")) or size > 10_000_000 else "regular"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_blob_sha1(content: bytes) -> str:
    """The name git gives a file's content, and the ETag of a file that is not LFS."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_pointer(content: bytes) -> bytes:
    """What git itself holds of an LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(content)}\nsize {len(content)}\n".encode()


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    message: str
    files: Mapping[str, bytes]
    """Every file of the repository at this commit, LFS files by their content too."""
    lfs: frozenset[str] = frozenset()
    """The paths stored as LFS."""

    def digest(self, path: str) -> str:
        """The Hub's digest of a file: SHA-256 if it is LFS, else git's SHA-1."""
        return sha256(self.files[path]) if path in self.lfs else git_blob_sha1(self.files[path])

    def folders(self) -> list[str]:
        parts = (path.split("/")[:-1] for path in self.files)
        return sorted({"/".join(names[: depth + 1]) for names in parts for depth in range(len(names))})


@dataclass
class Repository:
    """One model repository; a new one has `main` at a commit that holds only `.gitattributes`."""

    repo_id: str
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[str, str] = field(default_factory=dict)
    """`refs/pr/N` -> head."""
    commits: dict[str, Commit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.branches:
            self.branches["main"] = self.add_commit(None, "initial commit", INITIAL_FILES, frozenset()).oid

    def add_commit(self, parent: str | None, message: str, files: Mapping[str, bytes], lfs: frozenset[str]) -> Commit:
        """A commit that no ref points to yet; as in git, its oid says what it holds."""
        contents = sorted((path, sha256(content), path in lfs) for path, content in files.items())
        oid = hashlib.sha1(repr((self.repo_id, parent, message, len(self.commits), contents)).encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, message, dict(files), lfs)
        return self.commits[oid]

    def head(self, revision: str) -> Commit | None:
        """The commit of a branch, a tag, `refs/pr/N` or an oid (of at least 7 digits); None if there is none."""
        for refs in (self.branches, self.tags, self.pull_requests):
            if revision in refs:
                return self.commits[refs[revision]]
        if re.fullmatch("[0-9a-f]{7,40}", revision):
            return next((commit for oid, commit in self.commits.items() if oid.startswith(revision)), None)
        return None

    def move(self, revision: str, oid: str) -> None:
        (self.branches if revision in self.branches else self.pull_requests)[revision] = oid

    def open_pull_request(self, oid: str) -> str:
        reference = f"refs/pr/{len(self.pull_requests) + 1}"
        self.pull_requests[reference] = oid
        return reference

    def history(self, commit: Commit) -> Iterator[Commit]:
        """From `commit` back to the first."""
        oid: str | None = commit.oid
        while oid is not None:
            yield self.commits[oid]
            oid = self.commits[oid].parent

    def description(self) -> dict[str, Any]:
        """Everything, contents by their digest; equal descriptions mean equal repositories."""
        return {
            "private": self.private,
            "branches": dict(self.branches),
            "tags": dict(self.tags),
            "pull_requests": dict(self.pull_requests),
            "commits": {
                oid: (commit.parent, commit.message, {path: commit.digest(path) for path in sorted(commit.files)})
                for oid, commit in self.commits.items()
            },
        }


def etag(commit: Commit, path: str, etags: Etags) -> str:
    if etags == "digest":
        return commit.digest(path)
    return f"{binascii.crc32(commit.files[path]):08x}-mirror"


def file_entry(commit: Commit, path: str, etags: Etags) -> dict[str, Any]:
    """A file in a listing."""
    content = commit.files[path]
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content)}
    if etags == "opaque":
        return {**entry, "oid": etag(commit, path, etags)}
    if path not in commit.lfs:
        return {**entry, "oid": git_blob_sha1(content)}
    pointer = lfs_pointer(content)
    lfs = {"oid": sha256(content), "size": len(content), "pointerSize": len(pointer)}
    return {**entry, "oid": git_blob_sha1(pointer), "lfs": lfs}


def folder_entry(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "size": 0, "oid": git_blob_sha1(path.encode())}


class _StrictLoader(yaml.SafeLoader):
    """PyYAML takes the last of two equal keys; the Hub's parser refuses them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # pyright: ignore[reportUnknownMemberType]
        if duplicate := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(
                None, None, f"duplicated mapping key {duplicate!r}", node.start_mark
            )
        return super().construct_mapping(node, deep)


def card_problems(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings in a README's metadata: the part of the Hub's check that generated cards can break."""
    block = _FRONT_MATTER.match(content)
    if block is None or not block.group(1).strip():
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        metadata = yaml.load(block.group(1), _StrictLoader)
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {error}"], []
    if not isinstance(metadata, dict):
        return ["YAML Metadata Error: must be a mapping of keys to values"], []
    return [*_field_errors(metadata), *_model_index_errors(metadata.get("model-index"))], []


def _field_errors(metadata: dict[Any, Any]) -> Iterator[str]:
    for key in ("library_name", "pipeline_tag", "license_name", "license_link"):
        if not isinstance(metadata.get(key, ""), str):
            yield f'"{key}" must be a string'
    for key in ("tags", "license", "datasets", "base_model", "language", "metrics"):
        value = metadata.get(key, [])
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str) for item in values):
            yield f'"{key}" must be a string or a list of strings'
        elif key == "tags" and not isinstance(value, list):
            yield '"tags" must be an array'
        elif key in ("datasets", "base_model"):
            for item in values:
                if not _REPOSITORY_ID.fullmatch(item):
                    yield f'"{key}" with value "{item}" is not valid. Use an id from the Hub.'


def _model_index_errors(index: Any) -> Iterator[str]:
    if index is None:
        return
    for where, entry in _items(index, "model-index"):
        if isinstance(entry, str):
            yield entry
            continue
        yield from _missing(entry, where, "name")
        for of_result, result in _items(entry.get("results"), f"{where}.results"):
            if isinstance(result, str):
                yield result
                continue
            yield from _missing(result.get("task"), f"{of_result}.task", "type")
            yield from _missing(result.get("dataset"), f"{of_result}.dataset", "name", "type")
            for of_metric, metric in _items(result.get("metrics"), f"{of_result}.metrics"):
                if isinstance(metric, str):
                    yield metric
                else:
                    yield from _missing(metric, of_metric, "type", "value")


def _items(value: Any, where: str) -> Iterator[tuple[str, dict[Any, Any] | str]]:
    """The mappings of a list with their paths; an error text in the place of what is not one."""
    if not isinstance(value, list):
        yield where, f'"{where}" must be an array'
        return
    for i, item in enumerate(value):
        path = f"{where}[{i}]"
        yield path, item if isinstance(item, dict) else f'"{path}" must be an object'


def _missing(value: Any, where: str, *keys: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f'"{where}" is required'
        return
    for key in keys:
        if value.get(key) is None:
            yield f'"{where}.{key}" is required'
        elif key != "value" and not isinstance(value[key], str):
            yield f'"{where}.{key}" must be a string'
