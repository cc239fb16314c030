"""Real documents: fetched from packages, cut to a length, recorded in manifest.json.

    python -m bench.quality texts            # fetch what is missing, compare with the manifest
    python -m bench.quality texts --write    # fetch everything and write the manifest
    python -m bench.quality texts --bundle F.pt   # the tokens alone, for a machine without network

Documents lie in the cache folder, never in the repository.  `split` says what they are for:
defaults are chosen on `choose` and reported on `report`.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MANIFEST = Path(__file__).with_name("manifest.json")
#: Characters of a document: enough for 8,192 tokens of the densest English.
CHARACTERS = 60_000


def cache_folder() -> Path:
    default = Path.home() / ".cache" / "express-vllm"
    return Path(os.environ.get("EXPRESS_VLLM_CACHE") or default).expanduser() / "quality"


@dataclass(frozen=True)
class Source:
    """Where a document comes from: files of a package, joined in order."""

    name: str
    kind: str  # prose, manual, code or reference
    language: str
    package: str  # "debian:NAME", "pypi:NAME"
    files: tuple[str, ...]
    licence: str
    split: str = "report"
    skip: int = 0  # characters to leave out first


SOURCES = (
    Source("anarchism", "prose", "English", "debian:anarchism",
           ("usr/share/doc/anarchism/html/secF3.html", "usr/share/doc/anarchism/html/secF8.html"),
           "GPL-2"),
    Source("jargon", "reference", "English", "debian:jargon",
           ("usr/share/info/jargon.info.gz",), "public domain", skip=60_000),
    Source("fortunes", "prose", "English", "debian:fortunes",
           ("usr/share/games/fortunes/computers",), "BSD-3-clause"),
    Source("perlreguts", "manual", "English", "debian:perl-doc",
           ("usr/share/perl/5.36.0/pod/perlreguts.pod",), "GPL-1+ or Artistic"),
    Source("faq-fr", "manual", "French", "debian:debian-faq-fr",
           ("usr/share/doc/debian/FAQ/debian-faq.fr.txt.gz",), "GPL-2+", skip=8_000),
    Source("reference-es", "manual", "Spanish", "debian:debian-reference-es",
           ("usr/share/debian-reference/debian-reference.es.txt.gz",), "GPL-2+", skip=40_000),
    Source("proc-de", "manual", "German", "debian:manpages-de",
           ("usr/share/man/de/man5/proc.5.gz",), "GPL-2+, translation GPL-3+"),
    Source("wget-pl", "manual", "Polish", "debian:manpages-pl",
           ("usr/share/man/pl/man1/wget.1.gz",), "GFDL-1.3+"),
    Source("proc-ru", "manual", "Russian", "debian:manpages-ru",
           ("usr/share/man/ru/man5/proc.5.gz",), "GPL-2+, translation GPL-3+"),
    Source("fortunes-it", "prose", "Italian", "debian:fortunes-it",
           ("usr/share/games/fortunes/it/italia", "usr/share/games/fortunes/it/definizioni"),
           "public domain"),
    Source("docutils", "code", "Python", "pypi:docutils==0.21.2",
           ("docutils/parsers/rst/states.py",), "public domain"),
    Source("jquery", "code", "JavaScript", "debian:libjs-jquery",
           ("usr/share/javascript/jquery/jquery.js",), "MIT"),
    Source("elf", "code", "C", "debian:libc6-dev", ("usr/include/elf.h",), "LGPL-2.1+"),
    Source("git-manual", "manual", "English", "debian:git-doc",
           ("usr/share/doc/git-doc/user-manual.txt",), "GPL-2"),
    Source("policy", "manual", "English", "debian:debian-policy",
           ("usr/share/doc/debian-policy/policy.txt.gz",), "GPL-2+", skip=20_000),
    Source("exim", "manual", "English", "debian:exim4-doc-html",
           ("usr/share/doc/exim4-doc-html/spec_html/ch-main_configuration.html",), "GPL-2+"),
    Source("perf-event", "manual", "English", "debian:manpages-dev",
           ("usr/share/man/man2/perf_event_open.2.gz",), "GPL-2+"),
    Source("faq-it", "manual", "Italian", "debian:debian-faq-it",
           ("usr/share/doc/debian/FAQ/debian-faq.it.txt.gz",), "GPL-2+", skip=8_000),
    Source("reference-pt", "manual", "Portuguese", "debian:debian-reference-pt",
           ("usr/share/debian-reference/debian-reference.pt.txt.gz",), "GPL-2+", skip=40_000),
    Source("screen-ja", "manual", "Japanese", "debian:manpages-ja",
           ("usr/share/man/ja/man1/screen.1.gz",), "GPL-2+"),
    Source("find-nl", "manual", "Dutch", "debian:manpages-nl",
           ("usr/share/man/nl/man1/find.1.gz",), "GFDL-1.3+, translation GPL-3+"),
    Source("refranes-es", "prose", "Spanish", "debian:fortunes-es",
           ("usr/share/games/fortunes/es/refranes.fortunes",), "GPL-2+"),
    Source("d3", "code", "JavaScript", "debian:libjs-d3",
           ("usr/share/javascript/d3/d3.js",), "BSD-3-clause"),
    Source("eigen", "code", "C++", "debian:libeigen3-dev",
           ("usr/include/eigen3/Eigen/src/Core/products/GeneralBlockPanelKernel.h",), "MPL-2.0"),
    Source("http2", "code", "Go", "debian:golang-golang-x-net-dev",
           ("usr/share/gocode/src/golang.org/x/net/http2/server.go",), "BSD-3-clause"),
    Source("regex", "code", "Rust", "debian:librust-regex-dev",
           ("usr/share/cargo/registry/regex-1.7.1/src/dfa.rs",), "MIT or Apache-2.0"),
    Source("anarchism-h", "prose", "English", "debian:anarchism",
           ("usr/share/doc/anarchism/html/secH4.html", "usr/share/doc/anarchism/html/secC1.html"),
           "GPL-2", split="choose"),
    Source("developers", "manual", "English", "debian:developers-reference",
           ("usr/share/developers-reference/developers-reference.txt.gz",), "GPL-2",
           split="choose", skip=10_000),
    Source("bash-fr", "manual", "French", "debian:manpages-fr",
           ("usr/share/man/fr/man1/bash.1.gz",), "GPL-3+", split="choose"),
    Source("zitate-de", "prose", "German", "debian:fortunes-de",
           ("usr/share/games/fortunes/de/zitate",), "GPL-2+", split="choose"),
    Source("pyparsing", "code", "Python", "pypi:pyparsing==3.2.3", ("pyparsing/core.py",), "MIT",
           split="choose"),
    Source("networkx", "code", "Python", "pypi:networkx==3.4.2",
           ("networkx/classes/graph.py",), "BSD-3-clause", split="choose"),
    Source("bash-reference", "manual", "English", "debian:bash-doc",
           ("usr/share/doc/bash/bashref.html",), "GFDL-1.3+", split="choose", skip=60_000),
    Source("maint-guide", "manual", "English", "debian:maint-guide",
           ("usr/share/doc/maint-guide/maint-guide.en.txt.gz",), "GPL-2+", split="choose",
           skip=10_000),
    Source("packaging-ru", "manual", "Russian", "debian:developers-reference-ru",
           ("usr/share/developers-reference/ru/pkgs.html",), "GPL-2+", split="choose"),
    Source("underscore", "code", "JavaScript", "debian:libjs-underscore",
           ("usr/share/javascript/underscore/underscore.js",), "MIT", split="choose"),
    Source("videodev2", "code", "C", "debian:linux-libc-dev",
           ("usr/include/linux/videodev2.h",), "GPL-2 with syscall note or BSD-3-clause",
           split="choose"),
    Source("ptrace", "manual", "English", "debian:manpages-dev",
           ("usr/share/man/man2/ptrace.2.gz",), "verbatim manual licence", split="choose"),
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A line of the manifest: a source as it was found."""

    name: str
    kind: str
    language: str
    package: str
    version: str
    files: tuple[str, ...]
    licence: str
    split: str
    characters: int
    sha256: str


