"""Log-likelihoods of the choices of a question, whose common beginning is computed once.

Text is cut into context and continuation as lm-evaluation-harness cuts it, so that numbers agree.

Shapes: `T` tokens of a packed row, `N` scored tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from elastune.decoding import evaluating, forward_parameters, unwrapped
from elastune.errors import BadData
from elastune.likelihood import TokenScorer
from elastune.packing import Segment, segment_attention, supports_segments

DEFAULT_CONTEXT = 2048
"""Where neither model nor tokenizer says how much the model can read."""


class Pair(NamedTuple):
    """Token ids of a context, at least one, and of what follows it."""

    context: list[int]
    continuation: list[int]


@dataclass(frozen=True)
class Question:
    """The choices' sequences as the model reads them.

    Attributes:
        rows: token ids of each choice's sequence, cut on the left to what the model can read.
        n_scored: tokens scored at the end of each row, fewer than it has.
        n_shared: tokens that all rows' inputs begin with; a row's last token is no input.
    """

    rows: tuple[list[int], ...]
    n_scored: tuple[int, ...]
    n_shared: int

    @property
    def n_tokens(self) -> int:
        """Input tokens when the shared ones stand there once."""
        return self.n_shared + sum(len(row) - 1 - self.n_shared for row in self.rows)


def encode_pairs(tokenizer: Any, texts: Sequence[tuple[str, str]]) -> list[Pair]:
    """Tokenise (context, continuation) pairs.

    Blanks at the context's end belong to the continuation; the continuation's tokens are those of
    the whole text after as many as the context alone has. An empty context is the beginning- or
    end-of-sequence token.

    Raises:
        BadData: a continuation without a token.
    """
    moved = []
    for context, continuation in texts:
        stripped = context.rstrip()
        # A context of blanks alone has nothing to be stripped to.
        cut = len(stripped) if stripped else len(context)
        moved.append((context[:cut], context[cut:] + continuation))
    start = tokenizer.bos_token_id
    start = tokenizer.eos_token_id if start is None else start
    contexts = _encode(tokenizer, [context for context, _ in moved], start)
    wholes = _encode(tokenizer, [context + rest for context, rest in moved], start)
    pairs = []
    for (context, rest), head, whole in zip(moved, contexts, wholes, strict=True):
        pair = Pair(head, whole[len(head) :])
        if not context:
            ids = tokenizer(rest, add_special_tokens=False).input_ids
            starts = start is None or ids[:1] == [start]
            pair = Pair(ids[:1], ids[1:]) if starts else Pair([start], ids)
        if not pair.context or not pair.continuation:
            raise BadData(
                f"nothing to score in {rest!r} after {context[-40:]!r}.",
                try_="give each choice some text of its own",
            )
        pairs.append(pair)
    return pairs


def context_length(model: nn.Module, tokenizer: Any) -> int:
    """Return the tokens that the model can read at once."""
    config: Any = unwrapped(model).config
    text_config = config.get_text_config()
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if getattr(text_config, name, None) is not None:
            return int(getattr(text_config, name))
    limit = getattr(tokenizer, "model_max_length", None)
    # Tokenizers without a limit say 1e30.
    return int(limit) if limit is not None and limit < 10**9 else DEFAULT_CONTEXT


def question_of(pairs: Sequence[Pair], max_length: int) -> Question:
    """Return the question of choices, each a pair, for a model that reads ``max_length`` tokens.

    Raises:
        BadData: a continuation longer than that.
    """
    longest = max(len(pair.continuation) for pair in pairs)
    if longest > max_length:
        raise BadData(
            f"a choice of {longest} tokens is longer than the {max_length} the model can read.",
            try_="shorten the choice, or use a model with a longer context",
        )
    # The last token is predicted but not read, so one more than the model reads has room.
    rows = tuple([*pair.context, *pair.continuation][-(max_length + 1) :] for pair in pairs)
    n_shared = 0
    for tokens in zip(*(row[:-1] for row in rows), strict=False):
        if len(set(tokens)) > 1:
            break
        n_shared += 1
    return Question(rows, tuple(len(pair.continuation) for pair in pairs), n_shared)


def _encode(tokenizer: Any, texts: Sequence[str], start: int | None) -> list[list[int]]:
    """Tokenise with the tokenizer's special tokens, unless a text begins with its first one."""
    mark = "" if start is None else tokenizer.decode([start])
    encoded: list[list[int]] = [[] for _ in texts]
    for has_mark in (False, True):
        places = [i for i, t in enumerate(texts) if bool(mark and t.startswith(mark)) == has_mark]
        if places:
            batch = [texts[i] for i in places]
            for i, ids in zip(
                places, tokenizer(batch, add_special_tokens=not has_mark).input_ids, strict=True
            ):
                encoded[i] = list(ids)
    return encoded


