"""Sessions: who starts them, who ends them, and that no message of an old one counts in a new one."""

from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cutlayer.transport import control
from cutlayer.transport.session import EVERYBODY, Conductor, Member, Order, Ready

PARTIES = ("server", "a", "b")


def conductor() -> Conductor:
    state = Conductor(PARTIES)
    for number, party in enumerate(PARTIES):
        assert state.meet(party, number + 1) == []
    return state


def ready(session: int = 0, *checkpoints: int, **counts: int) -> control.Ready:
    return control.Ready(session, counts, checkpoints)


def test_a_session_starts_when_all_are_ready():
    state = conductor()
    assert state.on_ready("a", ready(0, 1, 2, train=5)) == []
    assert state.missing == ("server", "b")
    assert state.on_ready("b", ready(3, 2, 3, train=7, evaluate=1)) == []
    [order] = state.on_ready("server", ready(0, 0, 2))
    counts = {"evaluate": {"b": 1}, "train": {"a": 5, "b": 7}}
    assert order == Order(EVERYBODY, control.Start(4, counts, 2, {"server": 1, "a": 2, "b": 3}))
    assert state.active
    assert state.missing == ()


def test_without_a_common_checkpoint_all_begin_at_the_beginning():
    state = conductor()
    state.on_ready("a", ready(0, 1))
    state.on_ready("b", ready(0, 2))
    [order] = state.on_ready("server", ready(0, 1, 2))
    assert isinstance(order.message, control.Start)
    assert order.message.checkpoint == -1


def start(state: Conductor) -> int:
    for party in PARTIES:
        orders = state.on_ready(party, ready(state.session))
    assert isinstance(orders[0].message, control.Start)
    return state.session


def test_a_restarted_party_ends_the_session_for_the_others():
    state = conductor()
    assert start(state) == 1
    assert state.meet("a", 2) == []  # the same process
    assert state.meet("a", 9) == [Order(EVERYBODY, control.Reset(1, "a"), besides="a")]
    assert state.missing == PARTIES
    assert start(state) == 2


def test_a_party_may_end_the_session_by_being_ready_again():
    state = conductor()
    start(state)
    assert state.on_ready("b", ready(1)) == [Order(EVERYBODY, control.Reset(1, "b"), besides="b")]
    assert state.missing == ("server", "a")


def test_a_late_ready_of_before_the_start_is_ignored():
    state = conductor()
    start(state)
    assert state.on_ready("b", ready(0)) == []
    assert state.active
    state.meet("a", 9)
    assert state.on_ready("b", ready(0)) == []
    assert "b" in state.missing


def test_all_are_told_when_all_have_finished():
    state = conductor()
    start(state)
    assert state.on_bye("a", control.Bye(1)) == []
    assert state.on_bye("b", control.Bye(7)) == []  # of no session that runs
    assert state.on_bye("b", control.Bye(1)) == []
    assert state.on_bye("server", control.Bye(1)) == [Order(EVERYBODY, control.Bye(1))]
    assert state.done
    assert state.meet("a", 99) == []  # nothing is begun after the end


def test_who_rests_does_so_until_it_is_ready_again_or_restarts():
    state = conductor()
    state.on_resting("a")  # before any session there is nothing to rest from
    assert state.resting == set()
    start(state)
    state.on_resting("a")
    state.on_resting("b")
    assert state.resting == {"a", "b"}
    state.on_ready("b", ready(0))  # late: of before the start
    assert state.resting == {"a", "b"}
    state.on_ready("b", ready(1))
    assert state.resting == {"a"}
    state.meet("a", 9)
    assert state.resting == set()


def test_a_party_that_restarts_after_its_bye_takes_it_back():
    state = conductor()
    start(state)
    state.on_bye("a", control.Bye(1))
    state.meet("a", 9)
    start(state)
    assert state.on_bye("b", control.Bye(2)) == []
    assert state.on_bye("server", control.Bye(2)) == []
    assert not state.done


def test_a_member_says_again_what_it_said_to_a_coordinator_that_restarted():
    member = Member()
    said = member.begin(Ready({"train": 1}, (2, 1)))
    assert said == control.Ready(0, {"train": 1}, (1, 2))
    assert member.on_new_coordinator() == said
    assert member.on_start(control.Start(5, {}, -1, {}))
    taken = member.take()
    assert taken is not None
    assert taken.session == 5
    assert member.on_new_coordinator() is None
    assert member.over


