"""The report of a pretraining run: what its frozen features were worth, their map, and nearest neighbours."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("jinja2", reason="needs noisyssl[report]")
pytest.importorskip("matplotlib", reason="needs noisyssl[report]")

from noisyssl import evaluation
from noisyssl.benchmarks import features, history, plots
from noisyssl.benchmarks.report import write_report

CLASSES = ("benign", "_malignant", "<script>alert(1)</script>")
COUNT, QUERIES, NEAREST = 60, 4, 3


@pytest.fixture
def run(tmp_path):
    """A finished pretraining run; sample i is of class i % 3, the last 30 are validation images."""
    rng, labels = np.random.default_rng(0), np.arange(COUNT) % 3
    rows = ["path,label,split,group,digest"]
    for i in range(COUNT):
        path = tmp_path / "images" / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).save(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        rows.append(f"{path.name},,{'train' if i < 30 else 'val'},{i},{digest}")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "samples.csv").write_text("\n".join(rows) + "\n")
    (folder / "config.toml").write_text(
        f'[data]\npath = "{tmp_path / "images"}"\n[pretrain]\nmethod = "vicreg"\nepochs = 4\n'
    )
    logits = rng.normal(size=(30, 3))
    logits[np.arange(30), labels[30:]] += 2
    figures = evaluation.figures(logits, labels[30:], np.arange(30), CLASSES, resamples=50).to_json()
    spread = {"effective_rank": 20.5, "std": 0.05, "full_std": 0.0625}
    metrics = {
        "stage": "pretrain", "method": "vicreg", "loss": 5.125,
        "probe": {
            "knn": figures, "linear": figures, "k": 20, "strength": 0.01, "features": spread,
            "embedding": spread, "images": {"train": 30, "val": 30}, "collapsed": False,
        },
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(metrics))
    log = [
        {"kind": "step", "step": i, "epochs": 4, "progress": i / 8, "loss": 5 / i, "lr": 1e-3,
         "grad_norm": 1.0, "variance": 0.5, "off_diagonal": 0.1, "images_per_s": 9.0, "seconds": i}
        for i in range(1, 9)
    ]  # fmt: skip
    for epoch in (0, 2, 4):
        score = {"balanced_accuracy": 0.3 + 0.1 * epoch, "accuracy": 0.5}
        log.append({"kind": "probe", "epoch": epoch, "step": 2 * epoch, "knn": score, **spread})
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    near = rng.integers(0, 30, (QUERIES, NEAREST))
    arrays(folder, near_index=near, near_label=labels[near])
    return folder


@pytest.fixture
def quick(run, monkeypatch):
    """The same run, whose plots are not drawn: that takes seconds."""
    for name in ("curves", "scatter"):
        monkeypatch.setattr(plots, name, lambda *values, **options: "<svg></svg>")
    return run


def arrays(folder: Path, **changed) -> None:
    """The run's `probe.npz` with some arrays changed."""
    path, labels = folder / "probe.npz", np.arange(COUNT) % 3
    near = np.zeros((QUERIES, NEAREST), np.int64)
    made = {
        "classes": np.array(CLASSES), "map": np.random.default_rng(1).normal(size=(COUNT, 2)),
        "map_index": np.arange(COUNT), "map_label": labels, "query_index": np.arange(30, 30 + QUERIES),
        "query_label": labels[30 : 30 + QUERIES], "near_index": near, "near_label": near,
        "near_cosine": np.full((QUERIES, NEAREST), 0.875),
    }  # fmt: skip
    if path.exists():
        with np.load(path) as stored:
            made = dict(stored)
    np.savez(path, **made | changed)


def page_of(run: Path, **options) -> str:
    return write_report(run, **options).read_text()


def test_the_page_shows_what_the_features_were_worth(run):
    page = page_of(run)
    knn = json.loads((run / "metrics.json").read_text())["probe"]["knn"]["balanced_accuracy"]
    assert f'<div class="number">{knn["value"]:.3f}</div>' in page
    for title in (
        "Balanced accuracy on validation images", "Effective rank", "Gradient norm", "Training loss",
        "Term of the loss: variance", "Term of the loss: off diagonal",
    ):  # fmt: skip
        assert f"<figcaption>{title}</figcaption>" in page
    assert "Standard deviation" in page
    assert "20 nearest training images vote" in page
    assert "logistic regression, C = 0.010" in page
    assert "collapsed: all images look nearly the same" not in page
    assert not re.findall(r"(?:https?:)?//[a-z]", re.sub(r"base64,[^\"]*", "", page))


def test_neighbours_are_marked_right_or_wrong(quick):
    page = page_of(quick)
    assert page.count("<img") == QUERIES * (1 + NEAREST)
    with np.load(quick / "probe.npz") as stored:
        same = int((stored["near_label"] == stored["query_label"][:, None]).sum())
    assert 0 < same < QUERIES * NEAREST
    assert page.count('class="right">✓ ') == same
    assert page.count('class="wrong">✗ ') == QUERIES * NEAREST - same
    assert page.count(">0.875<") == QUERIES * NEAREST
    assert "a validation image, which was not trained on" in page


