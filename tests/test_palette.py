"""Colours as they are seen, palettes from text and images, and steering samples towards them."""
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import wasserstein_distance

from diffusion.prediction import x_0_from_prediction
from diffusion.samplers import get_sampler
from diffusion.schedule import Schedule, ScheduleConfig
from diffusion.steering import SteeredDenoiser
from eval.colour import ciede2000, lab_from_srgb, palette_error
from eval.scenes.reader import lab
from pipeline.palette import THEMES, Palette, PaletteSteer, map_to_palette, parse_palette, sliced_wasserstein

SHARMA = (  # the pairs of Sharma, Wu and Dalal 2005, table 1, which meet every branch of the formula
    (50.0000, 2.6772, -79.7751, 50.0000, 0.0000, -82.7485, 2.0425),
    (50.0000, 3.1571, -77.2803, 50.0000, 0.0000, -82.7485, 2.8615),
    (50.0000, 2.8361, -74.0200, 50.0000, 0.0000, -82.7485, 3.4412),
    (50.0000, -1.3802, -84.2814, 50.0000, 0.0000, -82.7485, 1.0000),
    (50.0000, -1.1848, -84.8006, 50.0000, 0.0000, -82.7485, 1.0000),
    (50.0000, -0.9009, -85.5211, 50.0000, 0.0000, -82.7485, 1.0000),
    (50.0000, 0.0000, 0.0000, 50.0000, -1.0000, 2.0000, 2.3669),
    (50.0000, -1.0000, 2.0000, 50.0000, 0.0000, 0.0000, 2.3669),
    (50.0000, 2.4900, -0.0010, 50.0000, -2.4900, 0.0009, 7.1792),
    (50.0000, 2.4900, -0.0010, 50.0000, -2.4900, 0.0010, 7.1792),
    (50.0000, 2.4900, -0.0010, 50.0000, -2.4900, 0.0011, 7.2195),
    (50.0000, 2.4900, -0.0010, 50.0000, -2.4900, 0.0012, 7.2195),
    (50.0000, -0.0010, 2.4900, 50.0000, 0.0009, -2.4900, 4.8045),
    (50.0000, -0.0010, 2.4900, 50.0000, 0.0011, -2.4900, 4.7461),
    (50.0000, 2.5000, 0.0000, 50.0000, 0.0000, -2.5000, 4.3065),
    (50.0000, 2.5000, 0.0000, 73.0000, 25.0000, -18.0000, 27.1492),
    (50.0000, 2.5000, 0.0000, 61.0000, -5.0000, 29.0000, 22.8977),
    (50.0000, 2.5000, 0.0000, 56.0000, -27.0000, -3.0000, 31.9030),
    (50.0000, 2.5000, 0.0000, 58.0000, 24.0000, 15.0000, 19.4535),
    (50.0000, 2.5000, 0.0000, 50.0000, 3.1736, 0.5854, 1.0000),
    (50.0000, 2.5000, 0.0000, 50.0000, 3.2972, 0.0000, 1.0000),
    (50.0000, 2.5000, 0.0000, 50.0000, 1.8634, 0.5757, 1.0000),
    (50.0000, 2.5000, 0.0000, 50.0000, 3.2592, 0.3350, 1.0000),
    (60.2574, -34.0099, 36.2677, 60.4626, -34.1751, 39.4387, 1.2644),
    (63.0109, -31.0961, -5.8663, 62.8187, -29.7946, -4.0864, 1.2630),
    (61.2901, 3.7196, -5.3901, 61.4292, 2.2480, -4.9620, 1.8731),
    (35.0831, -44.1164, 3.7933, 35.0232, -40.0716, 1.5901, 1.8645),
    (22.7233, 20.0904, -46.6940, 23.0331, 14.9730, -42.5619, 2.0373),
    (36.4612, 47.8580, 18.3852, 36.2715, 50.5065, 21.2231, 1.4146),
    (90.8027, -2.0831, 1.4410, 91.1528, -1.6435, 0.0447, 1.4441),
    (90.9257, -0.5406, -0.9208, 88.6381, -0.8985, -0.7239, 1.5381),
    (6.7747, -0.2908, -2.4247, 5.8714, -0.0985, -2.2286, 0.6377),
    (2.0776, 0.0795, -1.1350, 0.9033, -0.0636, -0.5514, 0.9082),
)
TWO = parse_palette("#c02020,#2040c0")


