"""How long does an index take, and how small and fast is its trie?

python benchmarks/index.py [--quick] [--json FILE] [--items 1000000] [--trie 10000000]
                           [--texts 1048576]

Texts: TF-IDF + SVD that was fitted on 50,000 drawn texts turns `--texts` such texts
into vectors, in one process and then in one a core, their start included; both give the
same bits. Build: item vectors (64 wide, drawn as sums of code vectors and noise, mapped
from a file as those of the CF model are) become 4 × 256 codes by residual quantisation,
collisions are repaired, and catalogue, report and index.json are written: all that
`ilrec index build` does with CF vectors. Trie: random tuples of 4 × 256 codes; bytes of
the trie's own arrays, and the next-token candidates (CSR) of 20,000 random prefixes at
each depth, the median of 9 calls. Each part runs in a process of its own, for its peak
of memory (without mapped files).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from harness import (
    PeakMemory,
    command_line,
    describe_machine,
    in_own_process,
    largest_child_mib,
    machine_line,
    write_figures,
)

from ilrec_dist.common.files import map_array
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.items.build import build_catalogue
from ilrec_dist.items.catalogue import make_catalogue
from ilrec_dist.items.config import ItemsConfig
from ilrec_dist.items.spread import Spread, processes
from ilrec_dist.items.text_embeddings import embed_documents
from ilrec_dist.items.tfidf import TfidfSpace
from ilrec_dist.items.trie import Trie

# Distinct words of the drawn texts, their words, and the texts that are fitted on.
WORDS, WORDS_OF_A_TEXT, FITTED_TEXTS = 60_000, (6, 16), 50_000
# Rows that are Python's numbers at a time.
DRAWN_AT_ONCE = 1 << 16
WIDTH, LEVELS, CODES, PREFIXES, CALLS = 64, 4, 256, 20_000, 9


def draw_vectors(items: int, seed: int = 0) -> np.ndarray:
    """float32 [items, WIDTH]: three levels of clusters of falling spread, the first
    unevenly filled, and noise.
    """
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((items, WIDTH), dtype=np.float32)
    vectors *= 0.3
    popularity = 1 / np.arange(1, CODES + 1) ** 0.5
    for spread, weights in ((1.0, popularity / popularity.sum()), (0.7, None), (0.5, None)):
        centres = spread * rng.standard_normal((CODES, WIDTH), dtype=np.float32)
        vectors += centres[rng.choice(CODES, items, p=weights)]
    return vectors


def draw_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of words whose frequency falls with their rank."""
    rng = np.random.default_rng(seed)
    frequency = 1 / np.arange(1, WORDS + 1) ** 0.9
    low, high = WORDS_OF_A_TEXT
    drawn = rng.choice(WORDS, (count, high), p=frequency / frequency.sum())
    stops = rng.integers(low, high + 1, count)
    return [
        " ".join(f"word{word}" for word in row[:stop])
        for first in range(0, count, DRAWN_AT_ONCE)
        for row, stop in zip(
            drawn[first : first + DRAWN_AT_ONCE].tolist(),
            stops[first : first + DRAWN_AT_ONCE],
            strict=True,
        )
    ]


def measure_texts(count: int, threads: int) -> dict[str, Any]:
    texts = draw_texts(count)
    started = time.perf_counter()
    space = TfidfSpace(texts[:FITTED_TEXTS], WIDTH, 0)
    space.fitted = None
    figures: dict[str, Any] = {
        "texts": count,
        "processes": threads,
        "fit_seconds": time.perf_counter() - started,
    }
    alone, together = (np.empty((count, space.dim), np.float32) for _ in range(2))
    started, cpu = time.perf_counter(), time.process_time()
    embed_documents(space.embed, texts, alone)
    figures["one_process_seconds"] = time.perf_counter() - started
    figures["one_process_cpu_seconds"] = time.process_time() - cpu
    with PeakMemory(largest_child_mib) as peak:
        started, cpu = time.perf_counter(), time.process_time()
        spread = Spread(partial(processes, count=threads))
        embed_documents(space.embed, texts, together, spread)
        figures["seconds"] = time.perf_counter() - started
        # Of this process, which hands the texts out and takes the vectors.
        figures["command_cpu_seconds"] = time.process_time() - cpu
    assert np.array_equal(together.view(np.uint32), alone.view(np.uint32))
    figures["speedup"] = figures["one_process_seconds"] / figures["seconds"]
    return figures | {"process_mib": peak.mib}


