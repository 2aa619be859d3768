"""What judges the samples of the shipped model: features with known answers give the known figures."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import emoji_judge, emoji_retrieval, retrieval
from benchmarks.emoji_judge import Data, Judge, load_data
from diffuse_jax import DDIMScheduler

STYLES = ("noto", "blob", "fluent", "twemoji")
CONCEPTS = 40


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def gallery(features: np.ndarray, families: int) -> retrieval.Images:
    """Images of every concept in every family, in this order."""
    concepts = np.repeat(np.arange(len(features) // families), families)
    return retrieval.Images(features, concepts, np.tile(np.arange(families), len(features) // families))


def recall(queries: retrieval.Images, real: retrieval.Images, k: int) -> float:
    scores = retrieval.concept_scores(queries, real, real.concepts.max() + 1)
    return float((retrieval.ranks(scores, queries.concepts) < k).mean())


def test_perfect_features_find_every_concept() -> None:
    real = gallery(np.repeat(np.eye(10, dtype=np.float32), 3, axis=0), families=3)
    assert recall(real, real, 1) == 1


def test_random_features_find_a_concept_by_chance(rng: np.random.Generator) -> None:
    real = gallery(unit(rng.standard_normal((60, 16))), families=3)
    queries = retrieval.Images(
        unit(rng.standard_normal((8000, 16))), rng.integers(0, 20, 8000), rng.integers(0, 3, 8000)
    )
    for k in (1, 5):
        wanted = k / 20
        deviation = np.sqrt(wanted * (1 - wanted) / 8000)
        assert recall(queries, real, k) == pytest.approx(wanted, abs=4 * deviation)


def test_an_image_is_never_compared_with_its_own_family(rng: np.random.Generator) -> None:
    """Its own drawing, the closest image there is, changes no score; without the rule every concept is found."""
    real = gallery(unit(rng.standard_normal((60, 16))), families=3)
    for family in range(3):
        asked, others = real.families == family, real.families != family
        queries = retrieval.Images(real.features[asked], real.concepts[asked], real.families[asked])
        with_own = retrieval.concept_scores(queries, real, 20)
        without = retrieval.Images(real.features[others], real.concepts[others], real.families[others])
        np.testing.assert_allclose(with_own, retrieval.concept_scores(queries, without, 20), atol=1e-6)
        assert with_own.max() < 0.999
        disguised = retrieval.Images(queries.features, queries.concepts, np.full(20, 7))
        assert recall(disguised, real, 1) == 1


def test_equal_scores_count_as_misses() -> None:
    real = gallery(np.ones((20, 1), np.float32), families=2)
    assert recall(real, real, 1) == 0
    assert recall(real, real, 9) == 0
    assert recall(real, real, 10) == 1


def test_a_concept_without_another_family_cannot_be_asked_for() -> None:
    real = retrieval.Images(np.eye(3, dtype=np.float32), np.array([0, 0, 1]), np.array([0, 1, 0]))
    with pytest.raises(ValueError, match="1 queries have no image of their concept in another family"):
        recall(real, real, 1)


def test_whitening_makes_components_alike(rng: np.random.Generator) -> None:
    features = rng.standard_normal((500, 6)) @ rng.standard_normal((6, 6)) + 3
    whiten = retrieval.fit_whitening(features, 4)
    white = (features - whiten.mean) @ whiten.axes
    np.testing.assert_allclose(white.T @ white / 500, np.eye(4), atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(whiten(features), axis=1), 1, atol=1e-6)
    with pytest.raises(ValueError, match="span fewer than 5 axes"):
        retrieval.fit_whitening(features[:4], 5)


def test_nearest_images_are_those_of_the_definition(rng: np.random.Generator) -> None:
    queries, references = rng.integers(0, 256, (2, 5, 4, 4, 3), np.uint8)
    difference = (queries[:, None] / 255.0 - references[None] / 255.0) ** 2
    wanted = np.sqrt(difference.mean(axis=(2, 3, 4)))
    index, distance = retrieval.nearest_by_pixels(queries, references)
    np.testing.assert_array_equal(index, wanted.argmin(1))
    np.testing.assert_allclose(distance, wanted.min(1), atol=1e-5)


def by_definition(x: np.ndarray, y: np.ndarray) -> float:
    """Equation 4 of Binkowski et al. 2018, pair by pair."""
    kernel = lambda a, b: (a @ b / len(a) + 1) ** 3
    among = lambda z: np.mean([kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j])
    return among(x) + among(y) - 2 * np.mean([kernel(a, b) for a in x for b in y])


def test_kernel_distance_equals_its_definition(rng: np.random.Generator) -> None:
    x, y = rng.standard_normal((7, 5)), rng.standard_normal((20, 5)) + 0.3
    distance = retrieval.kernel_distance(y)
    assert distance(x, np.ones(7)) == pytest.approx(by_definition(x, y), rel=1e-9)
    some = np.array([1.0, 1, 1, 0, 0, 1, 0])
    np.testing.assert_allclose(
        distance(x, np.stack([np.ones(7), some])), [by_definition(x, y), by_definition(x[some > 0], y)], rtol=1e-9
    )


def test_kernel_distance_is_zero_on_average_for_samples_of_the_same_kind(rng: np.random.Generator) -> None:
    distance = retrieval.kernel_distance(rng.standard_normal((2000, 4)))
    same = [distance(rng.standard_normal((30, 4)), np.ones(30)) for _ in range(200)]
    other = distance(rng.standard_normal((30, 4)) + 1, np.ones(30))
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(200) + 0.02
    assert min(same) < 0 < other
    assert other > 5 * np.std(same)


def test_intervals_are_those_of_a_proportion(rng: np.random.Generator) -> None:
    hits = (np.arange(400) < 120).astype(float)
    found = retrieval.estimate(retrieval.mean(hits), 400)
    half = 1.96 * np.sqrt(0.3 * 0.7 / 400)
    assert found["value"] == pytest.approx(0.3)
    np.testing.assert_allclose(found["interval"], [0.3 - half, 0.3 + half], atol=0.1 * half)
    # Drawn together, a share of itself is certain; a share of nothing is undefined.
    assert retrieval.estimate(retrieval.ratio(hits, hits), 400) == {"value": 1.0, "interval": [1.0, 1.0]}
    assert retrieval.estimate(retrieval.ratio(hits, 0 * hits), 400) is None


@pytest.fixture
def data(tmp_path: Path, rng: np.random.Generator) -> Data:
    """A folder like that of ``make_dataset.py``: each concept in four styles, every tenth pair held out."""
    lines: dict[str, list[str]] = {"train": [], "heldout": []}
    for n in range(CONCEPTS * len(STYLES)):
        concept, style = f"thing {n // len(STYLES)}", STYLES[n % len(STYLES)]
        split = "heldout" if n % 10 == 3 else "train"
        record = {"file_name": f"{n}.png", "label": concept, "style": style, "group": f"group {n // len(STYLES) % 4}"}
        (tmp_path / split).mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / split / f"{n}.png")
        lines[split].append(json.dumps(record))
    for split, records in lines.items():
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(records))
    return load_data(tmp_path)


@pytest.fixture
def features(data: Data, rng: np.random.Generator) -> np.ndarray:
    """Those of a good judge: a concept is recognised in any style."""
    of_concepts = rng.standard_normal((CONCEPTS, 48))
    return (of_concepts[data.concepts] + 0.1 * rng.standard_normal((len(data.records), 48))).astype(np.float32)


def test_missing_data_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"make_dataset.py --output_dir .*nowhere"):
        load_data(tmp_path / "nowhere")


def test_captions_are_chosen_by_the_seed(data: Data) -> None:
    for held in (False, True):
        every = data.choose(held, 1000, seed=0)
        assert len(every) == len(set(every)) == (data.held == held).sum()
        assert (data.held[every] == held).all()
        np.testing.assert_array_equal(data.choose(held, 5, seed=0), every[:5])
    assert data.choose(False, 5, seed=0).tolist() != data.choose(False, 5, seed=1).tolist()


def test_only_concepts_with_another_family_are_asked_for(data: Data) -> None:
    few = [r | {"label": "lonely"} if r["style"] in ("noto", "blob") else r for r in data.records]
    chosen = Data(few, data.images, data.held).choose(False, 1000, seed=0)
    assert len(chosen)
    assert not any(few[i]["label"] == "lonely" for i in chosen)


def test_sisters_are_training_images_of_the_same_family(data: Data) -> None:
    held = np.flatnonzero(data.held)
    trained = {(r["label"], r["style"]) for r in data.records if not r["held"]}
    sister = {"noto": "blob", "blob": "noto"}
    wanted = [(r["label"], sister.get(r["style"])) not in trained for r in (data.records[i] for i in held)]
    np.testing.assert_array_equal(data.without_sister(held), wanted)
    assert 0 < sum(wanted) < len(wanted)


def test_a_planted_copy_is_found(data: Data, features: np.ndarray, rng: np.random.Generator) -> None:
    judge = Judge(data, features, components=24)
    held = np.flatnonzero(data.held)
    images = rng.integers(0, 256, (len(held), 8, 8, 3), np.uint8)
    strange = rng.standard_normal((len(held), 48)).astype(np.float32)
    clean = judge.copies(images, strange, held)
    assert clean["near_copies_by_pixels"] == clean["near_copies_by_features"] == 0
    images[0], strange[0] = data.images[0] ^ 1, features[0]
    planted = judge.copies(images, strange, held)
    assert planted["near_copies_by_pixels"] == planted["near_copies_by_features"] == pytest.approx(1 / len(held))
    assert planted["own"] is None


def test_training_images_are_copies_of_their_own(data: Data, features: np.ndarray) -> None:
    chosen = data.choose(False, 20, seed=0)
    row = Judge(data, features, components=24).copies(data.images[chosen], features[chosen], chosen)
    assert row["own"] == row["near_copies_by_pixels"] == row["near_copies_by_features"] == 1
    assert row["pixel_distance_median"] == pytest.approx(0, abs=1e-3)


def test_chance_counts_the_concepts_of_the_gallery(data: Data, features: np.ndarray) -> None:
    chance = Judge(data, features, components=24).chance(data.choose(False, 20, seed=0))
    assert chance == pytest.approx({"R@1": 1 / CONCEPTS, "R@5": 5 / CONCEPTS, "group": 0.25})


class Pipe:
    """In place of a pipeline: the real image for a guidance scale of 5, and that of the next pair for any other."""

    def __init__(self, data: Data, scheduler: Any, calls: list[tuple[str, int, float]]) -> None:
        self.data, self.scheduler, self.calls = data, scheduler, calls
        self.components, self.params = {"vae": self}, {"vae": {}}

    def replace(self, scheduler: Any) -> Pipe:
        return Pipe(self.data, scheduler, self.calls)

    def __call__(self, captions: list[str], *, seed: list[int], output_type: str, **options: Any) -> SimpleNamespace:
        assert captions == [self.data.caption(i) for i in seed]
        steps, scale = options["num_inference_steps"], options["guidance_scale"]
        self.calls.append((type(self.scheduler).__name__, steps, scale))
        numbers = np.array(seed) if scale == 5 else (np.array(seed) + len(STYLES)) % len(self.data.images)
        return SimpleNamespace(images=self.data.images[numbers] / np.float32(255))

    def apply(self, variables: object, x: Any, method: str) -> Any:
        """An autoencoder whose reconstructions are 2 of 255 too dark, where that is possible."""
        return SimpleNamespace(mode=lambda: x - 4 / 255) if method == "encode" else x


def test_results_from_perfect_and_from_blind_samples(
    data: Data, features: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole command: samples that are the real images reach the ceiling, those of other concepts chance.

    The features of an image are those of the pair whose image is nearest to it.
    """

    def features_of(network: object, images: np.ndarray) -> np.ndarray:
        distance = np.abs(images[:, None].astype(int) - data.images).sum((2, 3, 4))
        return features[distance.argmin(1)]

    calls: list[tuple[str, int, float]] = []
    monkeypatch.setattr(emoji_retrieval, "load_data", lambda folder: data)
    monkeypatch.setattr(emoji_retrieval, "real_features", lambda images, network: features)
    monkeypatch.setattr(emoji_retrieval, "Judge", functools.partial(Judge, components=24))
    monkeypatch.setattr(emoji_retrieval.mobilenet_v2, "load", dict)
    monkeypatch.setattr(emoji_retrieval.mobilenet_v2, "features", features_of)
    opened = SimpleNamespace(from_pretrained=lambda model: Pipe(data, DDIMScheduler(), calls))
    monkeypatch.setattr(emoji_retrieval, "DiffusionPipeline", opened)

    def command(options: str) -> dict[str, list[dict[str, Any]]]:
        output = tmp_path / "results" / "toy.json"
        monkeypatch.setattr(sys, "argv", ["emoji_retrieval", *options.split(), "--output", str(output)])
        emoji_retrieval.main()
        names = ("", "_styles", "_copies", "_runs")
        return {name: json.loads(output.with_stem(f"toy{name}").read_text()) for name in names}

    found = command("--model toy --num_inference_steps 2 --guidance_scale 5 1")
    assert set(calls) == {("DDIMScheduler", 2, 5.0), ("DDIMScheduler", 2, 1.0)}
    assert found[""]["about"].startswith("`toy`, DDIMScheduler, 2 steps.")
    rows = {(r["captions"], r["images"], r["guidance"]): r for r in found[""]["rows"]}
    assert {split for split, _, _ in rows} == {"training pairs", "held-out pairs", "held-out, no sister"}
    for split in ("training pairs", "held-out pairs", "held-out, no sister"):
        assert rows[split, "renders", None]["R@1"]["value"] == rows[split, "samples", 5.0]["R@1"]["value"] == 1
        assert rows[split, "samples", 5.0]["R@1_of_ceiling"] == {"value": 1, "interval": [1, 1]}
        assert rows[split, "samples", 1.0]["R@1"]["value"] < 0.2
        assert rows[split, "chance", None]["R@1"] == pytest.approx(1 / CONCEPTS)
    assert sum(row["number"] for row in found["_styles"]["rows"]) == len(data.records)
    copies = {(row["captions"], row["images"], row["guidance"]): row for row in found["_copies"]["rows"]}
    assert {guidance for _, _, guidance in copies} == {None, 5.0, 1.0}
    assert copies["held-out pairs", "reconstructions", None]["PSNR"] == pytest.approx(20 * np.log10(255 / 2), abs=0.1)

    calls.clear()
    again = command("--label other --scheduler DPMSolverMultistep --num_inference_steps 3 --guidance_scale 5")
    assert set(calls) == {("DPMSolverMultistepScheduler", 3, 5.0)}
    runs = again["_runs"]["rows"]
    assert runs[:2] == found["_runs"]["rows"]
    assert [[row[name] for name in emoji_retrieval.RUN] for row in runs] == [
        ["toy", "DDIMScheduler", 2, 5.0],
        ["toy", "DDIMScheduler", 2, 1.0],
        ["other", "DPMSolverMultistepScheduler", 3, 5.0],
    ]
    for split in ("training", "held-out"):
        best, blind, _ = (row[f"{split}: R@1_of_ceiling"]["value"] for row in runs)
        assert best == 1 > 0.2 > blind


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--num_samples 1", "at least 2"),
        ("--num_inference_steps 0", "whole number of at least 1"),
        ("--guidance_scale nan", "finite number"),
        ("--seed -1", "at least 0"),
        ("--scheduler Unknown", "no scheduler is called 'Unknown'"),
        ("--output table.csv", "--output must end in .json"),
        ("--runs table.csv", "--runs must end in .json"),
    ],
)
def test_bad_options_are_refused_before_anything_is_read(
    options: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["emoji_retrieval", *options.split()])
    with pytest.raises(SystemExit):
        emoji_retrieval.main()
    assert said in capsys.readouterr().err


def test_real_features_are_read_again(
    data: Data, features: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One computation for the same images, another one for others."""
    calls: list[int] = []

    def compute(params: object, images: np.ndarray) -> np.ndarray:
        calls.append(len(images))
        return features[: len(images)]

    monkeypatch.setattr(emoji_judge, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(emoji_judge.mobilenet_v2, "features", compute)
    for images in (data.images, data.images, data.images[:7]):
        np.testing.assert_array_equal(emoji_judge.real_features(images, {}), features[: len(images)])
    assert calls == [len(data.images), 7]


def test_batches_are_all_of_one_size() -> None:
    sizes = []
    out = emoji_retrieval.in_batches(lambda x: sizes.append(len(x)) or 2 * x, np.arange(10), 4, "")
    np.testing.assert_array_equal(out, 2 * np.arange(10))
    assert sizes == [4, 4, 4]
