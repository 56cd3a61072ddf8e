"""One forward hook on the decoder; what it does is an object set for the duration of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from latent_rl.models.trace import TOWER_KWARGS


class Interceptor(Protocol):
    """What happens to the decoder's output while it is set."""

    def intercept(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
        """Read e_t [B, L, H] and the decoder's keyword arguments; return a replacement or None."""
        ...


class DecoderHook:
    """The forward hook. With no interceptor set the decoder's output is left alone, untouched."""

    def __init__(self, decoder: nn.Module) -> None:
        """Install the hook on ``decoder``, once."""
        self._interceptor: Interceptor | None = None
        self._handle = decoder.register_forward_hook(self, with_kwargs=True)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Called by PyTorch after the decoder's forward."""
        if self._interceptor is None:
            return None
        hidden = self._interceptor.intercept(output.last_hidden_state, kwargs)
        if hidden is None:
            return None
        output.last_hidden_state = hidden
        return output

    @contextmanager
    def use(self, interceptor: Interceptor | None) -> Iterator[None]:
        """Set an interceptor (None: nothing happens) until the block ends, then the previous."""
        previous, self._interceptor = self._interceptor, interceptor
        try:
            yield
        finally:
            self._interceptor = previous


def tower_kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's keyword arguments that a tower needs as well."""
    return {name: kwargs[name] for name in TOWER_KWARGS if kwargs.get(name) is not None}


class CaptureHidden:
    """Keep the states and the tower's keyword arguments; change nothing."""

    def __init__(self) -> None:
        """Start with nothing captured."""
        self.hidden: Tensor | None = None
        self.kwargs: dict[str, Any] = {}

    def intercept(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> None:
        """Keep them."""
        self.hidden, self.kwargs = hidden, tower_kwargs(kwargs)


class ReplaceHidden:
    """Replace the states by a function of them: given codes, or the policy's most likely."""

    def __init__(self, replace: Callable[[Tensor, Mapping[str, Any]], Tensor]) -> None:
        """``replace(hidden, tower_kwargs)`` returns the new states."""
        self._replace = replace

    def intercept(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """The replacement, in the backbone's dtype."""
        return self._replace(hidden, tower_kwargs(kwargs)).to(hidden.dtype)
