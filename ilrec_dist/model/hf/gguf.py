"""GGUF files of the supported families, dequantised once into a folder that is kept."""

from __future__ import annotations

import functools
from pathlib import Path

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import committed_folder, file_lock, sha256_file
from ilrec_dist.model.hf.families import FAMILIES


def dequantised_folder(file: str | Path, cache: str | Path) -> Path:
    """The folder under `cache` with a GGUF file's model and tokenizer, in fp32.

    Its name is the file's name and the beginning of its SHA-256, so that it is made
    once for each content, whoever asks first; others wait. Call it in one process,
    before the workers start: it holds the whole model. No remote code is run and
    nothing is downloaded. UserError when the `gguf` package is missing, the family is
    not supported or the file is damaged.
    """
    file, cache = Path(file), Path(cache)
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected a GGUF file")
    folder = cache / f"{file.stem}-{sha256_file(file)[:16]}"
    if folder.exists():
        return folder
    check_gguf(file)
    cache.mkdir(parents=True, exist_ok=True)
    with file_lock(cache / f".{folder.name}.lock"):
        if not folder.exists():
            with committed_folder(folder) as staged:
                _dequantise(file, staged)
    return folder


def check_gguf(file: Path) -> None:
    """Read what a GGUF file says of itself, once unless it changes; no weights.

    Raises UserError where the `gguf` package is missing, where
    the file has not all its bytes, and for other families.
    """
    status = file.stat()
    _check_as_it_is(file, status.st_size, status.st_mtime_ns)


@functools.cache
def _check_as_it_is(file: Path, size: int, mtime_ns: int) -> None:
    try:
        # Inside the function because the package is optional.
        from gguf import GGUFReader
    except ImportError:
        raise UserError(
            f"{file}: reading GGUF needs the package gguf; install it with pip install "
            "'ilrec-dist[gguf]'"
        ) from None
    try:
        metadata = GGUFReader(file).fields["general.architecture"]
        architecture = metadata.contents()
    except Exception as error:
        # The reader raises errors of many kinds on damaged files.
        raise UserError(
            f"{file}: cannot be read as GGUF ({_first_line(error)}); is it truncated?"
        ) from None
    if architecture not in FAMILIES:
        raise UserError(
            f"{file}: architecture {architecture!r} is not supported; expected one of "
            f"{', '.join(FAMILIES)}"
        )


def _dequantise(file: Path, folder: Path) -> None:
    # Inside the function because transformers takes seconds to load.
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    options = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    try:
        # Without `dequantize` the dense weights come labelled as quantised and cannot be saved.
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, quantization_config=GgufConfig(dequantize=True), **options
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
    except Exception as error:
        # The loader raises errors of many kinds on damaged files.
        raise UserError(f"{file}: cannot be dequantised ({_first_line(error)})") from None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
