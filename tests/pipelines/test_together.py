"""Two processes (gloo) compute what one computes of the joined batch: every method, the loop, the loader."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from noisyssl.errors import ConfigError, DataError
from noisyssl.methods import METHODS
from noisyssl.pipelines.draws import order
from noisyssl.pipelines.launch import run_processes
from noisyssl.pipelines.schedule import Schedule, must_be_shared

SCRIPT = Path(__file__).with_name("together.py")
spec = importlib.util.spec_from_file_location("together", SCRIPT)
together = importlib.util.module_from_spec(spec)
spec.loader.exec_module(together)

BROKEN = 7


def ask(folder: Path, processes: int, *questions: str) -> None:
    assert run_processes([str(SCRIPT), str(folder), *questions], processes) == 0


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """What two processes wrote down: starting torch takes longer than all their answers."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "images").mkdir()
    for i in range(10):
        Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)).save(folder / "images" / f"{i}.png")
    (folder / "images" / f"{BROKEN}.png").write_bytes(b"no image")
    ask(
        folder,
        2,
        "methods",
        "training",
        "stopping",
        "poisoned",
        "dropping",
        "messages",
        "memories",
        "batches",
    )
    return folder


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def answers(folder: Path, question: str, processes: int = 2) -> list:
    return [json.loads((folder / f"{question}-{rank}.json").read_text()) for rank in range(processes)]


def distance(ours: dict, theirs: dict) -> float:
    """The norm of the difference relative to that of `theirs`, over all tensors."""
    off = sum((ours[name].double() - value.double()).square().sum() for name, value in theirs.items())
    return float((off / sum(value.double().square().sum() for value in theirs.values())).sqrt())


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_have_the_gradients_of_one(two, name):
    found, alone = load_file(two / f"{name}.safetensors"), together.gradients(name)
    assert found.keys() == alone.keys()
    gradients = {key: value for key, value in alone.items() if key.startswith("gradient.")}
    assert distance(found, gradients) < 1e-5
    whole = torch.stack([value.norm() for value in gradients.values()]).norm()
    for key, value in gradients.items():  # small ones too; the bias before a BatchNorm has none but rounding
        assert (found[key] - value).norm() < 1e-4 * value.norm() + 1e-6 * whole, key
    for key in alone.keys() - gradients.keys():  # running statistics, queues, centres
        torch.testing.assert_close(
            found[key], alone[key], rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}"
        )
    assert all(answer[name] for answer in answers(two, "methods")), "the processes' gradients differ"


