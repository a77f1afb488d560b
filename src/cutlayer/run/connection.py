"""A client's connection with the servers of a plan: many predictions, one after the other, in one session.

```python
site = cl.load_site(Path("contract.toml"), Path("ward.toml"))
with cl.connect(site.plan, site.party, network=site.network, weights=Path("runs/20260101-090000-scans")) as connection:
    first = connection.predict(cl.TensorTable(x=scans))
    second = connection.predict(cl.TensorTable(x=others))
```

| code | error | meaning |
| --- | --- | --- |
| E455 | ProgramError | the connection is closed |
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cutlayer.core.compile import Roster
from cutlayer.core.plan import Plan
from cutlayer.core.serving import served_plan, served_programs
from cutlayer.engine.worker import Worker
from cutlayer.errors import ProgramError
from cutlayer.run.answers import left_out, named, serving_party
from cutlayer.run.chain import Chain
from cutlayer.run.meeting import own_process
from cutlayer.run.party import Party, build, counts
from cutlayer.run.prediction import WAIT, agenda, asking, client_chain, idle
from cutlayer.run.session import Task, run_session
from cutlayer.run.simulate import gathered
from cutlayer.run.trained import load_trained
from cutlayer.transport.settings import NetworkSettings

__all__ = ["Connection", "connect"]

Notify = Callable[[str, Mapping[str, Any]], None]


def connect(
    plan: Plan,
    party: Party,
    *,
    network: NetworkSettings,
    weights: str | Path | None = None,
    notify: Notify | None = None,
    wait: float = WAIT,
) -> Connection:
    """Return a connection with the server of a stage, for a `with`; see `cutlayer.serve`.

    The party's modules are built, and its weights read, once. The servers are dialled at the first prediction; the
    connection holds a place at each until the `with` ends, or until it was idle for as long as a server allows
    (`Serving.idle`). After that, and after an error, the next prediction dials anew; after the `with`, none does.

    Args:
        plan: The plan, the same as at the server.
        party: This party: the role that it plays in the plan. Its data are not used.
        network: Addresses, certificate and deadlines.
        weights: Folder that a run has left, for `<party>.safetensors`. None: the modules are used as they are.
        notify: Called with events; output only.
        wait: Seconds in which a server must answer at first, and a lost one come back.

    Raises:
        ProgramError: E453, E454, the plan's predictions cannot be served, or this party is no client.
        CheckpointError: E811, E812, the weights cannot be read, or are not those of the stages.
        ConfigError: as `join` raises.
    """
    connection = Connection(plan, party, asking(plan, party.name, network, wait), notify or _silent)
    if weights is not None:
        load_trained(connection.site, weights, left_out(plan))
    return connection


class Connection:
    """Asks the servers, one prediction at a time; other threads wait for their turn. Made by `connect`.

    Args:
        plan: The plan.
        party: This party.
        servers: Server -> settings of the pair that it is with it.
        notify: Called with events.
    """

    def __init__(self, plan: Plan, party: Party, servers: Mapping[str, NetworkSettings], notify: Notify) -> None:
        """Build the party's stages; nothing is dialled yet."""
        self._whole, self._plan = plan, served_plan(plan)
        self._party = replace(idle(serving_party(plan, party)), prediction=None)
        self._servers, self._notify = servers, notify
        self.site = build(self._plan, self._party, Roster({})).site
        self._link: Chain | None = None
        self._turn = threading.Lock()
        self._closed = False

    def __enter__(self) -> Self:
        """Return the connection. Raises `ProgramError` E455 if it was closed."""
        self._check()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take leave of the servers for at most `deadlines.close` seconds, and close; nothing is owed any more.

        A server that is lost by now does no harm: all outputs are here.
        """
        with self._turn:
            self._closed = True
            self._close(finish=error is None)

    def predict(self, data: Dataset[Any] | DataLoader[Any]) -> dict[str, Tensor]:
        """Return the outputs for these samples, in their order.

        Args:
            data: As `Party.prediction`: its items are dictionaries of the plan's fields. No labels are needed.

        Returns:
            Stage (or "stage.port") -> tensor of shape (samples, ...), with the bits of `cutlayer.predict`. Nobody but
            this party sees them.

        Raises:
            ProgramError: E455, the `with` has ended.
            LinkError: E612 to E615, the server does not let this identity in now, or not for so much.
            PeerError: E702, the server did not answer in time; E701, it was lost, and for too long.
            CutlayerError: as `cutlayer.predict` raises.
        """
        with self._turn, own_process(self._party):
            self._check()
            party = replace(self._party, prediction=data, seed=secrets.randbits(63))  # or two predictions had one noise
            link = self._open()
            programs = partial(served_programs, parties=link.way.parties)
            task = Task(
                agenda, counts(party), build=self._build, programs=programs, trains=False, anew=True, ends=False
            )
            try:
                worker, _ = run_session(self._plan, party, task, link, self._notify)
            except BaseException:
                self._close(finish=False)
                raise
            return named(self._whole, gathered({party.name: worker}))

    def _check(self) -> None:
        if self._closed:
            raise ProgramError(
                "the connection is closed",
                where=f"party {self._party.name}",
                expected="predictions within its `with`",
                remedy="make a new one with cl.connect; predict before its `with` ends",
                code="E455",
            )

    def _build(self, plan: Plan, party: Party, roster: Roster) -> Worker:
        return build(plan, party, roster, self.site)

    def _open(self) -> Chain:
        """Return the links; new ones, if there are none or a server has ended one meanwhile."""
        if self._link is not None and self._link.failed:
            self._close(finish=False)
        if self._link is None:
            self._link = client_chain(self._whole, self._party.name, self._servers, self._notify)
        return self._link

    def _close(self, *, finish: bool) -> None:
        link, self._link = self._link, None
        if link is None:
            return
        within = next(iter(self._servers.values())).deadlines.close if finish else 0.0
        link.close(within)  # `notify` is told of what goes wrong


def _silent(_event: str, _facts: Mapping[str, Any]) -> None:
    pass
