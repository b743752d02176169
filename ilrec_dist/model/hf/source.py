"""Where a pretrained model lies: a folder or a GGUF file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import read_json_object
from ilrec_dist.common.manifest import cached_sha256, hash_files
from ilrec_dist.model.hf.gguf import check_gguf, dequantised_folder
from ilrec_dist.model.hf.tensor_files import INDEX_FILE, SINGLE_FILE, TensorReader

# Files that decide what the tokenizer does, where the folder has them.
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)

# Of files that the hub keeps apart from git; small files have a SHA-1.
SHA256 = r"[0-9a-f]{64}"
# One of these a tokenizer has.
VOCABULARIES = {"tokenizer.json", "tokenizer.model", "vocab.json"}


def is_gguf(source: str | Path) -> bool:
    return Path(source).suffix == ".gguf"


def vocabulary_files(source: str) -> list[Path]:
    """The files that decide the model's tokenizer and its sizes.

    Raises UserError where the source is no local model.
    """
    path = _existing(source)
    if is_gguf(path):
        check_gguf(path)
        return [path]
    present = [name for name in TOKENIZER_FILES if (path / name).is_file()]
    if not VOCABULARIES & set(present):
        raise UserError(
            f"{path}: has no tokenizer; expected one of {', '.join(sorted(VOCABULARIES))}"
        )
    return [path / "config.json", *(path / name for name in present)]


def weight_files(source: str) -> list[Path]:
    """The files that decide the model's weights.

    Raises UserError where the source is no local model with safetensors, where a file
    has not all the bytes that its header or the index tell of, and where it is not what
    was downloaded from the Hugging Face hub.
    """
    path = _existing(source)
    if is_gguf(path):
        check_gguf(path)
        _check_downloaded(path.parent, [path.name])
        return [path]
    files = [path / "config.json"]
    if not (path / INDEX_FILE).exists():
        files.append(path / SINGLE_FILE)
    else:
        files.append(path / INDEX_FILE)
        weight_map = read_json_object(path / INDEX_FILE).get("weight_map")
        names = weight_map.values() if isinstance(weight_map, dict) else ()
        files += [path / name for name in sorted({str(name) for name in names})]
    for file in files:
        if not file.is_file():
            raise UserError(
                f"{file}: no such file; backbone.from needs the safetensors of a Hugging Face model"
            )
    # It compares each file's size with the header, and the tensors with the index.
    TensorReader(path)
    _check_downloaded(path, [file.name for file in files if file.suffix == ".safetensors"])
    return files


def _check_downloaded(folder: Path, names: Sequence[str]) -> None:
    """Compare files with the SHA-256 that the hub gave with them, where one is known.

    Their hashes decide what is trained again, so that they are computed anyway.
    """
    expected = {name: sha256 for name in names if (sha256 := _hub_sha256(folder / name))}
    actual = hash_files(folder, expected)
    for name, sha256 in expected.items():
        if actual[name] != sha256:
            raise UserError(
                f"{folder / name}: damaged (its SHA-256 is not the one that the Hugging Face hub "
                "gave with it); download it again"
            )


def _hub_sha256(file: Path) -> str | None:
    """The SHA-256 of a file on the hub, as the download has noted it.

    In the hub's cache it is the name of the blob that the file is a link to. With
    `--local-dir` it is the second line of a file that has the time of the download in
    the third: what was written later is no longer what was downloaded.
    """
    blob = file.resolve()
    if blob.parent.name == "blobs" and re.fullmatch(SHA256, blob.name):
        return blob.name
    note = file.parent / ".cache/huggingface/download" / f"{file.name}.metadata"
    try:
        _, etag, seconds, *_ = note.read_text(encoding="utf-8").split("\n")
        is_older = file.stat().st_mtime - 1 <= float(seconds)
    except (OSError, ValueError):
        return None
    return etag if is_older and re.fullmatch(SHA256, etag) else None


def weights_sha256(folder: str | Path) -> str:
    """A SHA-256 over those of the folder's
    safetensors files, in the order of their names.
    """
    files = [path for path in weight_files(str(folder)) if path.suffix == ".safetensors"]
    digests = [cached_sha256(path) for path in files]
    return (
        digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    )


def model_folder(source: str, cache: Path) -> Path:
    """The model's folder as an absolute path; a
    GGUF file is dequantised into `cache` once.

    To be called in one process, before the workers start.
    """
    path = _existing(source)
    return (dequantised_folder(path, cache) if is_gguf(path) else path).resolve()


def _existing(source: str) -> Path:
    path = Path(source)
    if not path.exists():
        raise UserError(
            f"backbone.from: {source!r} is no local folder or file; name the folder of a Hugging "
            "Face model, a GGUF file, or OWNER/NAME of a model on the hub"
        )
    if path.is_file() and not is_gguf(path):
        raise UserError(f"backbone.from: {source!r} is no GGUF file and no folder of a model")
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(
            f"{path / 'config.json'}: no such file; backbone.from needs the folder of a Hugging "
            "Face model"
        )
    return path
