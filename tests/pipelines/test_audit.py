"""The audit: who judges whom, what comes out, and a table of decisions that is applied to the data."""

import csv
import json
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image

from noisyssl import baselines
from noisyssl.cli import run as cli
from noisyssl.errors import DataError
from noisyssl.pipelines import audit as audits
from noisyssl.pipelines.audit import judged, out_of_sample
from noisyssl.pipelines.scan import open_samples

N, C = 600, 3


def problem(rate=0.2, seed=0):
    """Features that tell the classes well, groups of three, some labels wrong."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, C, N)
    features = rng.standard_normal((N, 12)) + 2.5 * np.eye(C, 12)[truth]
    wrong = rng.random(N) < rate
    labels = np.where(wrong, (truth + rng.integers(1, C, N)) % C, truth)
    groups = np.array([f"g{i // 3}" for i in range(N)])
    return features, labels, groups, wrong


def test_wrong_labels_come_first_and_their_share_is_estimated():
    features, labels, groups, wrong = problem()
    found = judged(features, labels, groups, np.arange(N), C)
    order = found.order()
    assert (np.diff(found.score[order]) <= 0).all()
    assert wrong[order[: N // 10]].mean() > 0.9
    value, low, high = found.rate
    assert low < wrong.mean() < high
    assert abs(value - wrong.mean()) < 0.05
    np.testing.assert_allclose(found.matrix.sum(1), 1)
    assert found.flagged.mean() == pytest.approx(wrong.mean(), abs=0.07)


def test_nobody_is_judged_by_a_model_that_saw_its_group(monkeypatch):
    features, labels, groups, _ = problem()
    seen = []

    def noted(learn, learnt, ask, classes, strength):
        seen.append(({*map(tuple, learn)}, ask))
        return baselines.fit_predict(learn, learnt, ask, classes, strength)

    monkeypatch.setattr(audits, "penalty", lambda *_: 1.0)
    monkeypatch.setattr(audits, "fit_predict", noted)
    p = out_of_sample(features, labels, groups, C)
    np.testing.assert_allclose(p.sum(1), 1)
    group_of = dict(zip(map(tuple, features), groups, strict=True))
    assert len(seen) == audits.FOLDS
    assert sum(len(ask) for _, ask in seen) == N
    for learnt, asked in seen:
        assert not {group_of[row] for row in learnt} & {group_of[tuple(row)] for row in asked}


def test_a_class_in_too_few_groups_is_said(monkeypatch):
    features, labels, _, _ = problem()
    groups = np.where(labels == 2, "one", np.arange(N).astype(str))
    with pytest.raises(DataError, match="lies in too few groups"):
        out_of_sample(features, labels, groups, C)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Class folders of flat colours; one image in twelve lies in the wrong one."""
    root = tmp_path_factory.mktemp("audited")
    rng = np.random.default_rng(0)
    names, wrong = ("blue", "green", "red"), []
    for i in range(180):
        truth = i % 3
        pixels = np.full((24, 24, 3), 40, np.int64)
        pixels[..., 2 - truth] = 180
        pixels = np.clip(pixels + rng.integers(-40, 40, pixels.shape), 0, 255).astype(np.uint8)
        folder = names[truth if i % 12 else (truth + 1) % 3]
        (root / "set" / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / "set" / folder / f"{i}.png")
        if i % 12 == 0:
            wrong.append((f"{folder}/{i}.png", names[truth]))
    assert not cli(
        ["pretrain", str(root / "set"), "--out", str(root / "pre"), "--set", "backbone=resnet18-w16",
         "--size", "32", "--epochs", "1", "--batch", "32", "--set", "pretrain.probe_every=0",
         "--set", "threads=1"]
    )  # fmt: skip
    return root, dict(wrong)


@pytest.fixture(scope="module")
def audited(data):
    root, _ = data
    out = root / "audit"
    command = [
        "audit",
        str(root / "set"),
        "--features",
        str(root / "pre"),
        "--out",
        str(out),
        "--shown",
        "20",
    ]
    assert not cli([*command, "--flagged", "relabel"])
    return out


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_command_finds_what_lies_in_the_wrong_folder(data, audited):
    _, wrong = data
    rows = table(audited / "audit.csv")
    assert len(rows) == 180
    assert {row["path"] for row in rows[: len(wrong)]} == set(wrong)
    for row in rows[: len(wrong)]:
        assert row["suggested"] == wrong[row["path"]]
    assert rows[0]["decision"] == "relabel"
    assert {row["decision"] for row in rows[len(wrong) :]} == {"keep"}
    facts = json.loads((audited / "audit.json").read_text())
    assert facts["rate"]["low"] <= len(wrong) / 180 <= facts["rate"]["high"]
    page = (audited / "index.html").read_text()
    assert page.count('"picture"') == 20
    assert "http:" not in page
    assert "https:" not in page
    assert "@" not in page.split("<script>")[0].split("</style>")[1]


