"""Tokenise the rows of a source, in parallel processes if there are many."""

import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from orchestrator.data.file_lock import Poll, no_poll
from orchestrator.data.row import BadRow
from orchestrator.data.shapes import checked, numbers_of
from orchestrator.data.tokens import TokenizedPair, tokenize_checked, truncated, unread_variables
from orchestrator.early_signals import STOP_SIGNALS
from orchestrator.processes import die_with_parent
from orchestrator.settings.data import DataSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 512  # rows sent to a tokenising process at a time
PARALLEL_FROM = 4 * CHUNK  # rows below which starting processes costs more than they save


class RowResult(NamedTuple):
    """The result of tokenising a row."""

    number: int
    result: TokenizedPair | BadRow
    # tokens of prompt, chosen and rejected before truncation, if it could be tokenised
    uncut: tuple[int, int, int] | None
    numbers: dict[str, float] = {}  # by the names of NUMERIC
    unread: list[str] = []  # variables that the chat template does not read
    unread_columns: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class RowTokenizer(NamedTuple):
    """Picklable callable that tokenises chunks of rows, in this or another process."""

    tokenizer: "PreTrainedTokenizerBase"
    data: DataSpec

    def __call__(self, chunk: list[tuple[int, Any]]) -> list[RowResult]:
        """Return the result of each (number, row)."""
        return [self._tokenized(number, row) for number, row in chunk]

    def _tokenized(self, number: int, row: Any) -> RowResult:
        uncut = None
        try:
            result = checked(row, self.data)
            # ties are dropped, so their numbers are not checked
            is_tie = result.row["chosen"] == result.row["rejected"]
            numbers = {} if is_tie else numbers_of(result.row, self.data)
            whole, _ = tokenize_checked(result.row, self.tokenizer, self.data)
            uncut = len(whole.prompt_ids), len(whole.chosen_ids), len(whole.rejected_ids)
            unread = unread_variables(result.row, self.tokenizer, self.data)
            pair = truncated(whole, self.data)
            return RowResult(number, pair, uncut, numbers, unread, result.unread, result.notes)
        except BadRow as bad:
            bad.row = row
            return RowResult(number, bad, uncut)


def tokenized_rows(
    rows: Iterable[tuple[int, Any]], tokenize: RowTokenizer, poll: Poll = no_poll
) -> Iterator[RowResult]:
    """Yield the result of each (number, row), in order. poll: called for each row."""
    iterator = _polling(rows, poll)
    first = list(islice(iterator, PARALLEL_FROM))
    processes = tokenize.data.num_proc or min(os.cpu_count() or 1, 16)
    if len(first) < PARALLEL_FROM or processes == 1:
        for chunk in _chunks(iter(first), iterator):
            for row in chunk:
                poll()
                yield from tokenize([row])
        return
    # spawn: forking a process in which torch or ray already run threads can deadlock
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), _begin_process, (os.getpid(),)
    )
    try:
        chunks = _chunks(iter(first), iterator)
        waiting = [(chunk, pool.submit(tokenize, chunk)) for chunk in islice(chunks, 2 * processes)]
        while waiting:  # a bounded window: the whole file is never in memory
            poll()
            yield from tokenized_elsewhere(*waiting.pop(0), tokenize)
            waiting += [(chunk, pool.submit(tokenize, chunk)) for chunk in islice(chunks, 1)]
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_process(parent: int) -> None:
    """Let a tokenising process live as long as its parent, which handles the signals that a
    terminal or Slurm sends to both.
    """
    die_with_parent(parent)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _polling(rows: Iterable[tuple[int, Any]], poll: Poll) -> Iterator[tuple[int, Any]]:
    for row in rows:
        poll()
        yield row


def tokenized_elsewhere(
    chunk: list[tuple[int, Any]], result: Future[list[RowResult]], tokenize: RowTokenizer
) -> list[RowResult]:
    """Return the result of another process for a chunk; if a row is nested too deeply to pickle,
    tokenise the chunk in this process, which also reports the row's number.
    """
    try:
        return result.result()
    except RecursionError:
        return tokenize(chunk)


def _chunks(*sources: Iterator[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
    for source in sources:
        while chunk := list(islice(source, CHUNK)):
            yield chunk