def manifest() -> list[Entry]:
    return [Entry(**(row | {"files": tuple(row["files"])}))
            for row in json.loads(MANIFEST.read_text())]  # fmt: skip


def text(name: str) -> str:
    path = cache_folder() / "texts" / f"{name}.txt"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `python -m bench.quality texts` first")
    return path.read_text()


def fetch(write: bool, names: Sequence[str] | None = None) -> list[Entry]:
    """Get what is missing (`write`: everything) and check it against the manifest."""
    known = {} if write else {entry.name: entry for entry in manifest()}
    folder = cache_folder() / "texts"
    folder.mkdir(parents=True, exist_ok=True)
    entries, changed = [], []
    with tempfile.TemporaryDirectory() as scratch:
        packages: dict[str, tuple[Path, str]] = {}
        for source in SOURCES:
            if names is not None and source.name not in names:
                continue
            path = folder / f"{source.name}.txt"
            expected = known.get(source.name)
            if expected and path.exists() and _digest(path.read_text()) == expected.sha256:
                entries.append(expected)
                continue
            if source.package not in packages:
                print(f"fetch {source.package} ...", flush=True)
                wanted = expected.version if expected else ""
                packages[source.package] = _fetched(source.package, wanted, Path(scratch))
            root, version = packages[source.package]
            document = "\n".join(_plain(root / file) for file in source.files)
            document = document[source.skip :][:CHARACTERS]
            path.write_text(document)
            entries.append(Entry(
                source.name, source.kind, source.language, source.package, version, source.files,
                source.licence, source.split, len(document), _digest(document),
            ))  # fmt: skip
            if expected and entries[-1].sha256 != expected.sha256:
                changed.append(f"{source.name} ({source.package} {expected.version} -> {version})")
    if write:
        MANIFEST.write_text(json.dumps([asdict(e) for e in entries], indent=2) + "\n")
    elif changed:
        raise RuntimeError(
            "these documents are not those of the manifest, since their packages changed: "
            f"{', '.join(changed)}; `texts --write` accepts the new ones"
        )
    return entries


