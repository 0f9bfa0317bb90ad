"""The accounts' arithmetic, and what all ranks together can tell about waiting."""

import random

import msgspec
import pytest
from synthetic import Meeting, simulate

from meshwright.account import (
    MEANINGS,
    MemoryAccount,
    Purpose,
    RunAccount,
    StepAccount,
    mean,
    split_waits,
)
from meshwright.account.uneven import uneven_seconds

RANDOM = random.Random(7)


def any_step() -> StepAccount:
    return StepAccount(**{name: RANDOM.uniform(0, 2) for name in StepAccount.__struct_fields__})


def any_run() -> RunAccount:
    floats = {name: RANDOM.uniform(0, 2) for name in RunAccount.__struct_fields__ if name != "steps"}
    return RunAccount(steps=any_step(), **floats)


def close(one: StepAccount | RunAccount, two: StepAccount | RunAccount) -> bool:
    return all(a == pytest.approx(b) for (_, a), (_, b) in zip(one.rows(), two.rows(), strict=True))


@pytest.mark.parametrize("make", [any_step, any_run])
def test_accounts_add_subtract_and_scale_field_by_field(make):
    a, b = make(), make()
    assert close((a + b) - b, a)
    assert close(a.scaled(2), a + a)
    assert (a + b).total() == pytest.approx(a.total() + b.total())
    assert (a - a).total() == pytest.approx(0)
    assert close(mean([a, b, a]), (a + b + a).scaled(1 / 3))
    assert sum(a.share(name) for name, _ in a.rows()) == pytest.approx(1)


def test_mean_of_nothing_is_refused_and_share_of_nothing_is_zero():
    with pytest.raises(ValueError, match="no accounts"):
        mean([])
    assert StepAccount().share("useful") == 0


def test_accounts_go_through_json_under_the_words_of_the_design():
    run = any_run()
    text = msgspec.json.encode(run)
    assert msgspec.json.decode(text, type=RunAccount) == run
    assert msgspec.to_builtins(run.steps)["comm.shard"] == run.steps.comm_shard
    assert dict(run.steps.rows())["comm.shard"] == run.steps.comm_shard
    memory = MemoryAccount(parameters=1.0, framework=2.0)
    assert msgspec.json.decode(msgspec.json.encode(memory), type=MemoryAccount) == memory
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'{"comm.shrad": 1.0}', type=StepAccount)


def test_every_bucket_has_a_meaning():
    assert list(MEANINGS) == [name for name, _ in StepAccount().rows()]


def test_a_step_account_closes_on_its_wall_time():
    account = StepAccount(useful=0.5, inefficiency=0.4, comm_shard=0.09, other=0.01)
    assert account.closes(1.0)
    assert not account.closes(1.1), "the buckets must sum to the wall time"
    assert not StepAccount(useful=0.97, other=0.03).closes(1.0), "too much is unexplained"
    assert not StepAccount(useful=1.1, host=-0.1).closes(1.0), "a bucket cannot be negative"
    assert StepAccount(useful=1.1, inefficiency=-0.1).closes(1.0), "kernels may beat the datasheet"


def test_a_run_account_yields_useful_over_paid():
    run = RunAccount(steps=StepAccount(useful=30.0, inefficiency=30.0), startup=30.0, idle=10.0)
    assert run.yield_() == pytest.approx(0.3)
    assert RunAccount().yield_() == 0


def test_lateness_comes_back_as_that_amount_on_the_right_rank():
    group = (0, 1, 2, 3)
    ranks = simulate(4, [Meeting("shard", group, 0.1, 0.02), Meeting("shard", group, 0.1, 0.02, {2: 0.05})])
    resolved = split_waits(ranks)
    for one in resolved:
        late = 0.0 if one.rank == 2 else 0.05
        assert one.account.straggler == pytest.approx(late)
        assert one.account.comm_shard == pytest.approx(0.04)
        assert one.blame == ({} if one.rank == 2 else {2: pytest.approx(0.05)})
        assert one.account.closes(one.wall_s)


