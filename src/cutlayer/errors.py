"""Every error that cutlayer raises, in one tree.

```
CutlayerError                 code  raised when
├── PlanError                 E1xx  a plan cannot be run as it is written
├── ConfigError               E2xx  a contract, party file or argument is wrong
├── DataError                 E25x  a party's data does not fit the plan
├── StageError                E3xx  a stage's module failed or returned something else than the plan says
├── NonFiniteError            E35x  a NaN or an infinity was about to cross a cut
├── ProgramError              E4xx  a call came out of program order, or programs cannot go on (deadlock)
├── WireError                 E5xx  bytes are not a frame of this protocol
├── ContractError             E52x  a well-formed frame that the receiver's program does not allow
├── LinkError                 E6xx  a peer cannot be reached (transient: retried within a bound)
├── DeadlineError             E62x  a peer is silent for longer than allowed
├── HandshakeError            E64x  version, plan or run differ (permanent: never retried)
├── CertificateError          E66x  a certificate is wrong, expired or of someone else (permanent)
├── PeerError                 E7xx  another party failed; carries its code and remedy, never its data
└── CheckpointError           E8xx  a checkpoint is missing, damaged or of another plan
```

An error says *what* happened, *where* (party, stage, cut, step), what was *expected*, what was *got*, and the
*remedy*. `str(error)` is the short text; `error.lines()` is the four-line form that the command line prints, and
`cutlayer explain CODE` says more about a code.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "CertificateError",
    "CheckpointError",
    "ConfigError",
    "ContractError",
    "CutlayerError",
    "DataError",
    "DeadlineError",
    "HandshakeError",
    "LinkError",
    "NonFiniteError",
    "PeerError",
    "PlanError",
    "ProgramError",
    "StageError",
    "WireError",
]


class CutlayerError(Exception):
    """Base of all errors of this package.

    Arguments are texts. `what` is one sentence; `where` names party, stage, cut and step as far as known; `expected`
    and `got` are optional; `remedy` says what to do. `code` overrides the class's general code. `origin` is the party
    that has reported it, if another one did.
    """

    default_code: ClassVar[str] = "E000"
    origin: str = ""

    def __init__(
        self, what: str, *, where: str = "", expected: str = "", got: str = "", remedy: str = "", code: str = ""
    ) -> None:
        """Keep the parts, so that they can be shown on another party's terminal."""
        self.what, self.where, self.expected, self.got = what, where, expected, got
        self.remedy, self.code = remedy, code or self.default_code
        super().__init__(self._text())

    def within(self, place: str) -> None:
        """Say that it happened in `place`, such as a file; where in it, if that was known, stays behind it."""
        self.where = f"{place}: {self.where}" if self.where else place
        self.args = (self._text(),)

    def besides(self, remedy: str) -> None:
        """Say what else to do, behind the remedy that it has."""
        self.remedy = f"{self.remedy}; {remedy}" if self.remedy else remedy
        self.args = (self._text(),)

    def why(self) -> str:
        """Return "expected ..., got ..." or an empty text."""
        parts = [f"expected {self.expected}" if self.expected else "", f"got {self.got}" if self.got else ""]
        return ", ".join(part for part in parts if part)

    def lines(self) -> list[str]:
        """Return the error as four lines: what, where, why, what to do and where to read more."""
        more = f"cutlayer explain {self.code}"
        return [
            f"{self.code} {self.what}",
            f"  where: {self.where or 'not known'}",
            f"  why:   {self.why() or 'see above'}",
            f"  do:    {f'{self.remedy} (more: {more})' if self.remedy else more}",
        ]

    def _text(self) -> str:
        text = f"[{self.code}] {self.what}"
        if self.where:
            text += f" ({self.where})"
        if self.why():
            text += f": {self.why()}"
        return f"{text}. {self.remedy}" if self.remedy else text


class PlanError(CutlayerError):
    """The plan cannot be run as it is written."""

    default_code = "E100"


class ConfigError(CutlayerError):
    """A contract, a party file or an argument is wrong."""

    default_code = "E200"


class DataError(CutlayerError):
    """A party's data does not fit the plan."""

    default_code = "E250"


class StageError(CutlayerError):
    """A stage's module failed, or returned something else than the plan says."""

    default_code = "E300"


class NonFiniteError(CutlayerError):
    """A NaN or an infinity was about to cross a cut."""

    default_code = "E350"


class ProgramError(CutlayerError):
    """A call came out of program order, or the programs cannot go on."""

    default_code = "E400"


class WireError(CutlayerError):
    """Bytes are not a frame of this protocol."""

    default_code = "E500"


class ContractError(CutlayerError):
    """A well-formed frame that the receiver's program does not allow here."""

    default_code = "E520"


class LinkError(CutlayerError):
    """A peer cannot be reached; transient, so it is retried within a bound."""

    default_code = "E600"


class DeadlineError(CutlayerError):
    """A peer is silent for longer than the deadline."""

    default_code = "E620"


class HandshakeError(CutlayerError):
    """Version, plan or run differ between two parties; permanent, never retried."""

    default_code = "E640"


class CertificateError(CutlayerError):
    """A certificate is wrong, expired or somebody else's; permanent, never retried."""

    default_code = "E660"


class PeerError(CutlayerError):
    """Another party failed. Carries its name, code and remedy, never its data."""

    default_code = "E700"


class CheckpointError(CutlayerError):
    """A checkpoint is missing, damaged, or belongs to another plan."""

    default_code = "E800"