def test_ciede2000_of_the_published_pairs():
    table = torch.tensor(SHARMA, dtype=torch.float64)
    for first, second in ((table[:, :3], table[:, 3:6]), (table[:, 3:6], table[:, :3])):
        torch.testing.assert_close(ciede2000(first, second), table[:, 6], rtol=0, atol=1e-4)
    assert float(ciede2000(table[:, :3], table[:, :3]).max()) < 1e-9


def test_cielab_is_that_of_the_scene_reader():
    colours = np.random.default_rng(0).integers(0, 256, (500, 3)).astype(np.float32)
    found = lab_from_srgb(torch.from_numpy(colours).double() / 255)
    np.testing.assert_allclose(found.numpy(), lab(colours), atol=0.02)
    white = lab_from_srgb(torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(white, torch.tensor([100.0, 0.0, 0.0]).double(), rtol=0, atol=0.01)


def test_the_gradient_of_cielab_is_finite_and_right():
    colours = torch.tensor([[0.0, 0.0, 0.0], [0.01, 0.02, 0.03], [0.2, 0.9, 1.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lab_from_srgb, colours.requires_grad_())


@pytest.mark.parametrize("text, colours, shares", [
    ("#1b3a4b,#f2c14e", [(27, 58, 75), (242, 193, 78)], [0.5, 0.5]),
    ("f00:0.25, #00ff00 , 00F", [(255, 0, 0), (0, 255, 0), (0, 0, 255)], [0.25, 0.375, 0.375]),
    ("#000:0.3,#fff:0.7", [(0, 0, 0), (255, 255, 255)], [0.3, 0.7]),
])
def test_palettes_from_text(text, colours, shares):
    palette = parse_palette(text)
    assert list(palette.colours) == colours and list(palette.shares) == pytest.approx(shares)


@pytest.mark.parametrize("text", ["", "reddish", "#12345", "#1b3a4b,blue", "#000:0.5,#fff:0.6", "#000:1,#fff", "#000:x",
                                  "nowhere.png", ",".join(["#000"] * 65)])
def test_what_is_no_palette_is_refused_in_one_line(text):
    with pytest.raises(ValueError, match=r"^palette: [^\n]*valid[^\n]*$"):
        parse_palette(text)


def test_palettes_of_themes_and_images(tmp_path):
    for name in THEMES:
        assert parse_palette(name.upper()).name == name and sum(parse_palette(name).shares) == pytest.approx(1)
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:30], pixels[30:] = (200, 30, 30), (30, 30, 200)
    Image.fromarray(pixels).save(tmp_path / "two.png")
    palette = parse_palette(str(tmp_path / "two.png"))
    assert palette.colours[:2] == ((200, 30, 30), (30, 30, 200)) and palette.shares[:2] == (0.75, 0.25)
    (tmp_path / "no.png").write_text("no image")
    with pytest.raises(ValueError, match="is damaged or no image"):
        parse_palette(str(tmp_path / "no.png"))


def test_samples_of_a_palette_have_its_shares():
    samples = Palette("", ((0, 0, 0), (255, 255, 255)), (0.25, 0.75)).samples(400)
    assert samples.shape == (400, 3) and int((samples[:, 0] < 50).sum()) == 100


def test_sliced_wasserstein_in_closed_form():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(1, 300, 3, generator=generator, dtype=torch.float64)
    directions = torch.nn.functional.normalize(torch.randn(7, 3, generator=generator, dtype=torch.float64), dim=1)
    shift = torch.tensor([3.0, -1.0, 2.0], dtype=torch.float64)
    expected = (directions @ shift).square().mean()  # a shift moves every projection by the same amount
    torch.testing.assert_close(sliced_wasserstein(points + shift, points[0], directions), expected[None])
    assert float(sliced_wasserstein(points[:, torch.randperm(300)], points[0], directions)) == 0
    other = torch.randn(300, 3, generator=generator, dtype=torch.float64)
    one = directions[:1]
    mean_absolute = ((points[0] @ one.T).sort(0).values - (other @ one.T).sort(0).values).abs().mean()
    assert float(mean_absolute) == pytest.approx(wasserstein_distance((points[0] @ one.T)[:, 0].numpy(),
                                                                      (other @ one.T)[:, 0].numpy()))


def test_steering_brings_colours_to_the_palette():
    """With the image itself as its latent, the error falls step by step and shares are met."""
    x_0 = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    steer = PaletteSteer(TWO, lambda latents: latents, weight=0.5)
    errors = []
    for _ in range(60):
        x_0 = steer(x_0, 1.0)
        errors.append(float(palette_error(((x_0.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8), TWO.srgb).mean()))
    assert errors[-1] < 0.25 * errors[0] and errors[10] < errors[0]
    red = (x_0[:, 0] > x_0[:, 2]).float().mean(dim=(1, 2))
    torch.testing.assert_close(red, torch.full((3,), 0.5), atol=0.1, rtol=0)


def test_steering_is_of_each_image_alone_and_repeats():
    x_0 = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    both, again = (PaletteSteer(TWO, lambda latents: latents)(x_0, 1.0) for _ in range(2))
    alone = PaletteSteer(TWO, lambda latents: latents)(x_0[:1], 1.0)
    assert torch.equal(both, again)
    torch.testing.assert_close(both[:1], alone)
    with torch.inference_mode():  # as in sampling
        assert torch.equal(PaletteSteer(TWO, lambda latents: latents)(x_0, 1.0), both)
    with pytest.raises(ValueError, match="palette weight: 0; valid"):
        PaletteSteer(TWO, lambda latents: latents, weight=0)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction", "epsilon"])
def test_a_steered_denoiser_implies_the_steered_x_0(prediction_type):
    schedule = Schedule(ScheduleConfig(kind="cosine"))
    x_t, fixed = torch.randn(2, 4, 4, 4).double(), torch.randn(2, 4, 4, 4).double()
    denoise = SteeredDenoiser(lambda x, t: 0.1 * x, lambda x_0, noisiness: fixed, schedule, prediction_type)
    for t in (50, 500, 950):
        found = x_0_from_prediction(denoise(x_t, t), x_t, *schedule.alpha_sigma(t), prediction_type)
        torch.testing.assert_close(found, fixed, rtol=1e-6, atol=1e-6)
    unmoved = SteeredDenoiser(lambda x, t: 0.1 * x, lambda x_0, noisiness: x_0, schedule, prediction_type)
    torch.testing.assert_close(unmoved(x_t, 500), 0.1 * x_t, rtol=1e-6, atol=1e-6)


def test_a_steered_run_ends_at_what_it_was_steered_to():
    schedule = Schedule(ScheduleConfig(kind="cosine", zero_terminal_snr=True))
    fixed = torch.randn(1, 4, 4, 4)
    denoise = SteeredDenoiser(lambda x, t: torch.zeros_like(x), lambda x_0, noisiness: fixed, schedule, "v_prediction")
    times = list(schedule.timesteps(10, "trailing", 0))
    found = get_sampler("ddim")(denoise, torch.randn(1, 4, 4, 4), times, schedule, "v_prediction", None)
    torch.testing.assert_close(found, fixed, rtol=1e-4, atol=1e-4)


def test_exact_mapping_uses_the_nearest_colour_of_the_palette_and_no_other():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mapped = map_to_palette(images, TWO)
    assert mapped.dtype == torch.uint8 and mapped.shape == images.shape
    assert {tuple(pixel) for pixel in mapped.permute(0, 2, 3, 1).reshape(-1, 3).tolist()} <= set(TWO.colours)
    assert float(palette_error(mapped, TWO.srgb).max()) < 1e-3
    torch.testing.assert_close(map_to_palette(mapped, TWO), mapped)
