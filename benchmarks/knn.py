# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Seconds and memory of the 20 nearest neighbours of 1,000 queries in a bank as large as ImageNet, beside FAISS.

Random unit vectors, 1.28 million of 768 float32 (3.9 GB), which are in memory before; FAISS's exact search
(`faiss.knn`, of which its flat index is made) reads the same ones, on a CPU. On an accelerator ours computes there,
with the bank in the memory of the CPU or of the accelerator, beside a product and `topk` of one chunk after the other.
`eval_memory` is what a search needs beside bank and queries.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from stellar_hf.evaluation import nearest_neighbours

from .counters import peak_bytes
from .harness import Options, Row, is_installed, progress, reset_peak_resident, resident_bytes, time_in_turns

NUM_ROWS, NUM_CHANNELS, NUM_QUERIES = 1_280_000, 768, 1_000
K = 20
CHUNK_SIZE = 2**16  # of the reference on an accelerator

Search = Callable[[torch.Tensor], torch.Tensor]  # from queries to rows of the bank


def run(options: Options) -> list[Row]:
    num_rows, num_channels, num_queries = (4096, 64, 32) if options.quick else (NUM_ROWS, NUM_CHANNELS, NUM_QUERIES)
    progress(f"a bank of {num_rows} rows")
    bank, queries = unit_rows(num_rows, num_channels), unit_rows(num_queries, num_channels)
    searches = searches_of(bank, options)
    progress(f"searches, in turns: {', '.join(searches)}")
    found: dict[str, torch.Tensor] = {}
    memory: dict[str, int] = {}

    def measured(name: str) -> Callable[[], None]:
        def run() -> None:
            found[name], needed = measure_memory(searches[name], queries, options)
            memory[name] = max(needed, memory.get(name, 0))

        return run

    for search in searches.values():
        search(queries[:2])  # starts threads, loads kernels
    variants = {name: measured(name) for name in searches}
    timings = time_in_turns(variants, options.device, turns=3, warm_up=0 if options.on_cpu else 1)
    reference = next(reversed(searches))
    return [
        {
            "model": name,
            "eval_time": timing.median,
            "eval_time_spread": timing.spread,
            "eval_queries_per_sec": num_queries / timing.median,
            "eval_memory": memory[name] / 2**20,
            "num_rows": num_rows,
            "num_channels": num_channels,
            "eval_speed_to_reference": timings[reference].ratio_to(timing),
            "neighbours_of_reference": share_of_same(found[name], found[reference]),
        }
        for name, timing in timings.items()
    ]


def unit_rows(num_rows: int, num_channels: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_rows)
    rows = torch.empty(num_rows, num_channels)
    for part in rows.split(2**16):
        part.copy_(F.normalize(torch.randn(part.shape, generator=generator), dim=1))
    return rows


def searches_of(bank: torch.Tensor, options: Options) -> dict[str, Search]:
    """The reference, where there is one, comes last."""

    def ours(bank: torch.Tensor) -> Search:
        return lambda queries: nearest_neighbours(bank, queries, K, device=options.device)[1]

    if options.on_cpu:
        return {"ours": ours(bank), **({"faiss.knn": faiss_search(bank)} if is_installed("faiss") else {})}
    on_device = bank.to(options.device)
    return {
        "ours, bank on the CPU": ours(bank.pin_memory()),
        "ours, bank on the device": ours(on_device),
        "product and topk": lambda queries: product_and_topk(on_device, queries.to(options.device)).cpu(),
    }


def faiss_search(bank: torch.Tensor) -> Search:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    product = faiss.METRIC_INNER_PRODUCT
    return lambda queries: torch.from_numpy(faiss.knn(queries.numpy(), bank.numpy(), K, metric=product)[1])


def product_and_topk(bank: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    similarities, rows = [], []
    for start in range(0, len(bank), CHUNK_SIZE):
        best = (queries @ bank[start : start + CHUNK_SIZE].T).topk(K)
        similarities.append(best.values)
        rows.append(best.indices + start)
    chosen = torch.cat(similarities, dim=1).topk(K).indices
    return torch.cat(rows, dim=1).gather(1, chosen)


def measure_memory(search: Search, queries: torch.Tensor, options: Options) -> tuple[torch.Tensor, int]:
    """The neighbours, and the bytes at the peak beyond those before: of the process on a CPU, else of the device."""
    found: list[torch.Tensor] = []
    if not options.on_cpu:
        needed = peak_bytes(lambda: found.append(search(queries)), options.device)
        return found[0], needed
    reset_peak_resident()
    before = resident_bytes()
    found.append(search(queries))
    return found[0], resident_bytes(peak=True) - before


def share_of_same(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Share of queries with the same set of neighbours."""
    return (found.sort(dim=1).values == reference.sort(dim=1).values).all(dim=1).float().mean().item()
