# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""What happens to a run whose data set has images that cannot be read."""

from collections.abc import Sequence

from transformers.utils import logging

logger = logging.get_logger(__name__)

# One broken image among the first ten is no reason to stop.
_LEAST_IMAGES = 1000


class UnreadableImages:
    """
    Counts the images of this process that could not be read, and names each once in the log.

    Args:
        max_share: Share of the images seen, or of 1000 if fewer were seen, above which a run stops.
        consequence: A sentence for the log: what becomes of each of them.
    """

    def __init__(self, max_share: float, consequence: str = "Another image of the batch takes its place."):
        self.max_share = max_share
        self.consequence = consequence
        self.num_seen = 0
        self.num_unreadable = 0
        self._named: set[str] = set()

    def count(self, unreadable: Sequence[str], num_images: int) -> None:
        """
        Counts a batch.

        Args:
            unreadable: What is wrong with each of its images that could not be read.
            num_images: Images of the batch.

        Raises:
            ValueError: If too many could not be read.
        """
        self.num_seen += num_images
        self.num_unreadable += len(unreadable)
        for reason in unreadable:
            if reason not in self._named:
                self._named.add(reason)
                logger.warning(f"{reason} {self.consequence}")
        if self.num_unreadable > self.max_share * max(self.num_seen, _LEAST_IMAGES):
            raise ValueError(
                f"{self.num_unreadable} of {self.num_seen} images could not be read, which is more than "
                f"max_unreadable_share = {self.max_share:g} allows. The last: {unreadable[-1]}"
            )
