# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""See `stellar_hf.cli.extract`."""

from stellar_hf.cli.extract import main

if __name__ == "__main__":
    main()
