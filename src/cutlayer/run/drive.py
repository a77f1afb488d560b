"""What drives a party's generator over a transport: frames out, frames in, the rest to who fulfils it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from itertools import groupby
from operator import attrgetter
from typing import Any, Final

from cutlayer.core.program import Send, Tag
from cutlayer.engine.ledger import Ledger
from cutlayer.engine.party import Do, Effect, EndStep, Post, Take
from cutlayer.engine.wire import Frame
from cutlayer.transport.base import Transport

__all__ = ["drive", "waited"]

_SMALL: Final = 2**18  # bytes; from here on frames are on their way while the next one is made


def drive(
    talk: Generator[Effect, Any, None],
    link: Transport,
    ledger: Ledger,
    handle: Callable[[Do | EndStep], object],
    idle: Callable[[], None] = lambda: None,
) -> None:
    """Fulfil a party's effects until its generator ends: `handle` does what is no frame.

    Small frames of sends that follow each other are handed over together, for a link to put them into one message.
    `idle` is called before each wait: what keeps nobody waiting is done then.
    """
    answer: object = None
    held, sending = list[Post](), False
    try:
        while True:
            effect = talk.send(answer)
            answer = None
            if isinstance(effect, Post):
                held.append(effect)
                if not sending or sum(post.frame.nbytes for post in held) > _SMALL:
                    _hand_over(held, link)
                continue
            sending = isinstance(effect, Do) and isinstance(effect.instruction, Send)
            if held and not sending:
                _hand_over(held, link)
                if not isinstance(effect, Take):
                    link.flush()
            if isinstance(effect, Take):
                idle()
                answer = waited(link, ledger, effect.source, effect.tag)
            else:
                answer = handle(effect)
    except StopIteration:
        _hand_over(held, link)
    finally:
        talk.close()


def _hand_over(posts: list[Post], link: Transport) -> None:
    """Send what is held: what goes to one party and follows each other, in one call."""
    for to, group in groupby(posts, attrgetter("to")):
        link.send(to, *(post.frame for post in group))
    posts.clear()


def waited(link: Transport, ledger: Ledger, source: str, tag: Tag) -> Frame:
    """Take a frame, and note the seconds until it was there."""
    begin = time.perf_counter()
    frame = link.recv(source, tag)
    ledger.spend("wait", source, time.perf_counter() - begin)
    return frame