def _digest(document: str) -> str:
    return hashlib.sha256(document.encode()).hexdigest()


def _fetched(package: str, version: str, scratch: Path) -> tuple[Path, str]:
    """-> (folder with the package's files, version)."""
    origin, _, name = package.partition(":")
    root = scratch / name
    root.mkdir()
    if origin == "pypi":
        pip = ["pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest"]
        subprocess.run([sys.executable, "-m", *pip, str(scratch / "wheels"), name], check=True)
        wheel = next((scratch / "wheels").glob(name.partition("==")[0] + "-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(root)
        return root, wheel.name.split("-")[1]
    get = ["apt-get", "download", "-qq"]
    exact = [*get, f"{name}={version}"]
    done = version and subprocess.run(exact, cwd=scratch, stderr=subprocess.DEVNULL).returncode == 0
    if not done:
        done = subprocess.run([*get, name], cwd=scratch, stderr=subprocess.DEVNULL).returncode == 0
    if not done:
        raise RuntimeError(f"apt-get cannot download {name}: run apt-get update first")
    deb = next(scratch.glob(f"{name}_*.deb"))
    subprocess.run(["dpkg-deb", "-x", str(deb), str(root)], check=True)
    field = ["dpkg-deb", "-f", str(deb), "Version"]
    return root, subprocess.run(field, check=True, capture_output=True, text=True).stdout.strip()


def _plain(path: Path) -> str:
    """A file's text: unpacked, without HTML tags or roff requests."""
    raw = path.read_bytes()
    name = path.name
    if name.endswith(".gz"):
        raw, name = gzip.decompress(raw), name.removesuffix(".gz")
    document = raw.decode("utf-8", errors="replace")
    if name.endswith(".html"):
        return _from_html(document)
    if re.fullmatch(r".*\.[1-8]", name):
        return _from_roff(document)
    return document


def _from_html(document: str) -> str:
    document = re.sub(r"(?is)<(script|style|head)\b.*?</\1>", "", document)
    document = re.sub(r"(?i)<(p|br|h\d|li|div|blockquote)\b[^>]*>", "\n", document)
    document = html.unescape(re.sub(r"<[^>]+>", "", document))
    return re.sub(r"\n\s*\n\s*", "\n\n", document)


def _from_roff(document: str) -> str:
    """Requests that carry text keep it; fonts and special characters go."""
    lines = []
    for line in document.splitlines():
        if line.startswith((".SH", ".SS")):
            line = "\n" + re.sub(r"^\.S[HS]\s*", "", line).strip('"')
        elif line.startswith((".P", ".TP", ".sp", ".IP", ".LP")):
            line = "\n" + re.sub(r"^\.\w+\s*", "", line) if line.startswith(".IP") else ""
        elif line.startswith((".B", ".I", ".R")):
            line = re.sub(r"^\.\w+\s*", "", line).replace('"', "")
        elif line.startswith((".", "'")):
            continue
        lines.append(line)
    document = "\n".join(lines)
    document = re.sub(r"\\f(\[\w*\]|\(..|.)", "", document)
    document = re.sub(r"\\s[+-]?\d", "", document)
    names = {
        "aq": "'",
        "lq": "\u201c",
        "rq": "\u201d",
        "em": "\u2014",
        "bu": "\u2022",
        "co": "\u00a9",
    }
    document = re.sub(r"\\\((..)|\\\[(\w+)\]",
                      lambda m: names.get(m[1] or m[2], ""), document)  # fmt: skip
    document = re.sub(r"\\([-.'` ])", r"\1", document)
    document = re.sub(r"\\[&/,|^%]|\\$", "", document)
    return document.replace("\\e", "\\")


def tokens(
    tokenizer: Any, names: Sequence[str], length: int, bundle: Path | None = None
) -> dict[str, list[int]]:
    """The first `length` token ids of each document, from a `bundle` file if one is given."""
    if bundle is not None:
        import torch

        stored = torch.load(bundle)
        ids = {name: stored["documents"][name].tolist() for name in names}
    else:
        ids = {name: tokenizer(text(name))["input_ids"] for name in names}
    for name, row in ids.items():
        if len(row) < length:
            raise ValueError(f"{name} has {len(row)} tokens, {length} are needed")
    return {name: row[:length] for name, row in ids.items()}


def save_bundle(tokenizer: Any, path: Path, length: int) -> None:
    """All documents' tokens in one file: less than a megabyte."""
    import torch

    documents = {
        entry.name: torch.tensor(ids[:length], dtype=torch.int32)
        for entry in manifest()
        if len(ids := tokenizer(text(entry.name))["input_ids"]) >= 2
    }
    torch.save({"tokenizer": str(tokenizer.name_or_path).rsplit("/", 1)[-1],
                "documents": documents}, path)  # fmt: skip