def test_hostile_names_stay_text_and_every_class_is_in_the_legend(run):
    page = page_of(run)
    assert "<script" not in page
    svg = features.drawn(features.load(run / "probe.npz"))
    for name in ("benign", "_malignant", "&lt;script&gt;alert(1)&lt;/script&gt;"):
        assert svg.count(f"> {name}</text>") == 1, "matplotlib leaves names with an underscore out"


def test_a_collapse_is_said_on_top(quick):
    metrics = json.loads((quick / "metrics.json").read_text())
    metrics["probe"]["collapsed"] = True
    (quick / "metrics.json").write_text(json.dumps(metrics))
    assert "The features collapsed" in page_of(quick)


def test_without_labels_there_are_map_and_neighbours_and_no_marks(quick):
    metrics = json.loads((quick / "metrics.json").read_text())
    probe = {name: metrics["probe"][name] for name in ("features", "embedding", "collapsed")}
    metrics["probe"] = probe | {"images": {"train": 30, "val": 0}}
    (quick / "metrics.json").write_text(json.dumps(metrics))
    unknown = np.full((QUERIES, NEAREST), -1)
    arrays(
        quick,
        classes=np.array([""]),
        map_label=np.full(COUNT, -1),
        query_label=unknown[:, 0],
        near_label=unknown,
    )
    page = page_of(quick)
    assert '<div class="number">5.125</div>' in page
    assert "no labelled validation images" in page
    assert "✓" not in page
    assert "✗" not in page
    assert page.count("<img") == QUERIES * (1 + NEAREST)
    assert "a training image, as none is held out" in page


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"map": np.full((COUNT, 2), np.nan)}, "does not hold what a run writes"),
        ({"map_label": np.full(COUNT, 7)}, "does not hold what a run writes"),
        ({"near_label": np.full((QUERIES, NEAREST), -2)}, "does not hold what a run writes"),
        ({"near_index": np.zeros((QUERIES, 2), int)}, "does not hold what a run writes"),
        ({"classes": np.array([{"a": 1}], dtype=object)}, "cannot be read"),
        (
            {"map": np.zeros((0, 2)), "map_index": np.zeros(0, int), "map_label": np.zeros(0, int)},
            "fewer than 10",
        ),
    ],
)  # fmt: skip
def test_a_broken_or_empty_part_is_left_out_with_a_line(quick, changed, line):
    arrays(quick, **changed)
    assert line in page_of(quick)


def test_a_run_without_looks_says_so(quick):
    (quick / "probe.npz").unlink()
    page = page_of(quick)
    assert "probe.npz is not there; the probe was off" in page
    assert "<img" not in page


def test_moved_images_are_found_with_data(quick, tmp_path):
    (tmp_path / "images").rename(tmp_path / "moved")
    assert "Nearest neighbours are left out" in page_of(quick)
    assert page_of(quick, data=tmp_path / "moved").count("<img") == QUERIES * (1 + NEAREST)


def test_a_look_that_a_killed_run_repeated_is_drawn_once(monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "curves", lambda lines, **more: drawn.append(lines) or "")
    base = {"kind": "probe", "std": 0.01, "full_std": 0.1, "effective_rank": 9.0}
    log = [
        base | {"epoch": epoch, "knn": {"balanced_accuracy": b}}
        for epoch, b in ((0, 0.1), (5, 0.2), (5, 0.3))
    ]
    titles = [title for title, _ in history.looks([*log, {"kind": "probe", "epoch": "x"}])]
    assert titles[0] == "Balanced accuracy on validation images"
    (knn,), (rank,), (share,) = drawn
    assert (knn.name, knn.x, knn.y) == ("k-NN", [0, 5], [0.1, 0.3])
    assert rank.y == [9.0, 9.0]
    assert share.y == pytest.approx([0.1, 0.1])


def test_a_map_tells_classes_apart_by_colour_and_marker():
    labels = np.repeat(np.arange(-1, 25), 3)
    points = np.random.default_rng(0).normal(size=(len(labels), 2))
    svg = plots.scatter(points, labels, [f"class {i}" for i in range(25)])
    assert svg.count("</text>") == plots.MOST_TOLD + 1
    assert "other classes" in svg
    assert not re.search(r"#0[0-9]{5}\b", svg)
    kinds = {(plots.TOLD[i % 7], plots.MARKERS[(i + i // 7) % 7]) for i in range(plots.MOST_TOLD)}
    assert len(kinds) == plots.MOST_TOLD
    assert plots.scatter(points, np.full(len(points), -1), [""]).count("</text>") == 0
