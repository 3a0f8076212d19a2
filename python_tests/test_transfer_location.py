"""The arms whose weights differ within the classes, and training labels with errors."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("monai", reason="needs the extra 'finetune'")
pytest.importorskip("benchmarks", reason="needs the repository's root on the path")

from finetune_data import write_cases
from scipy.stats import multivariate_normal
from transfer_data import TOY

import riskmap_ext
from benchmarks.transfer import location, work
from benchmarks.transfer.arms import ARMS, PLACED, WEIGHTS
from benchmarks.transfer.noise import mislabelled
from benchmarks.transfer.scenario import Noise, load_scenarios
from benchmarks.transfer.sources import Sources
from riskmap_ext.finetune.data.prepare import class_voxels
from riskmap_ext.finetune.train.finetune import finetune
from riskmap_ext.finetune.train.step import sqrt_inverse_frequency

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 3


class Labelled:
    """Of a Case what the weights need; some voxels are ignored."""

    def __init__(self, name: str) -> None:
        self.name, self.digest = name, name
        self.label = torch.randint(-1, CLASSES, (6, 5, 4), dtype=torch.int16)
        self.label[self.label < 0] = -100


class KnownFeatures:
    """Sources that have classes somewhat apart in three features."""

    num_classes = CLASSES

    def __init__(self, cases: list[Labelled]) -> None:
        self.digests = [str(id(self))]
        centres = 2 * torch.randn(CLASSES, 3)
        self.found = {
            case.name: centres[case.label.long().clamp(min=0)].movedim(-1, 0)
            + torch.randn(3, 6, 5, 4)
            for case in cases
        }

    def features(self, cases: list[Labelled]) -> dict[str, torch.Tensor]:
        return {case.name: self.found[case.name] for case in cases}

    def likelihoods(self, cases: list[Labelled]) -> list[dict[str, torch.Tensor]]:
        return [{case.name: torch.rand(6, 5, 4) for case in cases} for _ in range(3)]


@pytest.fixture
def study() -> SimpleNamespace:
    torch.manual_seed(3)
    cases = [Labelled(name) for name in "abc"]
    maps = SimpleNamespace(
        transferability={case.name: -3 * torch.rand(6, 5, 4) for case in cases},
        risk={case.name: torch.rand(6, 5, 4) for case in cases},
    )
    return SimpleNamespace(cases=cases, maps=maps, sources=KnownFeatures(cases))


def together(study: SimpleNamespace, volumes: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([volumes[case.name].flatten() for case in study.cases])


@pytest.mark.parametrize(
    "weights", [ARMS[key].weights for key in PLACED if ARMS[key].weights and not ARMS[key].own_loss]
)
def test_factors_have_a_mean_of_one_in_each_class(study, weights):
    label = together(study, {case.name: case.label for case in study.cases})
    found = together(study, weights(study.maps, study.cases, study.sources))
    assert found.dtype == torch.float32
    assert (found[label == -100] == 0).all()
    for index in range(CLASSES):
        own = found[label == index]
        assert own.mean().item() == pytest.approx(1, abs=1e-5)
        assert own.min() > 0
        assert own.max() > own.min()


def test_class_means_keep_the_mean_of_each_class(study):
    label = together(study, {case.name: case.label for case in study.cases})
    risk = together(study, study.maps.risk)
    mean = together(study, location.class_means(study.maps, study.cases, study.sources))
    assert (mean[label == -100] == 0).all()
    for index in range(CLASSES):
        (value,) = mean[label == index].unique().tolist()
        assert value == pytest.approx(float(risk[label == index].mean()), abs=1e-6)


def test_output_and_doubt_are_reciprocal_powers(study):
    more, less = (
        together(study, weights(study.maps, study.cases, study.sources))
        for weights in (location.output, location.doubt_output)
    )
    label = together(study, {case.name: case.label for case in study.cases})
    likelihood = together(study, study.maps.transferability).exp()
    for index in range(CLASSES):
        own = label == index
        expected = likelihood[own].rsqrt() / likelihood[own].rsqrt().mean()
        torch.testing.assert_close(more[own], expected)
        product = more[own] * less[own]
        torch.testing.assert_close(product, product[:1].expand_as(product))


def test_gaussian_likelihood_is_that_of_the_densities(study):
    found = location.gaussian_likelihood(study.cases, study.sources)
    label = together(study, {case.name: case.label for case in study.cases}).numpy()
    features = np.concatenate(
        [study.sources.found[case.name].flatten(1).T.numpy() for case in study.cases]
    ).astype(np.float64)
    valid = label >= 0
    means = [features[label == index].mean(axis=0) for index in range(CLASSES)]
    apart = features[valid] - np.stack(means)[label[valid]]
    covariance = apart.T @ apart / valid.sum()
    covariance += 1e-3 * covariance.diagonal().mean() * np.eye(3)
    joint = np.stack(
        [
            (label[valid] == index).mean()
            * multivariate_normal(means[index], covariance).pdf(features[valid])
            for index in range(CLASSES)
        ]
    )
    expected = joint[label[valid], np.arange(valid.sum())] / joint.sum(axis=0)
    np.testing.assert_allclose(together(study, found).numpy()[valid], expected, rtol=1e-4)


def test_neighbour_likelihood_is_a_count_among_the_other_cases(study):
    found = location.neighbour_likelihood(study.cases, study.sources)
    every = together(study, {case.name: case.label for case in study.cases})
    frequency = torch.bincount(every[every >= 0].long()) / (every >= 0).sum()
    for case in study.cases:
        others = [each for each in study.cases if each is not case]
        features = torch.cat([study.sources.found[each.name].flatten(1).T for each in others])
        label = torch.cat([each.label.flatten() for each in others])
        features, label = features[label >= 0], label[label >= 0]
        own = study.sources.found[case.name].flatten(1).T.double()
        near = torch.cdist(own, features.double()).topk(15, largest=False).indices
        valid = case.label.flatten() >= 0
        votes = torch.stack([(label[near] == index).sum(dim=1) for index in range(CLASSES)], 1)
        joint = frequency * (votes + 1 / CLASSES)
        chance = joint / joint.sum(dim=1, keepdim=True)
        expected = chance.gather(1, case.label.flatten().long().clamp(min=0)[:, None])[:, 0]
        torch.testing.assert_close(found[case.name].flatten()[valid], expected[valid])
    alone = location.neighbour_likelihood(study.cases[:1], study.sources)
    assert set(alone) == {"a"}


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    logits = 2 * torch.randn(2, CLASSES, 8, 8)
    label = torch.randint(-1, CLASSES, (2, 8, 8), dtype=torch.int16)
    label[label < 0] = -100
    return logits.requires_grad_(), label, torch.ones(2, 8, 8, dtype=torch.bool)


def over_mean(values: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    factor = torch.zeros_like(values)
    for index in range(CLASSES):
        own = label == index
        factor[own] = values[own] / values[own].mean()
    return factor


def expected_loss(study, logits, label, foreground, likelihood, exponent=-0.5):
    """Class weights times the likelihood's power, over its mean in each class."""
    relative = over_mean(likelihood, label)
    return riskmap_ext.weighted_loss(
        logits,
        label,
        over_mean(relative.clamp(0.01, 100) ** exponent, label),
        weight=sqrt_inverse_frequency(class_voxels(study.cases, CLASSES)),
        foreground=foreground,
        dice_weight=1.0,
    )