def test_each_rank_late_once_is_blamed_once():
    group = (0, 1)
    meetings = [Meeting("replica", group, 0.1, 0.01, {0: 0.03}), Meeting("replica", group, 0.1, 0.01, {1: 0.02})]
    first, second = split_waits(simulate(2, meetings))
    assert first.blame == {1: pytest.approx(0.02)}
    assert second.blame == {0: pytest.approx(0.03)}


def test_blame_follows_the_chain_through_groups():
    # Rank 3 is slow; rank 2 waits for it in their shard group, and rank 0 for rank 2 in their replica group.
    meetings = [
        Meeting("shard", (0, 1), 0.1, 0.01),
        Meeting("shard", (2, 3), 0.1, 0.01, {3: 0.07}),
        Meeting("replica", (0, 2), 0.0, 0.02),
        Meeting("replica", (1, 3), 0.0, 0.02),
    ]
    resolved = split_waits(simulate(4, meetings))
    for one in resolved:
        assert one.blame == ({} if one.rank == 3 else {3: pytest.approx(0.07)}), one.rank


def test_blame_of_an_earlier_wait_is_not_charged_again():
    # Rank 3 holds everybody up in the world group; later rank 1 is late by itself within its shard group.
    meetings = [
        Meeting("control", (0, 1, 2, 3), 0.1, 0.01, {3: 0.05}),
        Meeting("shard", (0, 1), 0.1, 0.01, {1: 0.04}),
        Meeting("shard", (2, 3), 0.1, 0.01),
    ]
    blame = {one.rank: one.blame for one in split_waits(simulate(4, meetings))}
    assert blame[0] == {3: pytest.approx(0.05), 1: pytest.approx(0.04)}
    assert blame[1] == {3: pytest.approx(0.05)}
    assert blame[2] == {3: pytest.approx(0.05)}


def test_no_rank_is_blamed_for_its_own_waiting():
    # The delay of rank 1 reaches rank 3 through two groups; then rank 3 is late by itself and rank 1 waits for it.
    meetings = [
        Meeting("shard", (0, 1), 0.1, 0.01, {1: 0.05}),
        Meeting("replica", (0, 2), 0.1, 0.01),
        Meeting("shard", (2, 3), 0.21, 0.01),
        Meeting("replica", (1, 3), 0.01, 0.01),
        Meeting("replica", (1, 3), 0.1, 0.01, {3: 0.01}),
    ]
    resolved = split_waits(simulate(4, meetings))
    assert all(one.rank not in one.blame for one in resolved)
    assert resolved[1].blame[3] >= 0.01


def test_clocks_of_hosts_that_differ_do_not_show():
    group = (0, 1, 2, 3)
    meetings = [Meeting("replica", group, 0.1, 0.02, {1: 0.03})] * 5
    same = split_waits(simulate(4, meetings))
    apart = split_waits(simulate(4, meetings, hosts=("a", "a", "b", "b"), clocks={"a": 0.0, "b": 3600.0}))
    for one, other in zip(same, apart, strict=True):
        assert other.account.straggler == pytest.approx(one.account.straggler, abs=1e-6)
        assert other.blame.keys() == one.blame.keys()


def test_hosts_that_meet_only_through_a_third_or_a_later_rank_are_aligned_too():
    # Ranks 0 and 1 on host a, 2 and 3 on b, 4 and 5 on c: a meets b through ranks 1 and 3, b meets c through 2 and 4.
    meetings = [
        Meeting("shard", (0, 1), 0.1, 0.01),
        Meeting("shard", (2, 3), 0.1, 0.01),
        Meeting("shard", (4, 5), 0.1, 0.01),
        Meeting("replica", (1, 3), 0.1, 0.01, {3: 0.02}),
        Meeting("replica", (2, 4), 0.1, 0.01),
    ]
    hosts = ("a", "a", "c", "c", "b", "b")
    resolved = split_waits(simulate(6, meetings, hosts=hosts, clocks={"a": 5.0, "b": -70.0, "c": 900.0}))
    assert {one.rank: one.blame for one in resolved} == {
        0: {},
        1: {3: pytest.approx(0.02)},
        2: {},
        3: {},
        4: {},
        5: {},
    }


