# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Measures speed and memory, and prints a table for each benchmark.

    python -m benchmarks                    # all of them
    python -m benchmarks features objective --device cuda
"""

import argparse
import ast
import importlib
import sys
from pathlib import Path

import torch

from .harness import Options
from .tables import describe_machine, markdown_table, write_csv


def find_benchmarks() -> dict[str, str]:
    """Names of the modules of this folder that define `run`, and the first line of what they say of themselves."""
    found = {}
    folder = Path(__file__).parent
    for file in sorted([*folder.glob("*.py"), *folder.glob("*/__init__.py")]):
        module = ast.parse(file.read_text())
        if any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in module.body):
            found[file.parent.name if file.stem == "__init__" else file.stem] = (
                ast.get_docstring(module) or ""
            ).split("\n")[0]
    return found


def main() -> int:
    benchmarks = find_benchmarks()
    width = max(map(len, benchmarks))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog="benchmarks:\n" + "\n".join(f"  {name:{width}}  {line}" for name, line in benchmarks.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", metavar="name", nargs="*", help="which benchmarks to run; all by default")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats: whether it runs at all")
    parser.add_argument("--baseline", type=Path, help="src folder of another checkout; training runs it, too")
    parser.add_argument("--output_dir", type=Path, help="folder for NAME.csv; nothing is written by default")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(benchmarks)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(benchmarks)}")

    options = Options(arguments.device, arguments.quick, arguments.baseline)
    machine = describe_machine(options)
    print(" · ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    failed = []
    for name in arguments.names or benchmarks:
        module = importlib.import_module(f"{__package__}.{name}")
        print(f"\n## {name}: {benchmarks[name]}\n", flush=True)
        torch.set_float32_matmul_precision("highest")  # whatever the one before has set
        rows = module.run(options)
        if not rows:
            print("Nothing was measured: a package is missing.", flush=True)
            continue
        print(markdown_table(rows), flush=True)
        if arguments.output_dir:
            write_csv(arguments.output_dir / f"{name}.csv", rows, machine)
        # What small sizes reach says nothing.
        shortfalls = [] if options.quick or not hasattr(module, "shortfalls") else module.shortfalls(rows)
        failed += [f"{name}: {shortfall}" for shortfall in shortfalls]
    print("".join(f"\nFalls short: {line}" for line in failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
