"""Who trains which shard: by speed, by where its moments are, and only nodes that live."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Federation, run_server
from hypothesis import given
from hypothesis import strategies as st

import clients.training
import ret_fl.roster
from ret_fl.config import RunConfig
from ret_fl.ledger import ShardLedger
from ret_fl.protocol import Hello
from ret_fl.roster import Roster

Tiny = Callable[..., RunConfig]
Federate = Callable[..., Federation]


def roster(speed: dict[int, float], home: dict[int, int] | None = None) -> Roster:
    """Nodes of partitions 0, 1, ... and their speeds; home: by shard, the partition it was trained in last."""
    nodes = {node: Hello(i, "cpu", "f", 1, 0.0) for i, node in enumerate(speed)}
    return Roster(RunConfig(), "f", nodes=nodes, speed=dict(speed), home=dict(home or {}))


@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=12),
    st.lists(st.floats(0.5, 500), min_size=1, max_size=5),
)
def test_every_shard_has_a_living_node_and_none_is_much_later_than_it_must(
    images: list[int], speeds: list[float]
) -> None:
    nodes = list(range(10, 10 + len(speeds)))
    found = roster(dict(zip(nodes, speeds, strict=True)))
    assigned = found.assign(images, nodes)
    assert sorted(assigned) == list(range(len(images)))
    assert set(assigned.values()) <= set(nodes)
    speed = {n: found.speed_of(n) for n in nodes}
    finish = {n: sum(images[k] for k, m in assigned.items() if m == n) / speed[n] for n in nodes}
    # no schedule ends before the work is spread evenly, or before the largest shard is done on the fastest node
    least = max(sum(images) / sum(speed.values()), max(images) / max(speed.values()))
    slack = ret_fl.roster.STAY_SECONDS * len(images)
    assert max(finish.values()) <= 2 * ret_fl.roster.STAY * least * 1.0001 + slack


def test_a_slow_node_gets_the_small_shard() -> None:
    assert roster({1: 10.0, 2: 100.0}).assign([30000, 2000], [1, 2]) == {0: 2, 1: 1}


def test_shards_stay_where_their_moments_are_unless_it_costs_too_much() -> None:
    assert roster({1: 100.0, 2: 110.0}, {0: 1, 1: 0}).assign([100, 100], [1, 2]) == {0: 2, 1: 1}
    assert roster({1: 100.0, 2: 1.0}, {0: 1, 1: 0}).assign([100, 100], [1, 2]) == {0: 1, 1: 1}
    # a node without a shard takes one of those that are together, however short they are
    assert roster({1: 100.0, 2: 100.0}, {0: 1, 1: 1}).assign([100, 100], [1, 2]) == {0: 2, 1: 1}
    # a few seconds are not worth fresh moments
    assert roster({1: 100.0, 2: 10.0}, {0: 1, 1: 0}).assign([100, 100], [1, 2]) == {0: 2, 1: 1}


@given(st.integers(1, 3), st.data())
def test_shards_of_nearly_one_size_stay_where_they_are(each: int, data: st.DataObject) -> None:
    """And before they are anywhere, nodes get as many each. (Three of ten seconds: within `STAY_SECONDS`.)"""
    sizes = data.draw(st.lists(st.integers(990, 1010), min_size=3 * each, max_size=3 * each))
    nodes, home = [7, 8, 9], {shard: shard % 3 for shard in range(3 * each)}
    expected = {shard: nodes[partition] for shard, partition in home.items()}
    assert roster(dict.fromkeys(nodes, 100.0)).assign(sizes, nodes) == expected
    assert roster(dict.fromkeys(nodes, 100.0), home).assign(sizes, nodes) == expected


def test_shards_find_their_moments_under_another_node_id() -> None:
    found = roster({1: 50.0, 2: 50.0})
    found.trained(0, 2, 100, 2.0)
    found.trained(1, 1, 100, 2.0)
    restarted = {n: Hello(i, "cpu", "f", 1, 50.0) for n, i in ((8, 0), (9, 1))}
    assert Roster(RunConfig(), "f", nodes=restarted, home=found.home).assign([100, 100], [8, 9]) == {0: 9, 1: 8}


def test_nodes_that_name_no_partition_keep_their_shards_while_they_are_the_same() -> None:
    found = roster({1: 50.0, 2: 50.0})
    found.nodes = dict.fromkeys((1, 2), Hello(-1, "cpu", "f", 1, 50.0))
    for shard, node in enumerate((1, 2)):
        found.trained(shard, node, 100, 2.0)
    assert found.assign([100, 101], [1, 2]) == {0: 1, 1: 2}


def test_a_node_gone_loses_its_shards_to_the_others() -> None:
    assigned = roster({1: 1.0, 2: 1.0, 3: 1.0}, {0: 0, 1: 1, 2: 2}).assign([9, 9, 9], [1, 3])
    assert (assigned[0], assigned[2]) == (1, 3)
    assert assigned[1] in (1, 3)


def test_a_node_that_was_far_behind_is_left_out_ever_longer_until_it_answers() -> None:
    found = roster({1: 1.0, 2: 1.0})

    def rounds_without_it() -> int:
        found.fell_behind(2)
        return next(i for i in range(100) if 2 in found.assign([9, 9], [1, 2]).values())

    assert [rounds_without_it() for _ in range(6)] == [1, 3, 7, 15, 15, 15]
    found.answered(2, 9, 1.0)
    assert rounds_without_it() == 1


def test_nodes_far_behind_get_work_where_there_are_no_others() -> None:
    found = roster({1: 1.0, 2: 1.0})
    found.fell_behind(1)
    found.fell_behind(2)
    assert found.assign([9, 9], [1, 2]) == {0: 1, 1: 2}


def test_a_node_that_says_it_took_no_time_does_not_get_all_shards() -> None:
    """Three nodes of 100 images a second; the third reports 1e-300 s, and answers no sooner than the others."""
    found = roster({})
    found.nodes = {node: Hello(i, "cpu", "f", 1, 0.0) for i, node in enumerate((1, 2, 3))}
    for _ in range(3):
        for shard, node in enumerate((1, 2, 3)):
            found.answered(node, 500_000, 5_000.0)
            found.trained(shard, node, 500_000, 1e-300 if node == 3 else 5_000.0)
    assert found.speed_of(3) == pytest.approx(100)
    dealt = list(found.assign([500_000] * 3, [1, 2, 3]).values())
    assert dealt.count(3) == 1
    found.nodes[4] = Hello(3, "cpu", "f", 1, 0.0)  # nothing is known of it
    assert found.speed_of(4) == pytest.approx(100)


def test_a_node_that_never_answered_is_no_faster_than_ten_of_the_others() -> None:
    found = roster({1: 100.0, 2: 120.0, 3: 1e308})
    assert found.speed_of(3) == 1000
    assert [float(w) for w in found.sizes(3, [1, 2, 3]).split(",")] == [100, 120, 1000]
    found.answered(3, 1000, 0.1)  # its word is borne out
    assert found.speed_of(3) == pytest.approx(10_000)


def test_an_answer_that_took_long_on_its_way_does_not_make_a_node_slow() -> None:
    """Else one that had to fetch its data first would get no shard again, and could not show how fast it is."""
    found = roster({1: 100.0, 2: 100.0})
    found.answered(1, 6000, 70.0)
    found.answered(2, 6000, 660.0)
    assert found.speed_of(2) == 100
    assert found.assign([6000] * 4, [1, 2]) == {0: 1, 1: 2, 2: 1, 3: 2}


def test_sizes_in_proportion_to_speed_end_together() -> None:
    weights = [float(w) for w in roster({1: 30.0, 2: 10.0}).sizes(3, [1, 2]).split(",")]
    assert weights == pytest.approx([15, 10, 15])


def test_shards_are_dealt_by_the_speed_that_nodes_measure(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = iter([300.0, 100.0])
    monkeypatch.setattr(clients.training, "images_per_second", lambda *_: next(speeds))
    run = run_server(tiny({"partition.sizes": "speed", "num-server-rounds": 1}), tmp_path / "run")
    assert ShardLedger.load(run.ledger).sizes().tolist() == [18, 6]


def test_a_node_measures_its_speed_only_when_asked(tiny: Tiny, federate: Federate) -> None:
    fed = federate(tiny())
    fed.strategy.roster.greet(fed.grid)
    assert not fed.strategy.roster.speed
    asked = federate(tiny())
    asked.strategy.roster.config = tiny({"partition.sizes": "speed"})
    asked.strategy.roster.greet(asked.grid)
    assert all(speed > 0 for speed in asked.strategy.roster.speed.values())
    assert len(asked.strategy.roster.speed) == 2
