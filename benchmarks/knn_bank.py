# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Seconds and memory of finding the nearest neighbours of 1,000 queries in a bank as large as ImageNet, beside FAISS.

Both search the same bank of random unit vectors, 1.28 million of 768 float32 by default (3.9 GB), which is in memory
before: as FAISS's own copy for its exact index, `IndexFlatIP`, and as a tensor for ours. They run one after the other
in processes of their own, so that the peak of each is its own. The peak is what the search adds to the bank.

    python benchmarks/knn_bank.py
"""

import argparse
import json
import subprocess
import sys
import threading
import time

import psutil
import torch
import torch.nn.functional as F


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_rows", type=int, default=1_280_000)
    parser.add_argument("--num_channels", type=int, default=768)
    parser.add_argument("--num_queries", type=int, default=1_000)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--num_threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--search", choices=SEARCHES, help="measure this one alone, in this process")
    args = parser.parse_args()
    if args.search:
        print(json.dumps(measure(args)))
        return
    measured = {}
    for name in SEARCHES:
        command = [sys.executable, *sys.argv, "--search", name]
        measured[name] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        print(f"{name:<20} {measured[name]['seconds']:8.1f} s   {measured[name]['megabytes']:6.0f} MB beside the bank")
    ratio = measured["nearest_neighbours"]["seconds"] / measured["IndexFlatIP"]["seconds"]
    pairs = zip(measured["nearest_neighbours"]["rows"], measured["IndexFlatIP"]["rows"], strict=True)
    equal = sum(set(own) == set(theirs) for own, theirs in pairs)
    print(f"ratio {ratio:.2f}; the same neighbours for {equal} of {args.num_queries} queries")


def measure(args: argparse.Namespace) -> dict:
    torch.set_num_threads(args.num_threads)
    generator = torch.Generator().manual_seed(0)
    bank = torch.empty(args.num_rows, args.num_channels)
    for part in bank.split(2**16):
        part.copy_(F.normalize(torch.randn(part.shape, generator=generator), dim=1))
    queries = F.normalize(torch.randn(args.num_queries, args.num_channels, generator=generator), dim=1)
    search = SEARCHES[args.search](bank, args)
    del bank
    search(queries[:2])  # starts threads
    with PeakMemory() as memory:
        start = time.perf_counter()
        rows = search(queries)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "megabytes": memory.peak / 1e6, "rows": rows.tolist()}


def own_search(bank: torch.Tensor, args: argparse.Namespace):
    from stellar_hf.evaluation import nearest_neighbours

    return lambda queries: nearest_neighbours(bank, queries, args.k)[1]


def faiss_search(bank: torch.Tensor, args: argparse.Namespace):
    import faiss

    faiss.omp_set_num_threads(args.num_threads)
    index = faiss.IndexFlatIP(args.num_channels)
    index.add(bank.numpy())
    return lambda queries: index.search(queries.numpy(), args.k)[1]


SEARCHES = {"IndexFlatIP": faiss_search, "nearest_neighbours": own_search}


class PeakMemory:
    """The most resident memory of this process in a block, in bytes beyond what it had before."""

    def __enter__(self):
        self.peak = 0
        self._before = psutil.Process().memory_info().rss
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._ended.wait(0.02):
            self.peak = max(self.peak, psutil.Process().memory_info().rss - self._before)

    def __exit__(self, *exception):
        self._ended.set()
        self._thread.join()


if __name__ == "__main__":
    main()
