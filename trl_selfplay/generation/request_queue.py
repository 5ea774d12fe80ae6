"""Requests as they come, and which of them wait to be decoded.

In: a sequence of requests, or an iterator that is pulled while others decode. Out: the requests to
begin next, in an order that doesn't depend on the order in which they came.
"""

from collections.abc import Callable, Iterable, Iterator

from trl_selfplay.generation.generation_options import check_sampling_options
from trl_selfplay.generation.sampler import Requests, SampleRequest, SamplingOptions

# How often a sampler that waits for others to decode looks for more requests.
SECONDS_BETWEEN_LOOKS = 0.05


def queue_checked(
    requests: Requests, options: SamplingOptions, batch_size: int, context_length: int | None
) -> "RequestQueue":
    """Return the queue of a `sample`, whose arguments a sampler checks before it begins.

    Raises:
        ValueError: An option or the batch size is out of range, or a prompt can't be sampled from.
    """
    check_sampling_options(options)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, but is {batch_size}.")
    return RequestQueue(requests, context_length)


class RequestQueue:
    """Numbers requests in the order in which they are given, and hands out the longest first.

    Args:
        source: All requests, or an iterator of them, whose None means that there is none now.
        context_length: Maximum positions of the model, or None.

    Attributes:
        requests: Those given so far, by number.
        is_complete: Whether all were known from the beginning.

    Raises:
        ValueError: A prompt is empty or fills the model's context. Where requests come from an
            iterator: when it is pulled.
    """

    def __init__(
        self,
        source: Requests,
        context_length: int | None,
    ) -> None:
        self.requests: list[SampleRequest] = []
        self.is_complete = not isinstance(source, Iterator)
        self._context_length = context_length
        self._waiting: list[int] = []
        self._source: Iterator[SampleRequest | None] | None = iter(source)
        if not isinstance(source, Iterator):
            self._pull(len(source))
            self._source = None

    def __len__(self) -> int:
        """The number of requests that wait."""
        return len(self._waiting)

    @property
    def is_open(self) -> bool:
        """Whether more requests may come."""
        return self._source is not None

    @property
    def first(self) -> SampleRequest:
        """The longest of the requests that wait."""
        return self.requests[self._waiting[0]]

    def has_more(self, count: int, *, is_decoding: bool) -> bool:
        """Ask for requests until `count` wait, there is none now, or the last one has come.

        Args:
            count: How many can begin.
            is_decoding: Whether a request may still follow from a completion in progress.

        Returns:
            Whether a request waits.

        Raises:
            RuntimeError: There is none now, and nothing that one could follow from.
        """
        self._pull(count)
        if not self._waiting and self._source is not None and not is_decoding:
            raise RuntimeError(
                "the iterator of requests gave None while no completion was in progress, so no "
                "request could follow from one. End the iterator, or give a request."
            )
        return bool(self._waiting)

    def take(self, count: int, matches: Callable[[SampleRequest], bool]) -> list[int]:
        """Return the numbers of up to `count` waiting requests that match, which then don't wait."""
        taken: list[int] = []
        passed_over: list[int] = []
        for number in self._waiting:
            if len(taken) == count:
                break
            (taken if matches(self.requests[number]) else passed_over).append(number)
        self._waiting[: len(taken) + len(passed_over)] = passed_over
        return taken

    def put_back(self, numbers: Iterable[int]) -> None:
        """Let requests wait again."""
        self._waiting.extend(numbers)
        self._sort()

    def _pull(self, count: int) -> None:
        num_before = len(self.requests)
        while self._source is not None and len(self._waiting) < count:
            try:
                request = next(self._source)
            except StopIteration:
                self._source = None
                break
            if request is None:
                break
            self._check(request)
            self._waiting.append(len(self.requests))
            self.requests.append(request)
        if len(self.requests) > num_before:
            self._sort()

    def _sort(self) -> None:
        """Put the longest first, so that a batch that doesn't fit shows at once.

        Then comes everything that names a request, so that the order in which they were given makes
        no difference.
        """

        def rank(number: int) -> tuple[int, tuple[int, ...], int, int]:
            request = self.requests[number]
            return -len(request.prompt_ids), request.prompt_ids, request.stream_key, number

        self._waiting.sort(key=rank)

    def _check(self, request: SampleRequest) -> None:
        number, length = len(self.requests), len(request.prompt_ids)
        if length == 0:
            raise ValueError(f"request {number} has an empty prompt; give at least one token.")
        if self._context_length is not None and length >= self._context_length:
            raise ValueError(
                f"the prompt of request {number} has {length} tokens, and the model's context of "
                f"{self._context_length} (`max_position_embeddings`) leaves no room for a "
                "completion. Shorten or drop the prompt, or use fewer `few_shot_examples`."
            )