@pytest.mark.parametrize(
    ("method", "exponent"), [(location.Refreshed, -0.5), (location.DoubtRefreshed, 0.5)]
)
def test_refreshed_is_leep_of_the_model_that_is_trained(study, method, exponent):
    loss = method(study.cases, CLASSES, 9)
    joint = torch.zeros(CLASSES, CLASSES, dtype=torch.float64)
    for seed in range(3):
        logits, label, foreground = batch(seed)
        joint = 0.95 * joint + riskmap_ext.leep_statistics(logits.detach(), label, CLASSES)
        chance = logits.detach().softmax(dim=1)
        rows = riskmap_ext.conditional(joint).float()[label.long().clamp(min=0)]
        likelihood = (rows.movedim(-1, 1) * chance).sum(dim=1)
        expected = expected_loss(study, logits, label, foreground, likelihood, exponent)
        found = loss(logits, label, None, foreground)
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(each, logits)[0] for each in (found, expected)]
        torch.testing.assert_close(*gradients)


def test_disagreement_is_the_source_over_the_model(study):
    logits, label, foreground = batch(0)
    likelihood = torch.rand(2, 8, 8).clamp(min=0.3)
    current = logits.detach().softmax(dim=1).gather(1, label.long().clamp(min=0)[:, None])[:, 0]
    given = (logits, label, likelihood, foreground)
    hard, apart = (
        method(study.cases, CLASSES, 9)(*given)
        for method in (location.Hardness, location.Disagreement)
    )
    torch.testing.assert_close(hard, expected_loss(study, logits, label, foreground, current))
    expected = expected_loss(study, logits, label, foreground, current / likelihood)
    torch.testing.assert_close(apart, expected)


