"""Continuous batching: requests come and go between the passes of a model, and share them meanwhile.

Yu et al. 2022 (Orca, OSDI 22), section 3.2 (scheduling by iteration); long prompts are taken in chunk by chunk between
the steps of running rows (Agrawal et al. 2023, SARATHI, arXiv:2308.16369, section 4.1). Relative to the papers: chunks
and steps are passes of their own, one of each per `Generator.step`; rows lie in one preallocated cache (no pages), the
running ones in its first places, so that a pass over them is a pass over a view. When one ends, the last of them moves
into its place: one row is copied, and no pass carries an idle one.

    generator = Generator(model, tokenizer, rows=16)
    request = generator.submit(prompt_ids, max_new_tokens=100, count=4)
    for piece in generator.stream():          # or step(), or run() for the results of everything
        ...

What comes of a request depends on its prompt, its sampler, its seed and its samples' numbers alone: never on the other
requests, on when it was admitted or on how many rows there are (up to ties of floating point: passes of other shapes
sum in another order). Past the context a row goes on as in `sky_core.generation.decode`.

A `Generator` belongs to one thread. A server lets that thread alone call it: other threads put requests into a queue
(`queue.SimpleQueue`), which the thread empties between two steps, and read their pieces from queues of their own.

B rows, T time (tokens), V vocabulary.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from sky_core.components.generation import Sample
from sky_core.errors import UserError
from sky_core.eval.mode import evaluating
from sky_core.generation.passes import last, take_in
from sky_core.generation.pool import Pool, common
from sky_core.generation.row import SLIDING, Generation, Piece, Row, check_prompt, stop_strings
from sky_core.generation.sampling import row_generator
from sky_core.generation.text_stream import TextStream

if TYPE_CHECKING:
    from sky_core.model.language_model import LanguageModel
    from sky_core.slots import Sampler
    from sky_core.tokenizer.base import Tokenizer

log = logging.getLogger("sky_core.generation")


class Generator:
    """Generates for up to `rows` rows at a time; who finds no place waits, first come first served.

    The cache has room for `max_length` tokens of each row (default: the model's context) in the dtype of the autocast
    that is on; call the generator under the same. A pass over prompts takes in at most `prefill_chunk` tokens, padding
    included (None: as many as there are). The model is in evaluation mode during `step`, `stream` and `run`.

    A prompt that begins like one in the cache starts from a copy, as far as the layers can cut back what they hold (a
    recurrent memory cannot, and the log says so). The rows that are done count as well until nothing is left to do:
    then the weights may change. With `remember` they count for as long as their places are free (a chat whose next
    prompt goes on from the last answer); the weights must then stay as they are.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        rows: int = 8,
        max_length: int | None = None,
        prefill_chunk: int | None = 256,
        remember: bool = False,
    ) -> None:
        for name, value in (("rows", rows), ("max_length", max_length), ("prefill_chunk", prefill_chunk)):
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; give 1 or more")
        length = model.max_length if max_length is None else max_length
        if length > model.max_length:
            raise UserError(f"max_length is {length}, more than the model's context of {model.max_length}")
        self.model, self.tokenizer, self.remember = model, tokenizer, remember
        self.chunk = rows * length if prefill_chunk is None else prefill_chunk
        self._device = next(model.parameters()).device
        with torch.inference_mode():
            self._pool = Pool(model.new_cache(rows, length))
        self._running: list[Row] = []  # row i lies in place i
        self._filling: Row | None = None  # in the last place, the beginning of its context read
        self._waiting: deque[Row] = deque()
        self._open: dict[int, list[Row]] = {}  # request -> its rows
        self._requests = 0
        self._slid = False

    def __len__(self) -> int:
        """How many requests are not done."""
        return len(self._open)

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not self._open

    def submit(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int = 200,
        sampler: Sampler | None = None,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        count: int = 1,
        first: int = 0,
    ) -> int:
        """The id of a request for `count` samples of what follows the prompt, which is read once.

        Its pieces call the samples `first`, `first` + 1 and so on; sample i draws from the generator of (seed, i), as
        prompt i does in `generate_tokens`. Requests with equal samplers share a draw. Raises `UserError` for what can
        never be served.
        """
        check_prompt("the prompt", prompt_ids, self.model, self._pool.max_length)
        stops, sampler = stop_strings(stop), sampler or Sample()
        for name, value in (("max_new_tokens", max_new_tokens), ("count", count)):
            if value < 1:
                raise UserError(f"{name} is {value}; give 1 or more")
        request, self._requests = self._requests, self._requests + 1
        self._open[request] = [
            Row(
                index=i,
                prompt=prompt_ids,
                text=TextStream(self.tokenizer, stops),
                generator=row_generator(seed, i),
                max_new_tokens=max_new_tokens,
                sampler=sampler,
                request=request,
            )
            for i in range(first, first + count)
        ]
        self._waiting.extend(self._open[request])
        return request

    @torch.inference_mode()
    def cancel(self, request: int) -> bool:
        """Take a request back, its places are free at once; false where it is done already."""
        if request not in self._open:
            return False
        for row in self._open.pop(request):
            if row.finish is None:
                row.finish = row.generation.finish = "cancelled"
        self._waiting = deque(row for row in self._waiting if row.finish is None)
        if self._filling is not None and self._filling.finish is not None:
            self._filling = None
            self._pool.forget(len(self._pool.rows) - 1, len(self._pool.rows), erase=True)
        self._settle()
        return True

    @torch.inference_mode()
    def step(self) -> list[Piece]:
        """The next token of every running row, then the next chunk of a prompt and the first tokens after it."""
        with evaluating(self.model):
            return self._step()

    def stream(self) -> Iterator[Piece]:
        """Every piece until nothing is left to do; requests may be submitted and cancelled meanwhile (of what is
        cancelled, the pieces that its last step brought still come)."""
        with evaluating(self.model):
            while not self.idle:
                with torch.inference_mode():
                    pieces = self._step()
                yield from pieces

    def run(self) -> dict[int, list[Generation]]:
        """Request -> what followed its prompt, sample by sample, of all requests that are not done."""
        found = {request: [row.generation for row in rows] for request, rows in self._open.items()}
        for _ in self.stream():
            pass
        return found

    def _step(self) -> list[Piece]:
        return self._decode() + self._prefill()

    # the passes

    def _decode(self) -> list[Piece]:
        """One more token of every running row."""
        if not self._running:
            return []
        tokens = [row.tokens[-1] for row in self._running]
        rows = self._pool.lend_idle(len(tokens), self.model.rows_of_step(len(tokens)))
        idle = self._pool.cache.lengths[len(tokens) : rows]
        tokens_B = torch.tensor(tokens + [0] * len(idle), device=self._device)
        with self._pool.places(0, rows) as cache:
            logits_BV = self.model.step(tokens_B, cache, idle=len(idle))[: len(tokens)]
        self._pool.cache.lengths[len(tokens) : rows] = idle
        pieces = self._take(self._running, logits_BV)
        self._settle()
        return pieces

    def _prefill(self) -> list[Piece]:
        """One pass over prompts, and the first tokens of the rows whose prompts are in with it."""
        pool, first, end = self._pool, len(self._running), len(self._pool.rows) - 1
        group, twins = ([self._filling], []) if self._filling is not None else self._admit()
        if not group:
            return []
        place = first if self._filling is None else end
        lengths = pool.cache.lengths[place : place + len(group)]
        blocks = [row.context[length:][: self.chunk] for row, length in zip(group, lengths, strict=True)]
        with pool.places(place, place + len(group)) as cache:
            hidden_BTD = take_in(self.model, blocks, cache)
        if self._filling is not None:
            if pool.cache.lengths[end] < len(self._filling.context):
                return []
            self._filling = None
            pool.move(end, first)
            while first + 1 + len(twins) < len(pool.rows) and self._twin(group) is not None:
                twins.append((0, self._waiting.popleft()))
        logits_BV = self.model.logits(last(hidden_BTD, [len(block) for block in blocks], 1))[:, 0]
        if twins:
            logits_BV = logits_BV[[*range(len(group)), *(i for i, _ in twins)]]
        for i, row in twins:
            pool.copy(first + i, first + len(group))
            pool.rows[first + len(group)] = row
            group.append(row)
        self._running += group
        for row in group:
            row.choose = next(other.choose for other in self._running if other.sampler == row.sampler)
        pieces = self._take(group, logits_BV)
        self._settle()
        return pieces

    def _take(self, rows: list[Row], logits_BV: torch.Tensor) -> list[Piece]:
        logits_BV = logits_BV.float()
        next_B = self._choose(rows, logits_BV[:, : self.tokenizer.vocab_size])  # a padded vocabulary's ids mean nothing
        logprob_B = -cross_entropy(logits_BV, next_B, reduction="none")
        tokens, logprobs = torch.stack((next_B.double(), logprob_B.double())).tolist()  # one wait for the device
        end = self.tokenizer.end_of_text
        return [row.take(int(token), p, end) for row, token, p in zip(rows, tokens, logprobs, strict=True)]

    def _choose(self, rows: list[Row], logits_BV: torch.Tensor) -> torch.Tensor:
        """next_B, by one call of each sampler."""
        groups: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault(id(row.choose), []).append(i)
        tokens, generators = [row.tokens for row in rows], [row.generator for row in rows]
        if len(groups) == 1:
            return rows[0].choose(logits_BV, tokens, generators)
        next_B = torch.empty(len(rows), dtype=torch.long, device=logits_BV.device)
        for own in groups.values():
            choose = rows[own[0]].choose
            next_B[own] = choose(logits_BV[own], [tokens[i] for i in own], [generators[i] for i in own])
        return next_B

    # places

    def _admit(self) -> tuple[list[Row], list[tuple[int, Row]]]:
        """Give places to those who come next: rows whose prompts fit into one pass together, or the first alone.

        Also (i, row) for each further row with the prompt of row i of these: it gets a copy once that is read.
        """
        pool, first = self._pool, len(self._running)
        group: list[Row] = []
        twins: list[tuple[int, Row]] = []
        widest = longest = 0
        while self._waiting and self._filling is None and first + len(group) + len(twins) < len(pool.rows):
            row = self._waiting[0]
            twin = self._twin(group)
            if twin is not None:
                twins.append((twin, self._waiting.popleft()))
                continue
            context = row.context
            source, held = pool.likest(context)
            width, end = max(widest, len(context) - held), max(longest, held)
            if group and (width * (len(group) + 1) > self.chunk or end + width > pool.max_length):
                break
            if pool.cuts and any(common(other.context, context) >= held + pool.worth for other in group):
                break  # the next step copies what this one reads
            place = first + len(group)
            if len(context) - held > self.chunk:
                self._filling, place = row, len(pool.rows) - 1
            pool.begin(place, row, source, held)
            group.append(self._waiting.popleft())
            widest, longest = width, end
        return group, twins

    def _twin(self, group: list[Row]) -> int | None:
        """Which row of `group` has the prompt of the row that comes next."""
        context = self._waiting[0].context if self._waiting else []
        return next((i for i, row in enumerate(group) if row.context == context), None)

    def _settle(self) -> None:
        """Leave the rows that are done; those that filled their place wait, before all others, to be read again."""
        pool, rows = self._pool, self._running
        stays = [row.finish is None for row in rows]
        kept = max(1, pool.max_length // 2)
        slid = [i for i, stay in enumerate(stays) if stay and pool.cache.lengths[i] == pool.max_length]
        if slid and not self._slid:
            self._slid = True
            log.info(SLIDING, pool.max_length, kept)
        for i in slid:
            rows[i].start = len(rows[i].tokens) - kept
            stays[i], pool.rows[i] = False, None
        self._waiting.extendleft(sorted((rows[i] for i in slid), key=lambda row: (-row.request, -row.index)))

        count = sum(stays)
        holes = [i for i in range(count) if not stays[i]]
        movers = [i for i in range(count, len(rows)) if stays[i]]
        for hole, mover in zip(holes, movers, strict=True):
            pool.move(mover, hole)
            rows[hole], rows[mover] = rows[mover], rows[hole]
        gone = rows[count:]
        del rows[count:]
        if any(row.finish == "failed" for row in gone):
            pool.forget(count, len(pool.rows) - (self._filling is not None), erase=True)
        for request in {row.request for row in gone}:
            if all(row.finish is not None for row in self._open.get(request, [])):
                self._open.pop(request, None)
        if self.idle and not self.remember:
            pool.forget(0, len(pool.rows))
