"""A rank that hangs is named, one that works is not, and only one rank reports."""

import itertools

import pytest
import torch.distributed as dist

from trellisnet.training import watch
from trellisnet.training.watch import Progress, Watch


class Ranks:
    """Watches of ranks that share a store and a clock."""

    def __init__(self, size, monkeypatch):
        self.time, self.store, self.said = 0.0, dist.HashStore(), []
        monkeypatch.setattr(watch.time, "monotonic", lambda: self.time)
        self.progress = [Progress() for _ in range(size)]
        self.watches = [
            Watch(None, rank, size, progress, lambda line, rank=rank: self.said.append((rank, line)))
            for rank, progress in enumerate(self.progress)
        ]
        for rank in range(size):
            self.store.set(f"who {rank}", f"node{rank}, pid {100 + rank}")

    def arrive(self, *ranks):
        """Let these ranks enter their next collective call and wait there."""
        for rank in ranks:
            self.progress[rank].calls += 1
            self.progress[rank].since = self.time

    def go_on(self):
        for progress in self.progress:
            progress.since = None

    def pass_time(self, seconds, *, working=(), silent=()):
        for _ in range(int(seconds / 30)):
            self.time += 30
            for rank, each in enumerate(self.watches):
                self.progress[rank].work += rank in working
                if rank not in silent:
                    each.look(self.store)


@pytest.fixture
def ranks(monkeypatch):
    return Ranks(3, monkeypatch)


def test_the_first_rank_names_those_that_have_not_arrived(ranks):
    ranks.arrive(0, 1, 2)
    ranks.pass_time(60)
    ranks.go_on()
    ranks.arrive(0, 2)
    ranks.pass_time(270)
    assert ranks.said == []
    ranks.pass_time(60)
    who = "rank 1 (node1, pid 101); still waiting"
    assert ranks.said == [(0, f"NOTICE: rank 0 has been waiting for 5 minutes for {who}")]
    ranks.pass_time(240)
    assert len(ranks.said) == 1
    ranks.pass_time(6000)
    assert [line.split(" for ")[1] for _, line in ranks.said] == [f"{n} minutes" for n in (5, 10, 20, 40, 80)]
    assert {rank for rank, _ in ranks.said} == {0}


def test_the_lowest_of_the_others_reports_when_the_first_hangs(ranks):
    ranks.arrive(1, 2)
    ranks.pass_time(330)
    assert ranks.said == [
        (1, "NOTICE: rank 1 has been waiting for 5 minutes for rank 0 (node0, pid 100); still waiting")
    ]


def test_several_are_named_in_one_line(ranks):
    ranks.arrive(1)
    ranks.pass_time(330)
    assert [line.split(" for ")[-1] for _, line in ranks.said] == [
        "rank 0 (node0, pid 100), rank 2 (node2, pid 102); still waiting"
    ]


def test_a_rank_at_work_and_short_waits_are_not_reported(ranks):
    ranks.arrive(0, 2)
    ranks.pass_time(3000, working=[1])
    for _ in range(20):
        ranks.go_on()
        ranks.arrive(0, 1, 2)
        ranks.pass_time(270)
    assert ranks.said == []


@pytest.mark.parametrize("arrived", [True, False])
def test_a_rank_whose_process_has_stopped_is_named_wherever_that_was(ranks, arrived):
    ranks.arrive(*[0, 1, 2][: 2 + arrived])
    ranks.pass_time(30)
    ranks.pass_time(300, silent=[2])
    assert [line.split(" for ")[-1] for _, line in ranks.said] == ["rank 2 (node2, pid 102); still waiting"]


def test_a_connection_that_hangs_is_blamed_on_no_rank(ranks):
    ranks.arrive(0, 1, 2)
    ranks.pass_time(330)
    assert [rank for rank, _ in ranks.said] == [0]
    assert "although all ranks have arrived; their devices or the connections" in ranks.said[0][1]


def test_the_thread_ends_with_its_store_and_on_leaving(monkeypatch):
    monkeypatch.setattr(watch, "LIMIT", 1e6)
    published, broken = dist.HashStore(), itertools.count()

    def unreachable():
        next(broken)
        raise dist.DistNetworkError("connection refused")

    for connect in (lambda: published, unreachable):
        with Watch(connect, 0, 2, Progress(), print) as entered:
            pass
        assert not entered._thread.is_alive()
    assert published.get("0") == b"0 0 1"
    assert next(broken) == 1
