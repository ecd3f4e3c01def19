"""A live model as lm-evaluation-harness sees it, answering by this library's engines.

Imports lm_eval, which is an extra: import this module only where that is known to be there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import nn

from elastune.choices import context_length, encode_pairs, loglikelihoods, question_of
from elastune.errors import BadRecipe
from elastune.generate import generate

Progress = Callable[[int, int], None]
_PLAIN = {"until", "max_gen_toks", "do_sample", "temperature"}
"""What greedy generation that stops at given texts is described by."""
_SLICE = 64
"""Requests handed to lm-eval's own code at once: as often progress can be told."""


class HarnessModel(HFLM):  # type: ignore[misc]
    """Scores choices with their common beginning computed once; drops finished rows.

    Requests that need more than the engines give (whether a text is the greedy one, rolling
    windows, sampling) go the way of lm-eval.

    Args:
        batch_tokens: bound on the tokens of a batch.
        ranked: names of tasks of which nothing but the choices' log-likelihoods is asked.
        total: counts all requests there will be; called once they are made.
        progress: called with (answered, all requests).
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        batch_tokens: int,
        ranked: Collection[str],
        total: Callable[[], int],
        progress: Progress | None,
    ) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=max(1, batch_tokens // 1024),
            max_length=context_length(model, tokenizer),
        )
        self._batch_tokens = batch_tokens
        self._ranked = ranked
        self._total = total
        self._progress = progress
        self._n_done = 0

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[Any]:
        """Return (log-likelihood in nats, whether it is the greedy text) of each request.

        Of tasks in ``ranked`` the second is always False.
        """
        return self._answered(requests, self._ranked_choices, super().loglikelihood)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[float]:
        """Return the log-likelihood in nats of each text."""
        return self._answered(requests, lambda _: iter(()), super().loglikelihood_rolling)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Return the text generated for each request, up to where it is to stop."""
        return self._answered(requests, self._greedy_texts, super().generate_until)

    def _answered(
        self,
        requests: Sequence[Any],
        engine: Callable[[Sequence[Any]], Iterator[tuple[int, Any]]],
        otherwise: Callable[..., list[Any]],
    ) -> list[Any]:
        """Answer what the engine can (it yields places and answers), and the rest as lm-eval."""
        answers: dict[int, Any] = {}
        for place, answer in engine(requests):
            answers[place] = answer
            self._tell(1)
        rest = [place for place in range(len(requests)) if place not in answers]
        for first in range(0, len(rest), _SLICE):
            places = rest[first : first + _SLICE]
            found = otherwise([requests[place] for place in places], disable_tqdm=True)
            answers |= zip(places, found, strict=True)
            self._tell(len(places))
        return [answers[place] for place in range(len(requests))]

    def _tell(self, n: int) -> None:
        self._n_done += n
        if self._progress is not None:
            self._progress(self._n_done, self._total())

    def _ranked_choices(self, requests: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Answer the requests of one document together: they mostly share their context."""
        of_document: dict[tuple[str, int], list[int]] = {}
        for place, request in enumerate(requests):
            if request.task_name in self._ranked:
                document = (request.task_name, request.doc_id)
                of_document.setdefault(document, []).append(place)
        groups = list(of_document.values())
        texts = [requests[place].args for places in groups for place in places]
        pairs = iter(encode_pairs(self.tokenizer, texts))
        questions = [question_of([next(pairs) for _ in g], self.max_length) for g in groups]
        for index, values in loglikelihoods(self.model, questions, batch_tokens=self._batch_tokens):
            yield from ((p, (v, False)) for p, v in zip(groups[index], values, strict=True))

    def _greedy_texts(self, requests: Sequence[Any]) -> Iterator[tuple[int, str]]:
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for place, request in enumerate(requests):
            context, given = request.args[:2]
            wanted = normalize_gen_kwargs(given, self.max_gen_toks)
            n_new = int(wanted["max_gen_toks"])
            if n_new >= self.max_length:
                raise BadRecipe(
                    f"lm-eval task {request.task_name!r} generates up to {n_new} tokens, and the "
                    f"model reads {self.max_length} at once.",
                    try_="lower max_gen_toks in the generation_kwargs of its YAML file",
                )
            if wanted["do_sample"] or set(wanted) - _PLAIN or not self._fits(context, n_new):
                continue
            stops = tuple(stop for stop in wanted["until"] if stop)
            groups.setdefault((n_new, stops), []).append(place)
        for (n_new, stops), places in groups.items():
            yield from self._generated(requests, places, n_new, stops)

    def _generated(
        self, requests: Sequence[Any], places: Sequence[int], n_new: int, stops: tuple[str, ...]
    ) -> Iterator[tuple[int, str]]:
        texts = generate(
            self.model,
            self.tokenizer,
            [requests[place].args[0] for place in places],
            max_new_tokens=n_new,
            is_finished=lambda text: any(stop in text for stop in stops),
            batch_tokens=self._batch_tokens,
        )
        for place, text in zip(places, texts, strict=True):
            for stop in stops:
                text = text.split(stop)[0]
            yield place, text

    def _fits(self, context: str, n_new: int) -> bool:
        """Tell whether a context need not be cut, nor its first token be left out."""
        bos = self.tokenizer.bos_token
        if bos and context.startswith(bos):
            return False
        return len(self.tokenizer(context, verbose=False).input_ids) + n_new <= self.max_length