def test_factors_do_not_hang_on_how_rare_a_class_is(study):
    """The likelihoods of a rare class are all small."""
    rare = {name: each - 6 for name, each in study.maps.transferability.items()}
    other: Any = SimpleNamespace(transferability=rare)
    for weights in (location.output, location.doubt_output):
        found = [
            together(study, weights(m, study.cases, study.sources)) for m in (study.maps, other)
        ]
        torch.testing.assert_close(*found)


@pytest.fixture
def place(tmp_path, monkeypatch) -> work.Place:
    write_cases(tmp_path / "data" / "toy", 6)
    monkeypatch.setenv("RISKMAP_DATA", str(tmp_path / "data"))
    noise = {"moved": 1.0, "voxels": 3, "omitted": 0.5}
    noisy = {"like": "toy", "title": "Wrong boxes", "target": {"test": 1}, "noise": noise}
    folder = tmp_path / "scenarios"
    folder.mkdir()
    for name, content in (("toy", TOY), ("wrong", noisy)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return work.Place(folder, tmp_path / "work", tmp_path / "rows")


def prepared(place: work.Place, scenario: str, arm: str):
    """Configuration, cases and sources of a run as `work` makes them."""
    known = load_scenarios(place.scenarios)[scenario]
    task = work.Task(scenario, 0, arm, "short", 0.01)
    config, own = work.run_config(known, ARMS[arm], task, place, place.work / "run")
    cases = work.prepare_cases(config)
    others = [work.source_of(known, 0, place, other) for other in (1, 2)]
    return config, cases, Sources(config, [own, *others], len(cases.classes))


def test_sources_agree_with_the_driver_and_differ_from_each_other(place):
    config, cases, sources = prepared(place, "toy", "place_output")
    kept = {}

    def weights(maps, train):
        kept.update(maps.transferability)
        return maps.risk

    finetune(config, cases=cases, progress=False, weights=weights)
    first, second, third = sources.likelihoods(cases.train)
    for case in cases.train:
        torch.testing.assert_close(first[case.name], kept[case.name].exp())
        assert not torch.equal(first[case.name], second[case.name])
        assert not torch.equal(second[case.name], third[case.name])
    assert len(set(sources.digests)) == 3
    features = sources.features(cases.train)
    for case in cases.train:
        assert features[case.name].shape[1:] == case.label.shape
        assert len(features[case.name]) > 2
    spread = torch.stack([each.flatten(1).var(dim=1) for each in features.values()]).mean(dim=0)
    torch.testing.assert_close(spread[spread > 0.5], torch.ones_like(spread[spread > 0.5]))
    assert (spread > 0.5).sum() > 2


def test_wrong_labels_are_for_training_alone(place):
    _, cases, _ = prepared(place, "wrong", WEIGHTS)
    noise = load_scenarios(place.scenarios)["wrong"].noise
    assert noise is not None
    wrong = mislabelled(cases, noise, 0)
    assert wrong.validation is cases.validation
    for clean, own in zip(cases.train, wrong.train, strict=True):
        assert (own.name, own.image is clean.image) == (clean.name, True)
        assert own.digest != clean.digest
        assert not torch.equal(own.label, clean.label)
        assert set(own.label.unique().tolist()) <= set(clean.label.unique().tolist())
        again = mislabelled(cases, noise, 0).train[wrong.train.index(own)]
        assert torch.equal(again.label, own.label)
        other = mislabelled(cases, noise, 1).train[wrong.train.index(own)]
        assert not torch.equal(other.label, own.label)
    moved = mislabelled(cases, Noise(moved=1, voxels=1, omitted=0), 0).train[0].label
    clean = cases.train[0].label
    for index in range(clean.shape[-1]):
        part = clean[..., index]
        shifted = torch.zeros(4, *part.shape, dtype=part.dtype)
        shifted[0, 1:], shifted[1, :-1] = part[:-1], part[1:]
        shifted[2, :, 1:], shifted[3, :, :-1] = part[:, :-1], part[:, 1:]
        assert any(torch.equal(moved[..., index], each) for each in shifted)
    none = mislabelled(cases, Noise(moved=0, voxels=1, omitted=1), 0).train[0].label
    assert set(none.unique().tolist()) <= {0, -100}


def test_a_run_with_wrong_labels_is_another_scenario(place):
    scenarios = load_scenarios(place.scenarios)
    toy, wrong = scenarios["toy"], scenarios["wrong"]
    assert wrong.source == toy.source
    assert (wrong.target.test, wrong.target.train) == (1, 2)
    arm = ARMS[WEIGHTS]
    assert work.setup_of(toy, "short", arm) != work.setup_of(wrong, "short", arm)
    for name in ("toy", "wrong"):
        for key in (WEIGHTS, "place_several"):
            work.do(work.Task(name, 0, key, "short", 0.01), place)
    found = place.store().read().runs
    pairs = {(row["scenario"], row["pair"]) for row in found}
    assert len(found) == 4
    assert len(pairs) == 2  # the arms of a scenario share all but the arm


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"like": "wrong"}, "wrong.yaml: like: wrong is like this file itself"),
        ({"like": "round"}, "wrong.yaml: like: round is like this file itself"),
        ({"like": "nothing"}, "wrong.yaml: like: no nothing.yaml beside it"),
        (["toy"], "wrong.yaml: expected keys of a scenario, got .'toy'."),
    ],
    ids=str,
)
def test_a_scenario_like_no_other_is_told(place, content, message):
    (place.scenarios / "round.yaml").write_text("like: wrong")
    (place.scenarios / "wrong.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        load_scenarios(place.scenarios)


def test_another_network_has_its_own_arguments_alone(place):
    network = {"name": "BasicUNet", "args": {"spatial_dims": 2}}
    other = {"like": "toy", "network": network, "train": {"batch_size": 1}}
    (place.scenarios / "other.yaml").write_text(yaml.safe_dump(other))
    scenarios = load_scenarios(place.scenarios)
    assert scenarios["other"].network == network
    assert scenarios["other"].train == scenarios["toy"].train | {"batch_size": 1}


def test_scenarios_with_wrong_labels_differ_in_nothing_else():
    scenarios = load_scenarios()
    for noisy, clean in (
        ("brain_ixi_noisy", "brain_ixi_own_source"),
        ("hippocampus_noisy", "hippocampus_4"),
        ("deep_structures_noisy", "deep_structures_4"),
    ):
        own, other = scenarios[noisy].definition, scenarios[clean].definition
        assert own.pop("noise")
        assert own == other
