"""Nodes with other data are refused, too few are waited for, a dead one's shard goes to a living one."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from conftest import Federation
from federations import Recorder, assert_equal_states
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from pictures import grey_pictures, one_pixel_changed

import ret_fl.roster
from ret_fl.config import RunConfig, Scalar
from ret_fl.data.sources import load_splits
from ret_fl.packing import pack_state
from ret_fl.strategy import FederationError

Tiny = Callable[..., RunConfig]
Federate = Callable[..., Federation]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return grey_pictures(tmp_path / "pictures")


@pytest.fixture
def from_pictures(tiny: Tiny, pictures: Path, tmp_path: Path) -> RunConfig:
    source: dict[str, Scalar] = {"data.source": "image-folder", "data.path": str(pictures), "data.limit": 0}
    return tiny(source, {"data.cache-dir": str(tmp_path / "cache"), "num-server-rounds": 1})


@pytest.fixture
def one_other_image(from_pictures: RunConfig, pictures: Path) -> tuple[str, list[str]]:
    """A copy of the pictures with one pixel changed, and the words that tell of it."""
    copy = one_pixel_changed(pictures, pictures.parent / "copy")
    own = load_splits(from_pictures.data).train.fingerprint
    other = load_splits(from_pictures.data.model_copy(update={"path": str(copy)})).train.fingerprint
    assert own != other
    return str(copy), [own[:16], other[:16], "data.path"]


def test_a_node_with_one_other_image_is_refused_and_the_sound_ones_go_on(
    from_pictures: RunConfig,
    federate: Federate,
    one_other_image: tuple[str, list[str]],
    flower_log: pytest.LogCaptureFixture,
) -> None:
    fed = federate(from_pictures)
    fed.grid.contexts[3].node_config["data-path"], words = one_other_image
    with flower_log.at_level(logging.WARNING):
        fed.run()
    assert [summary.partitions for summary in fed.rounds] == [{0: 0, 1: 0}]
    (line,) = {record.getMessage() for record in flower_log.records if "node refused" in record.getMessage()}
    assert all(word in line for word in ("partition=1", *words))


def test_too_few_nodes_with_the_runs_data_stop_it_before_training(
    from_pictures: RunConfig, federate: Federate, one_other_image: tuple[str, list[str]]
) -> None:
    fed = federate(from_pictures.model_copy(update={"min_nodes": 2}))
    fed.grid.contexts[3].node_config["data-path"], words = one_other_image
    with pytest.raises(FederationError) as stop:
        fed.run()
    for word in ("1 of min-nodes=2", *words):
        assert word in str(stop.value)
    assert not fed.rounds


def test_a_refused_node_that_was_away_and_is_mended_takes_part(
    from_pictures: RunConfig, federate: Federate, one_other_image: tuple[str, list[str]]
) -> None:
    fed = federate(from_pictures)
    node, grid = fed.grid.contexts[3], fed.grid
    node.node_config["data-path"], _ = one_other_image
    fed.strategy.roster.greet(grid)
    del node.node_config["data-path"], grid.contexts[3]
    assert fed.strategy.roster.living(grid) == [2]
    grid.contexts[3] = node
    assert fed.strategy.roster.living(grid) == [2, 3]


def test_a_node_that_never_says_who_it_is_is_asked_once_and_keeps_no_round_waiting(
    tiny: Tiny, federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ret_fl.roster, "HELLO_SECONDS", 0.2)
    fed = federate(tiny({"wait-seconds": 30, "num-server-rounds": 3}))
    push, pull, silent = fed.grid.push_messages, fed.grid.pull_messages, list[str]()

    def pushing(messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        ids = list(push(messages))
        silent.extend(i for i, m in zip(ids, messages, strict=True) if m.metadata.dst_node_id == 3)
        return ids

    fed.grid.push_messages = pushing  # type: ignore[method-assign]
    fed.grid.pull_messages = lambda ids: pull([i for i in ids if i not in silent])  # type: ignore[method-assign]
    fed.run()
    assert len(silent) == 1
    assert [set(summary.partitions.values()) for summary in fed.rounds] == [{0}] * 3
    fed.grid.pull_messages = pull  # type: ignore[method-assign]
    assert fed.strategy.roster.living(fed.grid) == [2, 3]  # it has answered after all


def test_a_node_with_the_same_images_elsewhere_takes_part(
    from_pictures: RunConfig, federate: Federate, pictures: Path
) -> None:
    copy = pictures.parent / "copy"
    shutil.copytree(pictures, copy)
    fed = federate(from_pictures)
    fed.grid.contexts[3].node_config["data-path"] = str(copy)
    final = fed.run()
    assert_equal_states(final, federate(from_pictures).run())


def test_a_node_that_gets_an_order_about_other_data_refuses_it(
    from_pictures: RunConfig, federate: Federate, pictures: Path
) -> None:
    fed = federate(from_pictures)
    fed.strategy.roster.greet(fed.grid)
    fed.strategy.fingerprint = "0" * 64
    messages = list(fed.strategy.configure_train(1, pack_state(fed.start), ConfigRecord(), fed.grid))
    reply = next(iter(fed.grid.send_and_receive(messages)))
    assert reply.has_error()
    assert "0" * 16 in reply.error.reason
    assert load_splits(from_pictures.data).train.fingerprint[:16] in reply.error.reason


def test_too_few_clients_end_the_wait(tiny: Tiny, federate: Federate) -> None:
    with pytest.raises(FederationError, match=r"2 of min-nodes=3.*wait-seconds"):
        federate(tiny({"min-nodes": 3})).run()


def test_clients_that_cannot_even_greet_are_waited_for_and_named(
    tiny: Tiny, federate: Federate, flower_log: pytest.LogCaptureFixture
) -> None:
    def broken(message: Message, context: Context) -> Message:
        raise OSError("no such folder")

    with flower_log.at_level(logging.WARNING), pytest.raises(FederationError, match="0 of min-nodes=1"):
        federate(tiny(), broken).run()
    assert "no such folder" in flower_log.text


def test_a_dead_nodes_shard_goes_to_a_living_one(tiny: Tiny, federate: Federate) -> None:
    seen = Recorder()
    fed = federate(tiny({"num-server-rounds": 2}), seen)
    whole = federate(tiny({"num-server-rounds": 2, "state-dir": str(tiny().state_dir) + "-other"})).run()
    note = fed._note

    def dies(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round == 1:
            del fed.grid.contexts[3]
        return note(server_round, arrays)

    fed._note = dies  # type: ignore[method-assign]
    final = fed.run()
    assert [node for node, order in seen.orders if order.round == 2] == [2, 2]
    assert_equal_states(final, whole)  # the same folder of proxies: nothing is lost


def test_without_any_living_node_the_run_stops(tiny: Tiny, federate: Federate) -> None:
    fed = federate(tiny())
    fed.strategy.roster.greet(fed.grid)
    fed.grid.contexts.clear()
    with pytest.raises(FederationError, match="0 of min-nodes=1"):
        fed.strategy.configure_train(1, pack_state(fed.start), ConfigRecord(), fed.grid)


def test_what_clients_answered_is_said_when_too_few_come(tiny: Tiny, federate: Federate) -> None:
    def client(message: Message, context: Context) -> Message:
        raise FileNotFoundError("photos is not a folder")

    with pytest.raises(FederationError, match="photos is not a folder"):
        federate(tiny(), client).run()