def measure_build(items: int) -> dict[str, Any]:
    dataset = InteractionDataset(
        np.arange(3, dtype=np.int32), np.array([0, 3]), ["u"], [str(item) for item in range(items)]
    )
    config = ItemsConfig(embedding="cf", levels=LEVELS, codes_per_level=CODES, collisions="resolve")
    with tempfile.TemporaryDirectory() as temporary:
        np.save(Path(temporary) / "vectors.npy", draw_vectors(items))
        vectors = map_array(Path(temporary) / "vectors.npy")
        started = time.perf_counter()
        with PeakMemory() as peak:
            report = build_catalogue(config, dataset, Path(temporary) / "items", vectors)
        seconds = time.perf_counter() - started
    collisions = report["collisions"]
    return {
        "items": items,
        "seconds": seconds,
        "peak_mib": peak.mib,
        "colliding_before": collisions["before"]["share"],
        "colliding_after": collisions["after"]["items"],
        "resolved_by": collisions["resolved_by"],
        "entropy_bits": [level["entropy_bits"] for level in report["levels"]],
    }


def measure_trie(items: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    with PeakMemory() as peak:
        codes = rng.integers(0, CODES, (items, LEVELS), dtype=np.int32)
        catalogue = make_catalogue(codes, [CODES] * LEVELS)
        started = time.perf_counter()
        trie = Trie(catalogue)
        seconds = time.perf_counter() - started
        milliseconds = [candidates_ms(trie, depth, rng) for depth in range(LEVELS)]
    return {
        "items": items,
        "trie_seconds": seconds,
        "bytes_per_item": trie.nbytes / items,
        "candidates_ms": milliseconds,
        "peak_mib": peak.mib,
    }


def candidates_ms(trie: Trie, depth: int, rng: np.random.Generator) -> float:
    """Median milliseconds for the candidates of PREFIXES random prefixes of a depth."""
    nodes = rng.integers(0, trie.num_nodes(depth), PREFIXES)
    seconds = []
    for _ in range(CALLS):
        started = time.perf_counter()
        trie.candidates(depth, nodes)
        seconds.append(time.perf_counter() - started)
    return 1000 * float(np.median(seconds))


def measure_here(part: str, items: int, threads: int) -> None:
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    if part == "texts":
        measured = measure_texts(items, threads)
    else:
        measured = measure_build(items) if part == "build" else measure_trie(items)
    print(json.dumps(measured))


def main() -> None:
    parser = command_line(__doc__, "10⁵ and 10⁶ items, under 50 seconds on two free cores")
    parser.add_argument("--items", type=int, help="items of the build (default 10⁶)")
    parser.add_argument("--trie", type=int, help="items of the trie (default 10⁷)")
    parser.add_argument("--texts", type=int, help="texts that become vectors (default 2²⁰)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    threads = arguments.threads
    machine = describe_machine(threads=threads)
    print(machine_line(machine), flush=True)

    def measure(part: str, items: int) -> dict[str, Any]:
        # Processes that it starts would load this script, but not such a command.
        call = f"from index import measure_here; measure_here({part!r}, {items}, {threads})"
        path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        measured: dict[str, Any] = in_own_process("-c", call, threads=threads, PYTHONPATH=path)
        return measured

    texts = measure("texts", arguments.texts or (1 << 16 if arguments.quick else 1 << 20))
    print(
        f"texts: {texts['texts']:,} to vectors in {texts['one_process_seconds']:.1f} s by one "
        f"process, in {texts['seconds']:.1f} s by {texts['processes']} "
        f"(× {texts['speedup']:.2f}), each of at most {texts['process_mib']:,.0f} MiB; "
        f"CPU of one process {1e6 * texts['one_process_cpu_seconds'] / texts['texts']:.1f} µs a "
        f"text, of the command {1e6 * texts['command_cpu_seconds'] / texts['texts']:.1f}",
        flush=True,
    )
    build = measure("build", arguments.items or (100_000 if arguments.quick else 1_000_000))
    print(
        f"build: {build['items']:,} items in {build['seconds']:.1f} s, peak "
        f"{build['peak_mib']:,.0f} MiB; colliding {build['colliding_before']:.2%} before, "
        f"{build['colliding_after']} items after, resolved by {build['resolved_by']}",
        flush=True,
    )
    trie = measure("trie", arguments.trie or (1_000_000 if arguments.quick else 10_000_000))
    milliseconds = ", ".join(f"{value:.1f}" for value in trie["candidates_ms"])
    print(
        f"trie: {trie['items']:,} items, {trie['bytes_per_item']:.1f} bytes an item, built in "
        f"{trie['trie_seconds']:.1f} s, peak {trie['peak_mib']:,.0f} MiB; candidates of "
        f"{PREFIXES:,} prefixes at depth 0 … {LEVELS - 1}: {milliseconds} ms"
    )
    write_figures(
        arguments.json, {"machine": machine, "texts": texts, "build": build, "trie": trie}
    )


if __name__ == "__main__":
    main()
