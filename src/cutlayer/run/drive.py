"""What drives a party's generator over a transport: frames out, frames in, the rest to who fulfils it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import Any

from cutlayer.core.program import Send, Tag
from cutlayer.engine.ledger import Ledger
from cutlayer.engine.party import Do, Effect, EndStep, Post, Take
from cutlayer.engine.wire import Frame
from cutlayer.transport.base import Transport

__all__ = ["drive", "waited"]


def drive(
    talk: Generator[Effect, Any, None], link: Transport, ledger: Ledger, handle: Callable[[Do | EndStep], object]
) -> None:
    """Fulfil a party's effects until its generator ends: `handle` does what is no frame."""
    answer: object = None
    held = list[Post]()
    try:
        while True:
            effect = talk.send(answer)
            answer = None
            if isinstance(effect, Post):
                held.append(effect)
                continue
            if held and not (isinstance(effect, Do) and isinstance(effect.instruction, Send)):
                for post in held:
                    link.send(post.to, post.frame)
                held.clear()
            if isinstance(effect, Take):
                answer = waited(link, ledger, effect.source, effect.tag)
            else:
                answer = handle(effect)
    except StopIteration:
        return
    finally:
        talk.close()


def waited(link: Transport, ledger: Ledger, source: str, tag: Tag) -> Frame:
    """Take a frame, and note the seconds until it was there."""
    begin = time.perf_counter()
    frame = link.recv(source, tag)
    ledger.spend("wait", source, time.perf_counter() - begin)
    return frame