def test_training_together_is_training_alone(two):
    """Accumulation, clipping, averaged weights, momentum; the terms in the log are means over processes."""
    log, tensors = together.training()
    found = load_file(two / "training.safetensors")
    assert found.keys() == tensors.keys()
    names = [name for name in tensors if not name.startswith("random") and tensors[name].is_floating_point()]
    assert any(name.startswith("average.") for name in names)
    assert distance(found, {name: tensors[name] for name in names}) < 1e-5
    for answer in answers(two, "training"):
        assert len(answer) == len(log) == 4
        for ours, theirs in zip(answer, log, strict=True):
            assert ours["agreement"] == pytest.approx(theirs["agreement"], abs=1e-6)
            for name in ("loss", "grad_norm", "lr"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
    strip = [
        [{k: v for k, v in e.items() if "s" != k[-1] or k == "loss"} for e in a]
        for a in answers(two, "training")
    ]
    assert strip[0] == strip[1]


def test_a_signal_to_one_stops_all_at_the_same_step(two):
    first, second = answers(two, "stopping")
    assert first == second
    within, between = first
    assert within == {"code": 143, "step": 3, "saved": [3]}  # asked after the second step, answered one later
    assert between == {"code": 143, "step": 2, "saved": [1, 2]}


def test_a_loss_that_is_no_number_in_one_process_stops_all_before_anything_moves(two):
    first, second = answers(two, "poisoned")
    assert first == second
    assert not first["moved"]
    assert "loss is nan at step 1 of 4, samples 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11;" in first["said"]


def test_a_file_that_breaks_for_one_process_is_dropped_by_all(two):
    answer = answers(two, "dropping")
    assert [one["dropped"] for one in answer] == [[BROKEN]] * 2
    for epoch in range(2):
        whole = order(0, epoch, np.arange(10)).tolist()
        batches = [[i for i in whole[k : k + 4] if i != BROKEN] for k in (0, 4)]
        expected = [batch[: len(batch) // 2 * 2] for batch in batches]  # three images: two, one for each
        shares = zip(*(one["seen"][epoch] for one in answer), strict=True)
        assert [first + second for first, second in shares] == expected
        assert all(
            len(first) == len(second)
            for first, second in zip(*(o["seen"][epoch] for o in answer), strict=True)
        )


def test_each_process_remembers_every_sample(two):
    """Memories by row of `samples.csv` are those of one process, whichever saw the sample last."""
    alone = together.memories()
    assert sorted(alone) == ["elr.targets", "sop.u", "sop.v"]
    for answer in answers(two, "memories"):
        for name, value in alone.items():
            torch.testing.assert_close(torch.tensor(answer[name]), torch.tensor(value), rtol=1e-5, atol=0)


def test_one_process_measures_the_batch_and_all_take_it(two):
    expected = {"batch": 64, "speeds": {"32": 1600.0, "64": 3200.0, "128": 3200.0}, "world": 2}
    assert answers(two, "batches") == [expected, expected]


def test_messages_arrive_whole_and_in_order(two):
    expected = {"heard": [{"rank": 0, "text": ""}, {"rank": 1, "text": "é"}]}
    assert answers(two, "messages") == [expected, expected]


def test_three_processes_resume_to_the_same_bits(tmp_path):
    """Of two numbers the sum has no order; of three it has, and DDP must not change it after a resume."""
    ask(tmp_path, 3, "resuming")
    for answer in answers(tmp_path, "resuming", 3):
        assert answer["same"]
        assert answer["from"] < answer["to"] - 1


@pytest.mark.slow
def test_compiled_training_together_agrees_with_eager(tmp_path):
    ask(tmp_path, 2, "compiling")
    for eager, compiled in answers(tmp_path, "compiling"):
        assert len(eager) == 4
        assert compiled == pytest.approx(eager, rel=1e-5)


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_shares_are_the_parts_of_the_one_batch(world):
    dropped = {3: "", 11: "", 12: ""}

    def slots(rank, world):
        schedule = Schedule(
            np.arange(40), batch=6, seed=1, shuffle=True, drop_last=True, rank=rank, world=world
        )
        found = []
        for slot in schedule.slots(0, 2, dropped):
            if slot.place[0] == 3:
                return found
            found.append(slot)

    alone = slots(0, 1)
    parts = [slots(rank, world) for rank in range(world)]
    assert len({tuple(slot.place for slot in part) for part in parts}) == 1
    by_place = {slot.place: np.concatenate([p[i].index for p in parts]) for i, slot in enumerate(parts[0])}
    for slot in alone:
        left = len(slot.index) // world * world
        assert by_place.get(slot.place, np.empty(0)).tolist() == slot.index[:left].tolist()


def test_a_schedule_with_nothing_left_to_share_ends():
    schedule = Schedule(np.arange(4), batch=2, seed=0, shuffle=True, drop_last=True, rank=1, world=2)
    with pytest.raises(DataError, match="3 of 4 samples were dropped"):
        next(schedule.slots(0, 0, dict.fromkeys((0, 1, 2), "")))


@pytest.mark.parametrize(("batch", "near"), [(33, "32 or 34"), (1, "2")])
def test_a_batch_that_cannot_be_shared_is_refused(batch, near):
    must_be_shared(4, 2)
    with pytest.raises(ConfigError, match=rf"batch is {batch} over 2 processes.*to {near}\."):
        must_be_shared(batch, 2)
