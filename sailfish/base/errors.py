"""The tree of every error Sailfish raises, each with a code, a hint, an HTTP status and an exit code.

SailfishError
├── UserError               the person or client asking must change something
│   ├── ConfigError             a setting is unknown, malformed or contradicts another
│   ├── CheckpointError         a model directory is damaged, incomplete or hostile
│   │   └── UnsupportedModelError   it is sound, but no row of the family table fits it
│   ├── ArtifactError           an engine directory is damaged, or made for something else
│   ├── PlanError               what was asked does not fit the memory there is
│   └── RequestError            one request is wrong
│       └── ContextTooLong
├── BuildError              a build step failed
└── EngineError             a running engine could not do its work
    ├── Overloaded              refused before any work was done; retry later
    ├── DeadlineExceeded        the request's own deadline passed
    ├── RequestAborted          the client left, or the engine is draining
    └── WorkerDied              the engine process is gone
"""

from __future__ import annotations


class SailfishError(Exception):
    """An error whose message is one line: what happened, the values, and what to do."""

    code: str = "internal_error"
    http_status: int = 500
    exit_code: int = 1

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.param = param
        self.retry_after_s = retry_after_s
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UserError(SailfishError):
    """The person or the client must change something."""

    code = "invalid_request"
    http_status = 400
    exit_code = 2


class ConfigError(UserError):
    """A setting is unknown, malformed, or contradicts another."""

    code = "invalid_config"


class CheckpointError(UserError):
    """A model directory is damaged, incomplete or hostile."""

    code = "invalid_checkpoint"


class UnsupportedModelError(CheckpointError):
    """The checkpoint is sound, but Sailfish has no row for it."""

    code = "unsupported_model"


class ArtifactError(UserError):
    """An engine directory is damaged, or was made for something else."""

    code = "invalid_engine"


class PlanError(UserError):
    """What was asked does not fit the memory there is."""

    code = "does_not_fit"


class RequestError(UserError):
    """One request is wrong; the engine is untouched."""

    code = "invalid_value"


class ContextTooLong(RequestError):
    """Prompt and requested tokens exceed the engine's context."""

    code = "context_length_exceeded"


class BuildError(SailfishError):
    """A build step failed."""

    code = "build_failed"
    exit_code = 3


class EngineError(SailfishError):
    """A running engine could not do its work."""

    code = "engine_error"
    exit_code = 4


class Overloaded(EngineError):
    """Refused before any work was done; try again after `retry_after_s`."""

    code = "overloaded"
    http_status = 503


class DeadlineExceeded(EngineError):
    """The request's own deadline passed."""

    code = "deadline_exceeded"
    http_status = 408


class RequestAborted(EngineError):
    """The request was ended early: its client left, or the engine is stopping."""

    code = "request_aborted"
    http_status = 503


class WorkerDied(EngineError):
    """The engine process is gone; another one may already be starting."""

    code = "engine_unavailable"
    http_status = 503


def error_from_code(code: str, message: str, *, retry_after_s: float | None = None) -> SailfishError:
    """Rebuild the error that another process described by its code."""
    for kind in _leaves(SailfishError):
        if kind.code == code:
            return kind(message, retry_after_s=retry_after_s)
    return EngineError(message, code=code, retry_after_s=retry_after_s)


def _leaves(kind: type[SailfishError]) -> list[type[SailfishError]]:
    found = [kind]
    for child in kind.__subclasses__():
        found += _leaves(child)
    return found
