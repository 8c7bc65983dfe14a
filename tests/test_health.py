"""The health check, on tracks whose faults are known because they were made so; nothing is trained."""

import math
import re
from dataclasses import replace

import pyro.distributions as dist
import pytest
import torch
from conftest import SMALL, make_guide, make_model
from torch import nn

from pyro_pixels._batch import object_mask
from pyro_pixels.data import ImageSequences
from pyro_pixels.evaluation.causes import film_causes, has_walls
from pyro_pixels.evaluation.film import standardised_innovations
from pyro_pixels.evaluation.health import EXPECTED, Health, check_health, format_health
from pyro_pixels.evaluation.health_words import CAUSES, SIGNS, Either, Way
from pyro_pixels.guides.base import Guide
from pyro_pixels.lgssm import kalman
from pyro_pixels.lgssm.dynamics import Dynamics, DynamicsConfig, dense_components, select_component
from pyro_pixels.model.pixel_model import PixelModel
from pyro_pixels.model.renderer import Renderer
from pyro_pixels.presets import PRESETS
from pyro_pixels.runs import build
from pyro_pixels.training.start_mixture import fit_starts
from pyro_pixels.worlds.base import simulate
from pyro_pixels.worlds.others import BouncingConfig, DriftConfig

N_SEQUENCES, T, SIDE = 60, 20, 12
SIGMA_A = 0.03**2
SIGMA_Q = 0.005  # standard deviation of the guide below


class GivenTracks(Guide):
    """q(a | v), narrow around given tracks (n, N, T, 2); the number of the sequence stands in its first frame."""

    def __init__(self, tracks, scale=SIGMA_Q):
        super().__init__()
        self.tracks, self.scale = tracks, scale

    def encode(self, images, n_objects):
        bits = images[:, 0, :, 0].long()
        index = (bits * 2 ** torch.arange(SIDE)).sum(1)
        mean = self.tracks[index, : int(n_objects.max())]
        return dist.Normal(mean, torch.as_tensor(self.scale).expand_as(mean), validate_args=False).to_event(2)


class FixedImage(nn.Module):
    """Draws the same image whatever the positions are."""

    height = width = SIDE

    def __init__(self, images):
        super().__init__()
        mean = images.double().mean((0, 1)).clamp(1e-4, 1 - 1e-4)
        self.logits = nn.Parameter(mean.logit().float())

    def forward(self, a, present):
        return self.logits.expand(*a.shape[:-3], a.shape[-2], SIDE, SIDE)


def make_dynamics(**changes):
    """Two ways to start, far apart, gravity, and hardly any state noise."""
    config = {"delta": 0.2, "state_noise": 1e-8, "position_noise": SIGMA_A, "position_noise_floor": 1e-12} | changes
    dynamics = Dynamics(DynamicsConfig(**config))
    K = dynamics.config.n_components
    mu = torch.tensor([[-0.6, 0.2, 0.3, -0.4], [0.6, 0.2, -0.3, -0.4]])[:K]
    dynamics.set_starts(
        -math.log(K) * torch.ones(K), mu, torch.diag(torch.tensor([0.02, 0.1, 0.05, 0.05])).repeat(K, 1, 1)
    )
    with torch.no_grad():
        dynamics.u.copy_(torch.tensor([0.0, 0.0, 0.0, 0.02]))
    return dynamics