@pytest.mark.parametrize("seed", range(40))
def test_splitting_waits_moves_time_and_makes_none(seed):
    draw = random.Random(seed)
    replica, shard = draw.choice([(2, 2), (3, 2), (2, 4), (1, 5)])
    world = replica * shard
    shard_groups = [tuple(range(r * shard, (r + 1) * shard)) for r in range(replica)]
    replica_groups = [tuple(range(s, world, shard)) for s in range(shard)]
    meetings: list[Meeting] = []
    for _ in range(draw.randrange(1, 8)):
        purpose: Purpose = draw.choice(["shard", "replica", "control"])
        groups = {"shard": shard_groups, "replica": replica_groups}.get(purpose, [tuple(range(world))])
        for group in groups:
            late = {rank: draw.uniform(0, 0.05) for rank in group if draw.random() < 0.4}
            meetings.append(Meeting(purpose, group, draw.uniform(0, 0.1), draw.uniform(0, 0.02), late))
    ranks = simulate(world, meetings, hosts=[f"h{r // shard}" for r in range(world)], clocks={"h1": -11.5, "h2": 4.0})
    for measured, one in zip(ranks, split_waits(ranks), strict=True):
        assert one.account.total() == pytest.approx(measured.account.total())
        assert sum(one.blame.values()) == pytest.approx(one.account.straggler)
        assert all(seconds >= -1e-9 for name, seconds in one.account.rows() if name != "inefficiency")
        assert one.rank not in one.blame or one.blame[one.rank] == pytest.approx(0, abs=1e-9)


def test_a_rank_that_waited_under_its_compute_lost_nothing():
    ranks = simulate(2, [Meeting("shard", (0, 1), 0.1, 0.02, {1: 0.05})])
    hidden = msgspec.structs.replace(
        ranks[0],
        account=StepAccount(inefficiency=0.17),
        transfers=(msgspec.structs.replace(ranks[0].transfers[0], exposed=()),),
    )
    first, _ = split_waits([hidden, ranks[1]])
    assert first.account == hidden.account
    assert first.blame == {}


def test_a_rank_missing_from_the_record_leaves_the_others_splittable():
    ranks = simulate(3, [Meeting("shard", (0, 1, 2), 0.1, 0.02, {1: 0.05})])
    assert split_waits(ranks[:2])[0].blame == {1: pytest.approx(0.05)}
    assert split_waits([]) == []


def test_waiting_for_an_expert_with_more_tokens_is_imbalance_and_blames_nobody():
    # Rank 1's experts have 30 rows where rank 0's have 10, and take half of its time; the rest of its delay is its own.
    first, second = simulate(2, [Meeting("shard", (0, 1), 0.6, 0.01, {1: 0.5})])
    even = [msgspec.structs.replace(one, expert_rows=(20,), expert_share=0.5) for one in (first, second)]
    assert split_waits(even)[0].account.imbalance == 0
    rows = [
        msgspec.structs.replace(first, expert_rows=(10,), expert_share=0.25),
        msgspec.structs.replace(second, expert_rows=(30,), expert_share=0.5),
    ]
    waiting, late = split_waits(rows)
    explained = 1.1 * 0.5 * 20 / 30
    assert waiting.account.imbalance == pytest.approx(explained)
    assert waiting.account.straggler == pytest.approx(0.5 - explained)
    assert waiting.blame == {1: pytest.approx(0.5 - explained)}
    assert late.account.imbalance == 0 and late.blame == {}


def test_more_tokens_in_one_layer_are_not_made_up_for_in_another():
    one, other = simulate(2, [Meeting("shard", (0, 1), 1.0, 0.0)])
    one = msgspec.structs.replace(one, expert_rows=(10, 30), expert_share=0.5)
    other = msgspec.structs.replace(other, expert_rows=(30, 10), expert_share=0.5)
    assert uneven_seconds(one, other) == pytest.approx(1.0 * 0.5 * 20 / 40)