def in_session(number: int) -> Member:
    member = Member()
    member.begin(Ready({}, ()))
    assert member.on_start(control.Start(number, {}, -1, {}))
    assert member.take() is not None
    return member


def test_a_reset_counts_once_and_only_for_its_session():
    member = in_session(3)
    assert member.on_reset(2) is None
    assert not member.over
    assert member.on_reset(3) is None
    assert member.over
    said = member.begin(Ready({}, ()))
    assert said.session == 3
    assert not member.over
    assert member.on_reset(3) is None  # it has said so already, and says nothing twice


def test_who_waits_again_without_a_reset_has_given_its_session_up():
    member = in_session(3)
    member.begin(Ready({}, ()))
    assert member.ended == 3
    assert not member.on_start(control.Start(3, {}, -1, {}))
    assert member.take() is None
    assert member.on_start(control.Start(4, {}, -1, {}))


def test_nobody_is_started_who_does_not_wait():
    member = in_session(3)
    assert not member.on_start(control.Start(4, {}, -1, {}))
    assert member.session == 3


class Run(RuleBasedStateMachine):
    """A coordinator and its members with slow links: everybody gets out of every reset into one new session."""

    def __init__(self) -> None:
        super().__init__()
        self.incarnations = iter(range(1, 10**6))
        self.state = Conductor(PARTIES)
        self.members: dict[str, Member] = {}
        self.to: dict[str, list[control.Message]] = {party: [] for party in PARTIES}
        self.back: dict[str, list[control.Message]] = {party: [] for party in PARTIES}
        for party in PARTIES:
            self._begin(party)

    def _begin(self, party: str) -> None:
        self.members[party] = Member()
        self.to[party], self.back[party] = [], []
        self._obey(self.state.meet(party, next(self.incarnations)))
        self._wait(party)

    def _wait(self, party: str) -> None:
        self.back[party].append(self.members[party].begin(Ready({}, ())))

    def _obey(self, orders: list[Order]) -> None:
        for order in orders:
            for party in PARTIES:
                if party != order.besides:
                    self.to[party].append(order.message)

    @rule(party=st.sampled_from(PARTIES))
    def arrive(self, party: str) -> None:
        if self.back[party]:
            message = self.back[party].pop(0)
            assert isinstance(message, control.Ready)
            self._obey(self.state.on_ready(party, message))

    @rule(party=st.sampled_from(PARTIES))
    def learn(self, party: str) -> None:
        member = self.members[party]
        if self.to[party]:
            message = self.to[party].pop(0)
            if isinstance(message, control.Start):
                assert member.on_start(message)
            elif isinstance(message, control.Reset):
                again = member.on_reset(message.session)
                if again is not None:
                    self.back[party].append(again)

    @rule(party=st.sampled_from(PARTIES))
    def drive(self, party: str) -> None:
        member = self.members[party]
        if member.over:
            self._wait(party)
        else:
            member.take()

    @rule(party=st.sampled_from(PARTIES[1:]))
    def restart(self, party: str) -> None:
        self._begin(party)

    @rule(party=st.sampled_from(PARTIES))
    def give_up_by_itself(self, party: str) -> None:
        """As a party does that sees another's new incarnation before the coordinator does."""
        member = self.members[party]
        if member.session > member.ended:
            again = member.on_reset(member.session)
            if again is not None:
                self.back[party].append(again)

    @invariant()
    def numbers_never_go_back(self) -> None:
        for member in self.members.values():
            assert member.session <= self.state.session
            assert member.taken <= member.session

    def teardown(self) -> None:
        for _ in range(60):
            for party in PARTIES:
                self.arrive(party)
                self.learn(party)
                self.drive(party)
        assert self.state.active
        for member in self.members.values():
            assert member.taken == self.state.session
            assert not member.over
        assert not any(self.to.values())
        assert not any(self.back.values())


Run.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestRun = Run.TestCase


def test_long_random_walks():
    """Longer and busier than what hypothesis draws, and the same each time."""
    sessions = 0
    for seed in range(200):
        dice, run = random.Random(seed), Run()
        for _ in range(400):
            party = dice.choice(PARTIES)
            action = dice.choice([run.arrive, run.learn, run.drive])
            if dice.random() < 0.03:
                action = run.give_up_by_itself if party == "server" or dice.random() < 0.5 else run.restart
            action(party)
            run.numbers_never_go_back()
        sessions += run.state.session
        run.teardown()
    assert sessions > 800, sessions