def make_data():
    """Right half white, a number in the first column of the first frame; N is 1, 2, 3 in turn."""
    images = torch.zeros(N_SEQUENCES, T, SIDE, SIDE, dtype=torch.uint8)
    images[..., SIDE // 2 :] = 1
    images[:, 0, :, 0] = torch.arange(N_SEQUENCES).unsqueeze(1) // 2 ** torch.arange(SIDE) % 2
    return ImageSequences(images, 1 + torch.arange(N_SEQUENCES) % 3)


def draw(dynamics, seed=0):
    """A track for each object (n, 3, T, 2), less the noise that the guide will add."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        lgssm = dynamics.lgssm()
        z = dist.Categorical(probs=dynamics.pi).sample((N_SEQUENCES, 3))
        less_noise = lgssm.Sigma_A - SIGMA_Q**2 * torch.eye(2)
        return kalman.sample(select_component(lgssm, z)._replace(Sigma_A=less_noise), T)[1]


@pytest.fixture(scope="module")
def world():
    dynamics, data = make_dynamics(), make_data()
    return dynamics, draw(dynamics), data


def check(dynamics, tracks, data, **options):
    return check_health(PixelModel(dynamics, FixedImage(data.images)), GivenTracks(tracks), data, **options)


def names(health):
    """The measures that are out of range."""
    out = [n for n, (low, high) in EXPECTED.items() if not low <= health.measures[n] <= high]
    assert len(out) == len(health.problems)
    return set(out)


def test_tracks_from_the_prior_are_healthy(world):
    health = check(*world)
    assert health.ok, health.problems
    m = health.measures
    M = 2 * N_SEQUENCES  # tracks
    assert abs(m["innovation_mean_square"] - 1) < 6 * math.sqrt(2 / (2 * (T - 2) * M)) + 2e-4  # 2e-4: the tail cut off
    assert abs(m["innovation_autocorrelation"]) < 6 / math.sqrt(2 * (T - 3) * M)
    assert m["component_certainty"] > 0.999
    assert abs(m["smallest_component"] - 0.5) < 6 * 0.5 / math.sqrt(M)
    assert m["path_residual"] == pytest.approx(m["position_noise"], rel=0.1)
    assert m["unexplained_tracks"] < 0.01
    assert "no sign of failure" in format_health(health)


@pytest.mark.parametrize("changes", [{}, {"state_noise": 1e-3}, {"n_components": 1}], ids=["stiff", "loose", "K = 1"])
def test_innovations_of_prior_draws_are_white(changes):
    """Mean 0, mean square 1, no correlation in time or between coordinates, each within 6 standard errors."""
    dynamics = make_dynamics(**changes)
    K, n = dynamics.config.n_components, 1000
    torch.manual_seed(1)
    with torch.no_grad():
        lgssm = dynamics.lgssm()
        a = kalman.sample(lgssm, T, (n,))[1]  # (n, K, T, 2), from each component
        w = standardised_innovations(dynamics, a)  # each under each
        assert w.shape == (n, K, K, T, 2)
        w = torch.stack([w[:, k, k] for k in range(K)])
        assert float(w.mean(1).abs().max()) < 6 / n**0.5
        assert float((w.square().mean(1) - 1).abs().max()) < 6 * (2 / n) ** 0.5
        assert abs(float((w[..., 1:, :] * w[..., :-1, :]).mean())) < 6 / (K * n * (T - 1) * 2) ** 0.5
        assert abs(float(w.prod(-1).mean())) < 6 / (K * n * T) ** 0.5
        for k in range(K):  # what is left of log p(a | z = k) does not depend on a
            log_p = kalman.log_likelihood(select_component(lgssm, torch.tensor(k)), a[:, k])
            assert float((log_p + 0.5 * w[k].square().sum((1, 2))).std()) < 1e-6


def test_an_untrained_renderer(world):
    dynamics, tracks, data = world
    torch.manual_seed(0)
    health = check_health(PixelModel(dynamics, Renderer(SIDE, SIDE, 8)), GivenTracks(tracks), data)
    assert names(health) == {"bound_ratio"}
    assert "grey" in health.problems[0]


class Prior(Guide):
    """q(a | v) = p(a), for K = 1."""

    def __init__(self, dynamics):
        super().__init__()
        self.dynamics = dynamics

    def encode(self, images, n_objects):
        return dense_components(self.dynamics.lgssm(), images.shape[1]).expand([len(images), int(n_objects.max())])


class Grey(nn.Module):
    """Draws the best grey value for each N."""

    height = width = SIDE

    def __init__(self, data):
        super().__init__()
        shades = torch.stack([data.images[data.n_objects == n].double().mean() for n in (1, 2, 3)])
        self.logits = nn.Parameter(shades.logit())

    def forward(self, a, present):
        return self.logits[present.sum(-1) - 1, None, None, None].expand(-1, T, SIDE, SIDE)


@pytest.mark.parametrize("few", [60, 9], ids=["even", "uneven"])
def test_bound_ratio_is_relative_to_grey_whatever_the_mix(world, few):
    """1 for a model that draws a grey value for each N and a guide that is the prior."""
    dynamics, data = make_dynamics(n_components=1), world[2]
    images = data.images.clone()
    for n in (1, 2, 3):
        images[data.n_objects == n, :, : 2 * n] = 1  # another grey for each N
    number = torch.arange(N_SEQUENCES)
    some = ImageSequences(images, data.n_objects)[number[(number % 3 < 2) | (number < few)]]
    health = check_health(PixelModel(dynamics, Grey(some)), Prior(dynamics), some)
    assert health.measures["bound_ratio"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_noise_that_is_ten_times_wrong(world, factor):
    _, tracks, data = world
    health = check(make_dynamics(position_noise=factor * SIGMA_A), tracks, data)
    assert names(health) == {"innovation_mean_square"}
    found = health.measures["innovation_mean_square"]
    assert found > 6 if factor < 1 else found < 0.16  # not 10 and 0.1: the start has a say in the first frames
    assert ("too certain" if factor < 1 else "more uncertain") in health.problems[0]


def test_innovations_that_correlate(world):
    """Gravity that the dynamics lack, and noise that covers for it."""
    _, tracks, data = world
    t = torch.arange(T)
    wave = 0.1 * torch.sin(0.4 * t)[:, None] * torch.ones(2)
    health = check(make_dynamics(position_noise=0.07**2), tracks + wave, data)
    assert "innovation_autocorrelation" in names(health)


def test_identities_that_swap_halfway(world):
    dynamics, tracks, data = world
    swapped = tracks.clone()
    several = data.n_objects >= 2
    swapped[several, :2, T // 2 :] = tracks[several][:, [1, 0], T // 2 :]
    health = check(dynamics, swapped, data)
    assert "unexplained_tracks" in names(health)
    assert any("identities swap" in problem for problem in health.problems)


def test_a_few_lost_objects_are_not_blamed_on_the_noise(world):
    dynamics, tracks, data = world
    lost = tracks.clone()
    lost[::10, 0, T // 2 :] = 3.0
    health = check(dynamics, lost, data)
    assert 0.04 < health.measures["unexplained_tracks"] < 0.06
    assert abs(health.measures["innovation_mean_square"] - 1) < 0.1


@pytest.mark.parametrize("noise", ["Sigma_A", "Sigma_H"])
def test_a_folded_latent_space_that_noise_pays_for(world, noise):
    """|x| for x; with the noise grown until the innovations look calibrated the fold shows in the residuals alone."""
    _, tracks, data = world
    folded = torch.stack([tracks[..., 0].abs(), tracks[..., 1]], -1)
    grown = {"position_noise": 0.04**2, "state_noise": 4e-3} if noise == "Sigma_H" else {"position_noise": 0.15**2}
    health = check(make_dynamics(**grown), folded, data)
    assert "path_residual" in names(health)
    assert any("folded" in problem for problem in health.problems)


def test_one_coordinate_for_both(world):
    """y is a copy of x but for noise: whatever is along the missing direction is noise."""
    _, tracks, data = world
    line = torch.stack([tracks[..., 0], tracks[..., 0] + 0.03 * torch.randn(tracks.shape[:-1])], -1)
    assert "path_residual" in names(check(make_dynamics(), line, data))


def test_components_that_are_the_same(world):
    dynamics, tracks, data = world
    same = make_dynamics()
    whole = kalman.LGSSM(*dynamics.lgssm()).Sigma[0].float() + torch.diag(torch.tensor([0.36, 0, 0.09, 0]))
    same.set_starts(torch.tensor([0.5, 0.5]).log(), torch.tensor([[0.0, 0.2, 0, -0.4]] * 2), whole.repeat(2, 1, 1))
    health = check(same, tracks, data)
    assert "component_certainty" in names(health)
    assert health.measures["component_certainty"] == pytest.approx(0.5, abs=1e-4)


def test_a_component_that_is_not_used(world):
    dynamics, _, data = world
    skewed = make_dynamics()
    skewed.set_starts(torch.tensor([0.0, -30.0]), dynamics.mu, dynamics.lgssm().Sigma.float())
    health = check(skewed, draw(skewed), data)
    assert names(health) == {"smallest_component"}
    assert "0.0%" in health.problems[0]


def test_two_objects_that_are_the_same(world):
    dynamics, tracks, data = world
    same = tracks.clone()
    same[:, 1] = same[:, 0] + 0.01
    health = check(dynamics, same, data)
    assert names(health) == {"coinciding_objects"}
    assert health.measures["coinciding_objects"] == 1
    alone = data[data.n_objects == 1]
    assert check(dynamics, same, alone).measures["coinciding_objects"] == 0


def test_absent_objects_do_not_count(world):
    dynamics, tracks, data = world
    absent = ~object_mask(data.n_objects, 3)
    wild = tracks.masked_fill(absent[..., None, None], 1e3)
    assert check(dynamics, wild, data).measures == pytest.approx(check(dynamics, tracks, data).measures)


def test_one_component_is_never_a_problem(world):
    dynamics = make_dynamics(n_components=1)
    health = check(dynamics, draw(dynamics), world[2])
    assert health.ok, health.problems
    assert health.measures["component_certainty"] == health.measures["smallest_component"] == 1


def test_units_of_the_latent_space_do_not_matter(world):
    """Each axis stretched by another factor, tracks, dynamics and guide alike: every measure stays."""
    dynamics, tracks, data = world
    s = torch.tensor([40.0, 0.3], dtype=torch.float64)
    S, lgssm = torch.cat([s, s]), dynamics.lgssm()
    stretched = make_dynamics()
    scale_row = S.log().float()
    with torch.no_grad():
        stretched.u.copy_(lgssm.u * S)
        stretched.mu.copy_(lgssm.mu * S)
        for root in (stretched.root_Sigma_H, stretched.root_Sigma):  # both are diagonal: L S has log L + log S
            root += torch.diag(scale_row)
        stretched.root_Sigma_A += torch.diag(scale_row[:2])
    model = PixelModel(stretched, FixedImage(data.images))
    health = check_health(model, GivenTracks(tracks * s, SIGMA_Q * s), data)
    assert health.measures == pytest.approx(check(dynamics, tracks, data).measures, rel=1e-3, abs=1e-6)


def test_batches_and_seeds(world):
    """The draws depend on how sequences are batched, the rest does not; the same seed gives the same numbers."""
    dynamics, tracks, data = world
    whole, parts = check(dynamics, tracks, data), check(dynamics, tracks, data, batch_size=25)
    assert parts.measures == pytest.approx(whole.measures, rel=0.05, abs=0.01)
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    assert check(dynamics, tracks, data).measures == whole.measures
    torch.testing.assert_close(torch.rand(2), wanted, rtol=0, atol=0)
    assert check(dynamics, tracks, data, seed=1).measures != whole.measures


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize("where", ["guide", "dynamics"])
def test_what_is_not_finite_is_named_once(world, where):
    dynamics, tracks, data = make_dynamics(), *world[1:]
    if where == "guide":
        tracks = tracks * torch.nan
    else:
        dynamics.u.data.fill_(torch.nan)
    health = check(dynamics, tracks, data)
    assert len(health.problems) == 1
    assert "not finite" in health.problems[0]


def test_an_untrained_run_of_the_paper(small_data):
    health = check_health(make_model(), make_guide(), small_data, batch_size=5)
    assert not health.ok
    assert "bound_ratio" in names(health)
    text = format_health(health, details=True)
    assert all(name in text for name in health.measures)
    assert all(problem in text for problem in health.problems)


def test_four_frames_are_the_fewest(small_data):
    three, four = (ImageSequences(small_data.images[:, :n], small_data.n_objects) for n in (3, 4))
    assert all(math.isfinite(x) for x in check_health(make_model(), make_guide(), four).measures.values())
    with pytest.raises(ValueError, match="at least 4"):
        check_health(make_model(), make_guide(), three)


def test_no_labels_are_used(small_data):
    bare = ImageSequences(small_data.images, small_data.n_objects)
    assert check_health(make_model(), make_guide(), bare) == check_health(make_model(), make_guide(), small_data)


def test_ok_is_no_problems():
    assert Health({}, []).ok
    assert not Health({}, ["one"]).ok


@pytest.mark.parametrize("kind, linear", [(DriftConfig, True), (BouncingConfig, False)])
def test_walls_are_no_linear_motion(kind, linear):
    """True positions in a latent space that is no worse than affine: what is wrong with bouncing is the motion."""
    data = simulate(kind(n_frames=T, height=SIDE, width=SIDE, radius=1.0, position_noise=0.02), N_SEQUENCES, seed=0)
    tracks = data.positions.nan_to_num() * 2 / (SIDE - 1) - 1
    dynamics = make_dynamics(n_components=2 if linear else 1, position_noise=0.02 * 4 / (SIDE - 1) ** 2)
    with torch.no_grad():
        dynamics.u.zero_()
    present = tracks[object_mask(data.n_objects, 3)]
    fit_starts(dynamics, present)
    health = check(dynamics, tracks, ImageSequences(make_data().images, data.n_objects))
    if linear:
        assert health.ok, health.problems
    else:
        assert {"path_residual", "innovation_mean_square"} <= names(health)
        assert any("bounce off walls" in problem for problem in health.problems)
        assert "walls" in health.causes
    assert has_walls(present) != linear


def film(change):
    """A film of discs, changed, whose guide was never shown it."""
    data = simulate(DriftConfig(height=24, width=24, radius=2.5, n_frames=12), 30, seed=1)
    images = data.images.float()
    torch.manual_seed(0)
    return ImageSequences(change(images).clamp(0, 1), data.n_objects)


BRIGHT = torch.zeros(24, 24)
BRIGHT[2:6, 3:20] = 0.5


@pytest.mark.parametrize(
    "change, causes",
    [
        (lambda v: v, []),
        (lambda v: 1 - v, ["white"]),
        (lambda v: v + 0.05 * torch.randn_like(v), ["noise"]),
        (lambda v: torch.maximum(v, (torch.rand_like(v) < 0.02).float()), ["noise"]),
        (lambda v: torch.maximum(v, BRIGHT), ["background"]),
        (lambda v: v * (torch.arange(12) % 4 > 0)[:, None, None], ["come and go"]),
        (lambda v: torch.maximum(v, v.roll(12, -1).roll(12, -2)), ["come and go"]),
    ],
    ids=["clean", "white", "noise", "salt", "background", "missing", "more"],
)
def test_causes_that_the_film_shows(world, change, causes):
    assert film_causes(GivenTracks(world[1]), film(change)) == causes


def test_noise_that_the_guide_was_trained_with_is_no_cause(world):
    guide, data = GivenTracks(world[1]), film(lambda v: v + 0.05 * torch.randn_like(v))
    guide.look_at(data.images, data.n_objects)
    assert film_causes(guide, data) == []


def test_five_lines_in_the_terms_of_the_interface(world):
    dynamics, tracks, data = world
    same = tracks.clone()
    same[:, 1] = same[:, 0] + 0.01
    health = check(dynamics, same, data)._replace(causes=("noise",))
    library, script = (format_health(health, options=options).splitlines() for options in (False, True))
    for lines in (library, script):
        assert len(lines) == 5
        assert lines[0] == "health check: 1 sign of failure; likely cause: noise in the images"
        assert [line.split(":")[0].strip() for line in lines[1:]] == ["images", "motion", "objects", "to do"]
        assert "two on one object in 100% of the sequences" in lines[3]
    assert "look_at" in library[4]
    assert "--" not in "".join(library)
    assert "prepare.py" in script[4]
    assert "`" not in "".join(script)
    good = format_health(check(*world)).splitlines()
    assert (good[0], good[4]) == ("health check: no sign of failure", "  to do:   nothing")


TOLD = {
    "bound_ratio": "cost 99.00 of",
    "innovation_mean_square": "9.95 times as large",
    "innovation_autocorrelation": "neighbouring frames correlate by 99.00 (good: -0.3 to 0.3)",
    "path_residual": "noise is 9900% of",
    "unexplained_tracks": "9900% of the tracks lost",
    "smallest_component": "a component is unused",
    "component_certainty": "components overlap",
    "coinciding_objects": "two on one object in 9900% of",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_lines_tell_every_sign(world, name):
    good = check(*world)
    x = -1.0 if name in ("smallest_component", "component_certainty") else 99.0
    bad = good._replace(measures={**good.measures, name: x})
    text = format_health(bad)
    assert text.startswith("health check: 1 sign of failure")
    assert TOLD[name] in text
    assert TOLD[name] not in format_health(good)


@pytest.mark.parametrize("options", [False, True])
def test_a_structured_guide_is_no_remedy_for_one(world, options):
    good = check(*world)
    bad = good._replace(measures={**good.measures, "path_residual": 9.0})
    assert "structured" in format_health(bad, options=options)
    for details in (False, True):
        assert "structured" not in format_health(bad._replace(structured=True), options=options, details=details)


@pytest.mark.parametrize("options, to_do", [
    (False, "`position_noise` that are held longer (`Schedule.learn_from`){}, or from another seed"),
    (True, "train with another --seed or --starts 4{}, or longer (--steps)"),
])  # fmt: skip
def test_of_several_ways_those_that_are_left_are_told(options, to_do):
    other = ", with --guide structured" if options else ", with a structured guide"
    for structured in (False, True):
        told = SIGNS["path_residual"][1].words(options=options, structured=structured)
        assert told.endswith(to_do.format("" if structured else other))
        told = SIGNS["bound_ratio"][1].words(options=options, structured=structured)
        assert re.fullmatch(r"train \w+.*; if that does not help, train .*, or pick the best of .*", told)
    ways = Way("a", "A"), Way("b", "B", only_unstructured=True)
    assert Either(ways).words(options=options, structured=True) == ("A" if options else "a")
    assert Either(ways).words(options=options, structured=False) == ("A, or B" if options else "a, or b")


@pytest.mark.parametrize("kind", ["structured", "recurrent"])
def test_health_knows_whether_the_guide_is_structured(small_data, kind):
    run = build(replace(PRESETS["quick"], data=SMALL, guide=kind, state_size=8))
    assert check_health(run.model, run.guide, small_data).structured == (kind == "structured")


@pytest.mark.parametrize("options", [False, True])
def test_details_name_every_measure_cause_and_sign(world, options):
    health = check(world[0], world[1] * torch.linspace(1, 2, T)[:, None] ** 3, world[2])._replace(causes=tuple(CAUSES))
    text = format_health(health, options=options, details=True)
    assert len(health.problems) > 1
    assert text.count("  ! ") == len(health.problems)
    assert all(cause.words in text for cause in CAUSES.values())
    assert all(name in text for name in health.measures)
    assert ("Schedule." in text) != options
