"""A judgement that failed, with the kind it is counted under."""

from __future__ import annotations

__all__ = ["JudgeError"]


class JudgeError(Exception):
    """No judgement could be had; the completion is dropped, nothing is put in its place.

    kind: "timeout", "rate_limited" (429), "server_error" (5xx), "connection", "unauthorized"
    (401, 403), "client_error" (other 3xx and 4xx), "too_large" (the body), "malformed" (no chat
    completion, or no readable scores in it), "out_of_range" (scores outside the rubric's scale) or
    "budget". Messages never hold the API key.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
