"""What a loop of one's own does wrong with its session, said in the loop's words.

| code | error | meaning |
| --- | --- | --- |
| E440 | ProgramError | a call that does not come next in the program, or comes outside of a round or of the `with` |
"""

from __future__ import annotations

from collections.abc import Sequence

from cutlayer.errors import ProgramError

__all__ = ["again", "closure", "evaluating", "misplaced", "no_round", "no_tensor", "outside", "second"]


def outside(party: str) -> ProgramError:
    """Return the error of a session that is used without a `with`."""
    return ProgramError(
        "the session has not begun",
        where=f"party {party}",
        expected="its use in a `with`: with cl.session(...) as session",
        remedy="put the loop into the with: there the parties meet, and hear of its end",
        code="E440",
    )


def again(party: str) -> ProgramError:
    """Return the error of a second call of `rounds`."""
    return ProgramError(
        "session.rounds() was called again",
        where=f"party {party}",
        expected="one call, which gives all rounds of the plan: each epoch, and each evaluation",
        remedy="leave out the loop over epochs; for more rounds set training.epochs in the plan",
        code="E440",
    )


def no_round(party: str) -> ProgramError:
    """Return the error of a call before the first round."""
    return ProgramError(
        "no round has begun",
        where=f"party {party}",
        expected="a call within `for round in session.rounds()`",
        remedy="begin a round first",
        code="E440",
    )


def no_tensor(place: str, given: Sequence[object]) -> ProgramError:
    """Return the error of a call of `remote` with something that is no tensor."""
    return ProgramError(
        "remote sends tensors",
        where=place,
        expected="the outputs of this party's stages, as they are",
        got=", ".join(type(one).__name__ for one in given),
        remedy="give the tensors that the modules gave, not detached: the gradient comes back through them",
        code="E440",
    )


def evaluating(place: str, call: str) -> ProgramError:
    """Return the error of a backward, or a step, in a round of evaluation."""
    return ProgramError(
        "nothing is trained in a round of evaluation",
        where=place,
        expected="forwards only",
        got=call,
        remedy="put backward and step under `if round.training:`, and the forward under "
        "`with torch.set_grad_enabled(round.training):`",
        code="E440",
    )


def second(place: str) -> ProgramError:
    """Return the error of a second backward through one microbatch."""
    return ProgramError(
        "the loop goes back a second time through one microbatch",
        where=place,
        expected="one backward() for what a call of remote gave: a gradient crosses each cut once",
        got="backward",
        remedy="add up the losses and call backward() once; a backward with retain_graph followed by another, and "
        "gradients of gradients (create_graph, as in a gradient penalty), cannot be had across a cut",
        code="E440",
    )


def closure(place: str) -> ProgramError:
    """Return the error of an optimizer's step that is to run the model itself."""
    return ProgramError(
        "an optimizer's closure cannot run the model across a cut",
        where=place,
        expected="optimizer.step() after the backward of the batch: each batch crosses once",
        got="optimizer.step(closure) before it",
        remedy="run the model and backward() first, then step() without a closure; an optimizer that needs one "
        "(LBFGS) cannot train a cut model",
        code="E440",
    )


def misplaced(place: str, expected: str, call: str, *, stepping: bool) -> ProgramError:
    """Return the error of a call that is not the one that comes next; `stepping`: the optimizer's turn has come."""
    return ProgramError(
        "the loop is not where the program is",
        where=place,
        expected=expected,
        got=call or "no call of it",
        remedy="step session.optimizer at each part.last: one of your own is told by "
        "Party(optimizer=lambda _: mine); to accumulate gradients set training.microbatches in the plan; where a "
        "GradScaler skipped the step, give it a lower init_scale"
        if stepping
        else "call in the order of the plan; docs/how-to/own-loop.md has a loop for each kind of party",
        code="E440",
    )