def loglikelihoods(
    model: nn.Module,
    questions: Sequence[Question],
    *,
    batch_tokens: int = 8192,
    done: Set[int] = frozenset(),
) -> Iterator[tuple[int, list[float]]]:
    """Yield (index, log-likelihood in nats of each choice) of the questions not in ``done``.

    Questions come longest first, so that one which does not fit into memory fails at once. Each
    batch has at most ``batch_tokens`` tokens; a model that attends in ways of its own gets one
    padded row per choice instead of a shared beginning.
    """
    todo = [index for index in range(len(questions)) if index not in done]
    if not todo:
        return
    score = ChoiceScorer(model)
    todo.sort(key=lambda index: -score.size(questions[index]))
    start = 0
    while start < len(todo):
        stop = start + 1
        budget = batch_tokens - score.size(questions[todo[start]])
        while stop < len(todo) and score.size(questions[todo[stop]]) <= budget:
            budget -= score.size(questions[todo[stop]])
            stop += 1
        batch = todo[start:stop]
        yield from zip(batch, score([questions[index] for index in batch]), strict=True)
        start = stop


class ChoiceScorer:
    """Scores batches of questions under one causal LM.

    Whether the model computes the same with a shared beginning as without is tried once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = cast(PreTrainedModel, unwrapped(model))
        self.score = TokenScorer(model)
        self.shares = (
            supports_segments(self.model)
            and "position_ids" in forward_parameters(model)
            and self._sharing_is_exact()
        )

    def size(self, question: Question) -> int:
        """Return the tokens that a question takes of a batch."""
        if self.shares:
            return max(1, question.n_tokens)
        return len(question.rows) * (max(map(len, question.rows)) - 1)

    @torch.inference_mode()
    def __call__(self, questions: Sequence[Question]) -> list[list[float]]:
        """Return the log-likelihood in nats of each choice of each question."""
        with evaluating(self.model):
            nll = self._shared(questions) if self.shares else self._padded(questions)
        counts = [n for question in questions for n in question.n_scored]
        sums = iter([-float(part.double().sum()) for part in nll.cpu().split(counts)])
        return [[next(sums) for _ in question.rows] for question in questions]

    def _shared(self, questions: Sequence[Question]) -> Tensor:
        """Return the NLL (N,) of scored tokens, all questions end to end in one row."""
        ids: list[int] = []
        positions: list[int] = []
        sources: list[int] = []
        labels: list[int] = []
        segments: list[Segment] = []
        for question in questions:
            shared = question.n_shared
            prefix = (len(ids), len(ids) + shared)
            if shared:
                segments.append(Segment(*prefix))
            ids += question.rows[0][:shared]
            positions += range(shared)
            for row, n_scored in zip(question.rows, question.n_scored, strict=True):
                start, last = len(ids), len(row) - 1
                if last > shared:
                    segments.append(Segment(start, start + last - shared, prefix))
                for source in range(last - n_scored, last):
                    sources.append(source + (prefix[0] if source < shared else start - shared))
                labels += row[-n_scored:]
                ids += row[shared:-1]
                positions += range(shared, last)
        device = self.score.device
        with segment_attention(self.model):
            return self.score.at(
                torch.tensor(sources, device=device),
                torch.tensor(labels, device=device),
                input_ids=torch.tensor([ids], device=device),
                position_ids=torch.tensor([positions], device=device),
                segments=tuple(segments),
            )

    def _padded(self, questions: Sequence[Question]) -> Tensor:
        """Return the NLL (N,) of scored tokens, a right-padded row for each choice."""
        rows = [row for question in questions for row in question.rows]
        scored = [n for question in questions for n in question.n_scored]
        length = max(map(len, rows)) - 1
        sources: list[int] = []
        labels: list[int] = []
        for i, (row, n) in enumerate(zip(rows, scored, strict=True)):
            end = i * length + len(row) - 1
            sources += range(end - n, end)
            labels += row[-n:]
        device = self.score.device
        ids = [row[:-1] + [0] * (length + 1 - len(row)) for row in rows]
        read = [[1] * (len(row) - 1) + [0] * (length + 1 - len(row)) for row in rows]
        return self.score.at(
            torch.tensor(sources, device=device),
            torch.tensor(labels, device=device),
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(read, device=device),
        )

    def _sharing_is_exact(self) -> bool:
        embedding: Any = self.model.get_input_embeddings().weight
        ids = [(7 * i + 3) % len(embedding) for i in range(24)]
        probe = [
            question_of([Pair(ids[:6], ids[6:9]), Pair(ids[:6], ids[8:12])], 24),
            question_of([Pair(ids[12:16], ids[16:20]), Pair(ids[12:18], ids[22:])], 24),
        ]
        with torch.inference_mode(), evaluating(self.model):
            given, expected = self._shared(probe), self._padded(probe)
        exact = embedding.dtype == torch.float32
        return torch.allclose(given, expected, rtol=0, atol=1e-3 if exact else 0.1)
