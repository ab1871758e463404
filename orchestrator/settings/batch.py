"""The block batch: pairs per optimizer step and per forward pass."""

from pydantic import Field

from orchestrator.settings.base import FREE, Block, Positive
from orchestrator.settings.errors import UserError


class BatchSpec(Block):
    """Pairs per optimizer step and per forward pass; gradient accumulation is derived."""

    global_batch_size: Positive = 32
    """Pairs per optimizer step, over all ranks."""
    micro_batch_size: Positive | None = Field(None, json_schema_extra=FREE)
    """Pairs per forward pass on one rank, fewer if that is faster on a CPU.

    Set exactly one of this and the next.
    """
    max_tokens_per_microbatch: Positive | None = Field(None, json_schema_extra=FREE)
    """Maximum tokens per forward pass on one rank: packed: prompt and both completions; padded:
    including padding. A longer single pair gets a pass of its own.
    """

    def pairs_per_rank(self, ranks: int) -> int:
        """Return the most pairs that one of so many ranks has in a step."""
        return -(-self.global_batch_size // ranks)

    def grad_accum(self, ranks: int) -> int | None:
        """Return the forward passes per step on that rank; None if max_tokens_per_microbatch
        decides.
        """
        return (
            -(-self.pairs_per_rank(ranks) // self.micro_batch_size)
            if self.micro_batch_size
            else None
        )

    def check(self) -> None:
        """Check that one setting limits a forward pass, and that it is at most a step."""
        pairs, tokens = self.micro_batch_size, self.max_tokens_per_microbatch
        if (pairs is None) == (tokens is None):
            rule = "exactly one of the two must set the size of a forward pass"
            both = {"micro_batch_size": pairs, "max_tokens_per_microbatch": tokens}
            raise UserError(
                "batch", both, rule, "remove one" if pairs else "set batch.micro_batch_size=1"
            )
        if pairs and pairs > self.global_batch_size:
            rule = f"is more than batch.global_batch_size ({self.global_batch_size})"
            cure = f"set it to {self.global_batch_size} or less"
            raise UserError("batch.micro_batch_size", pairs, rule, cure)