def test_decisions_are_applied_and_the_new_table_is_clean(data, audited):
    root, wrong = data
    rows = table(audited / "audit.csv")
    for row in rows[: len(wrong)]:
        row["decision"] = "relabel"
    rows[0]["decision"], dropped = "drop", rows[0]["path"]
    decided = root / "decided.csv"
    with decided.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows[:40])  # images that nobody looked at keep their label
    out = root / "new.csv"
    assert not cli(["data", "apply", str(root / "set"), str(decided), "--out", str(out)])
    samples = open_samples(out, labelled=True)
    assert len(samples) == 179
    assert f"set/{dropped}" not in samples.paths
    old = open_samples(root / "set", labelled=True)
    for path, label, split in zip(samples.paths, samples.labels, samples.splits, strict=True):
        own = path.removeprefix("set/")
        assert samples.classes[label] == wrong.get(own, own.split("/")[0])
        assert split == old.splits[old.paths.index(own)]


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (
            {"decision": "relable"},
            4,
            "is 'relable'; choose one of keep, relabel, drop. Did you mean 'relabel'?",
        ),
        ({"path": "red/none.png"}, 4, "decides about red/none.png, which the data do not have"),
        ({"label": "other"}, 4, "was made when"),
        (
            {"suggested": "purple", "decision": "relabel"},
            4,
            "is to become 'purple'; choose one of blue, green",
        ),
    ],
)
def test_a_table_that_does_not_fit_is_one_line_and_nothing_is_written(
    change, code, said, data, audited, capsys
):
    root, _ = data
    rows = table(audited / "audit.csv")
    rows[3] |= change
    decided = root / "bad.csv"
    with decided.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    out = root / "never.csv"
    assert cli(["data", "apply", str(root / "set"), str(decided), "--out", str(out)]) == DataError.code
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not out.exists()


def test_a_table_beside_the_images_and_a_class_without_any_are_refused(data, audited, tmp_path, capsys):
    root, _ = data
    out = tmp_path / "elsewhere.csv"
    assert cli(["data", "apply", str(root / "set"), str(audited / "audit.csv"), "--out", str(out)]) == 2
    assert "lies beside the images" in capsys.readouterr().err
    rows = table(audited / "audit.csv")
    for row in rows:
        row["decision"] = "drop" if row["label"] == "red" else "keep"
    decided = tmp_path / "drops.csv"
    with decided.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert (
        cli(["data", "apply", str(root / "set"), str(decided), "--out", str(root / "x.csv")])
        == DataError.code
    )
    assert "leaves class 'red' without training images" in capsys.readouterr().err


def test_a_bad_choice_and_an_old_folder_are_refused_at_once(data, audited, capsys):
    root, _ = data
    command = ["audit", str(root / "set"), "--features", str(root / "pre"), "--out"]
    assert cli([*command, str(root / "y"), "--flagged", "remove"]) == 2
    assert "--flagged 'remove' is unknown; choose one of drop, keep, relabel" in capsys.readouterr().err
    assert cli([*command, str(audited)]) == 2
    assert "already exists; give a new folder" in capsys.readouterr().err


def test_classes_whose_names_a_spreadsheet_would_run_stay_as_they_are(data, tmp_path):
    root, _ = data
    for i, path in enumerate(sorted((root / "set").rglob("*.png"))[:24]):
        target = tmp_path / "set" / ("+ve" if i % 2 else "-ve") / f"{i}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    decided = tmp_path / "audit.csv"
    rows = ["path,label,suggested,score,decision", "'+ve/1.png,'+ve,'-ve,0.9,relabel", "", ""]
    decided.write_text("\ufeff" + "\n".join(rows), encoding="utf-8")  # as a spreadsheet saves it
    for out in (tmp_path / "new.csv", tmp_path / "set" / "new.csv"):
        assert not cli(["data", "apply", str(tmp_path / "set"), str(decided), "--out", str(out)])
        samples = open_samples(out, labelled=True, allow_leaks=True)
        assert samples.classes == ("+ve", "-ve")
        moved = [
            samples.classes[k] for p, k in zip(samples.paths, samples.labels, strict=True) if "/1.png" in p
        ]
        assert moved == ["-ve"]
        out.unlink()


def test_the_next_step_works_whatever_the_data_are(data, tmp_path, capsys):
    root, _ = data
    packed, table = tmp_path / "my pack", tmp_path / "set" / "NEW.csv"
    shutil.copytree(root / "set", tmp_path / "set")
    assert not cli(["data", "pack", str(tmp_path / "set"), str(packed), "--size", "24"])
    array = open_samples(packed)
    np.savez(tmp_path / "a.npz", train_images=array.array, train_labels=array.labels[:, None])
    said = {}
    for source in (tmp_path / "set", packed, tmp_path / "a.npz"):
        out = tmp_path / f"{source.name} audit"
        capsys.readouterr()
        assert not cli(
            ["audit", str(source), "--features", str(root / "pre"), "--out", str(out), "--shown", "1"]
        )
        said[source] = capsys.readouterr().out.splitlines()[-1]
    assert "Next" not in said.pop(tmp_path / "a.npz")
    for line in said.values():
        words = shlex.split(line.partition(",")[0])[2:]
        assert not cli([{"SOURCE": str(tmp_path / "set"), "NEW.csv": str(table)}.get(w, w) for w in words])
        table.unlink()


def test_fewer_images_of_each_class_than_folds():
    features, labels, _, _ = problem()
    few = np.concatenate([np.flatnonzero(labels == k)[:3] for k in range(C)])
    p = out_of_sample(features[few], labels[few], np.arange(len(few)).astype(str), C)
    np.testing.assert_allclose(p.sum(1), 1)
