"""Two processes of one party, and strangers in the middle of a run: the run goes on with who belongs to it."""

from __future__ import annotations

import threading
import time

import pytest

from cutlayer.errors import HandshakeError
from cutlayer.transport.grpc_common import METHOD, SERVICE, channel_to
from cutlayer.transport.handshake import read_hello
from cutlayer.transport.network import Network, SessionReset
from tests.transport.parties import Cast, frame_of, meet, tag_of

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("no_thread_stays")]


def to_the_end(network: Network) -> str:
    while True:
        try:
            session = meet(network)
            network.finish()
            return f"session {session}"
        except SessionReset:
            pass


@pytest.mark.provokes("E644")
def test_a_second_process_of_a_party_takes_its_place_and_the_run_goes_on(cast: Cast):
    met = threading.Event()
    second: list[str] = []

    def first(network: Network) -> None:
        meet(network)
        met.set()
        time.sleep(1.5)  # a long step, while its dialler might try again
        network.finish()

    def later() -> None:
        assert met.wait(10)
        with cast.network("clinic") as network:
            second.append(to_the_end(network))

    thread = threading.Thread(target=later)
    thread.start()
    results = cast.play({"server": to_the_end, "clinic": first, "lab": to_the_end})
    thread.join()
    assert isinstance(results["clinic"], HandshakeError), results
    assert results["clinic"].code == "E644"
    assert "another process runs as clinic" in str(results["clinic"])
    assert "stop one of the two" in results["clinic"].remedy
    assert second == ["session 2"]
    assert (results["server"], results["lab"]) == ("session 2", "session 2")


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "mtls"])
def test_another_version_of_frames_in_the_middle_of_a_run_is_refused_and_the_run_goes_on(cast: Cast, secure: bool):
    cast.names = ("server", "clinic")
    if secure:
        cast.certify()

    def server(network: Network) -> str:
        session = meet(network)
        channel = channel_to("server", cast.addresses["server"], cast.credentials.get("clinic"))
        call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(iter([b"CUTL\x02" + bytes(40)]), timeout=10)
        try:
            answer = read_hello(next(call))
        finally:
            call.cancel()
            channel.close()
        network.send("clinic", frame_of(session, 0, b"x"))
        network.finish()
        return answer.code

    def clinic(network: Network) -> bytes:
        payload = bytes(network.recv("server", tag_of(meet(network), 0)).payload)
        network.finish()
        return payload

    assert cast.play({"server": server, "clinic": clinic}) == {"server": "E641", "clinic": b"x"}
