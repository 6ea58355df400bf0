"""One tree for every error that PrfaaS raises on purpose.

PrfaasError
├── ConfigError              the operator's settings are wrong (exit status 2)
├── UsageError               a command was called wrongly (exit status 2)
│   └── InfeasibleError      no plan gives what was asked for; says what is missing
├── SetupError               what a command needs is not there and can't be made: a model, a package, a child process
├── RequestError             the client's request is wrong (4xx); names the field
│   ├── AuthenticationError  401
│   ├── ModelNotFoundError   404
│   ├── PayloadTooLargeError 413
│   ├── ConflictError        409, it doesn't go with what is under way
│   └── UnsupportedError     400, a feature that this engine does not have
├── UnavailableError         nobody can serve this now (503, with retry_after_s)
│   ├── TooLateError         nobody would be in time for its deadline (429, with retry_after_s)
│   └── QuotaError           the client's key has had what it may have for now (429, with retry_after_s)
├── EngineError              the engine failed at its own work (500)
│   ├── ModelRefusedError    at load: a model type that has not been verified
│   └── OutOfMemoryError     the arena has no room for a request, and never will
├── TransferError            one transfer failed; others go on
│   ├── NoRoomError          the receiver has no memory for it now; ask again
│   ├── TicketError          the ticket is wrong, expired, or was used by another session
│   ├── ChecksumError        a chunk arrived damaged, twice
│   ├── TransferCancelledError   either side cancelled it
│   └── LaneLostError        the lanes died with chunks unacknowledged
└── PeerError                the other side broke the protocol: its lane is closed
    ├── ProtocolError        a malformed, oversized or out-of-place frame
    └── PeerRefusedError     HELLO was refused: version, secret, layout

Foreign exceptions (OSError, msgspec.DecodeError, ...) are mapped once, where they enter. `RequestError` and
`UnavailableError` speak to the client; their text must never hold a secret or a path.
"""

from __future__ import annotations


class PrfaasError(Exception):
    """The root. `str(error)` is one line: what is wrong, where, and the mend."""


class ConfigError(PrfaasError):
    """Settings that don't parse; `problems` holds one line per mistake, each with its key and the given value."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


class UsageError(PrfaasError):
    """A command line that can't be carried out."""


class InfeasibleError(UsageError):
    """No plan gives what was asked for from what there is; the text says what is missing."""


class SetupError(PrfaasError):
    """What a command needs is not there and can't be made: a model, a package, a child process (exit status 1)."""


class RequestError(PrfaasError):
    """The client's fault. `param` names the field as OpenAI's error body does; `code` is a short machine word."""

    status = 400
    kind = "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class AuthenticationError(RequestError):
    status = 401
    kind = "authentication_error"


class ModelNotFoundError(RequestError):
    status = 404
    kind = "not_found_error"


class PayloadTooLargeError(RequestError):
    status = 413


class ConflictError(RequestError):
    """What is asked for doesn't go with what is under way, or isn't the caller's to ask."""

    status = 409


class UnsupportedError(RequestError):
    """Asked for something that is valid in the OpenAI API but that this engine does not do."""


class UnavailableError(PrfaasError):
    """Nobody can serve this now; try again after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooLateError(UnavailableError):
    """Nobody would serve this before its deadline; refused at once rather than queued to fail."""

    code = "deadline"


class QuotaError(UnavailableError):
    """The client's API key has had all that it may have for now."""

    code = "rate_limit_exceeded"


class EngineError(PrfaasError):
    """The engine failed at its own work."""


class ModelRefusedError(EngineError):
    """This model type has not been verified to give the same tokens disaggregated as whole."""


class OutOfMemoryError(EngineError):
    """The request can never fit into this node's KV arena."""


class TransferError(PrfaasError):
    """One transfer failed; the session and its other transfers go on."""

    reason = "transfer_failed"


class NoRoomError(TransferError):
    """The receiver has no memory now; ask again after `retry_after_s`."""

    reason = "no_room"

    def __init__(self, message: str, *, retry_after_s: float = 0.05) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TicketError(TransferError):
    reason = "ticket_refused"


class ChecksumError(TransferError):
    reason = "checksum_mismatch"


class TransferCancelledError(TransferError):
    reason = "cancelled"


class LaneLostError(TransferError):
    reason = "lanes_lost"


class PeerError(PrfaasError):
    """The other side broke the protocol; its lane is closed, and the reason is logged."""


class ProtocolError(PeerError):
    """A malformed, oversized or out-of-place frame."""


class PeerRefusedError(PeerError):
    """HELLO was refused."""
