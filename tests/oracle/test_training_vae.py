"""What judges an autoencoder, and whole training steps of one, against PyTorch."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import save_file

from diffuse_jax.models.discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from diffuse_jax.training.autoencoder import Terms, autoencoder_loss
from diffuse_jax.training.optimizer import make_optimizer
from diffuse_jax.training.perceptual import VGG16, perceptual_distance, read_features
from diffuse_jax.training.state import init_state, make_step
from diffuse_jax.weights.names import flatten, from_torch, to_torch, torch_key, unflatten

twins = pytest.importorskip("tests.oracle.twins", reason="needs PyTorch diffusers and transformers")
from tests.oracle.comparisons import channel_first, channel_last  # noqa: E402
from tests.oracle.efficientnet_lite import EfficientNetLite0  # noqa: E402
from tests.oracle.pixel_cases import autoencoder_terms  # noqa: E402
from tests.oracle.test_mobilenet import mobilenet, random_numbers, random_state  # noqa: E402
from tests.training.test_perceptual import vgg16_state  # noqa: E402

torch, diffusers = twins.torch, twins.diffusers
nn, functional = torch.nn, torch.nn.functional

SMALL = PatchDiscriminatorConfig(channels=8, layers=2, norm_num_groups=4)


def discriminator_twin(config: PatchDiscriminatorConfig) -> tuple[Any, Any, Any]:
    """Isola et al. 2017 as ``torch.nn`` layers, and the same values here."""
    layers, width = [nn.Conv2d(3, config.channels, 4, 2, 1), nn.LeakyReLU(0.2)], config.channels
    for i in range(1, config.layers + 1):
        wider = config.channels * min(2**i, 8)
        layers += [nn.Conv2d(width, wider, 4, 2 if i < config.layers else 1, 1)]
        layers += [nn.GroupNorm(config.norm_num_groups, wider), nn.LeakyReLU(0.2)]
        width = wider
    module = nn.Module()
    module.main = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))
    module.forward = lambda x: module.main(x)
    twins.randomise(module, seed=1)
    model, state = PatchDiscriminator(config), module.state_dict()
    paths = {path: state.pop(torch_key(path)).numpy() for path in flatten(model.shapes())}
    assert not state, "every tensor has its place"
    return module, model, unflatten({path: jnp.array(from_torch(path, x)) for path, x in paths.items()})


@pytest.mark.parametrize("config", [SMALL, PatchDiscriminatorConfig()], ids=["small", "default"])
def test_discriminator(config: PatchDiscriminatorConfig, rng: np.random.Generator) -> None:
    module, model, params = discriminator_twin(config)
    x = rng.uniform(-1, 1, (2, 40, 32, 3)).astype(np.float32)
    with torch.no_grad():
        wanted = channel_last(module(channel_first(x)))
    assert wanted.shape == (2, 40 // 2**config.layers - 2, 32 // 2**config.layers - 2, 1)
    np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, x), wanted, atol=1e-5, rtol=1e-4)


def unit(f: Any) -> Any:
    return f / torch.sqrt((f**2).sum(1, keepdim=True) + 1e-10)


def torch_distance(maps: Any, x: Any, y: Any, weights: Any = None) -> Any:
    """LPIPS as its authors' code computes it."""
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
    total = 0
    for i, (f, g) in enumerate(zip(maps((x - mean) / deviation), maps((y - mean) / deviation), strict=True)):
        squares = (unit(f) - unit(g)) ** 2
        total = total + (squares if weights is None else squares * weights[i]).sum(1).mean((1, 2))
    return total


def vgg16_twin(state: dict[str, np.ndarray]) -> Any:
    """The five maps of torchvision's ``vgg16().features``."""
    layers: list[Any] = []
    for places in VGG16:
        layers += [nn.MaxPool2d(2)] if layers else []
        for place in places:
            assert len(layers) == place, "layers stand where torchvision's names say"
            out, inputs = state[f"features.{place}.weight"].shape[:2]
            layers += [nn.Conv2d(inputs, out, 3, 1, 1), nn.ReLU()]
    net = nn.Sequential(*layers)
    net.load_state_dict({k.removeprefix("features."): torch.tensor(v) for k, v in state.items() if "features" in k})

    def maps(x: Any) -> list[Any]:
        found = []
        for i, layer in enumerate(net):
            x = layer(x)
            found += [x] if i in [places[-1] + 1 for places in VGG16] else []
        return found

    return maps


@pytest.mark.parametrize("network", ["vgg16", "vgg16 with weights", "mobilenet_v2", "efficientnet_lite0"])
def test_perceptual_distance_and_its_gradient(network: str, tmp_path: Path, rng: np.random.Generator) -> None:
    widths, weights, width = (8, 16, 16, 24, 24), None, 32
    if network == "mobilenet_v2":
        state, net = random_state(rng), mobilenet().eval()
        net.load_state_dict({name.removeprefix("features."): torch.tensor(array) for name, array in state.items()})
        collect = lambda x: [x := layer(x) for layer in net]
        maps = lambda x: [f for i, f in enumerate(collect(x)) if i in (1, 3, 6, 13, 18)]
    elif network == "efficientnet_lite0":
        lite = EfficientNetLite0().eval()
        state, width = random_numbers(lite, rng), 34  # 17 columns after the first layer
        lite.load_state_dict({name: torch.tensor(array) for name, array in state.items()})
        maps = lambda x: [lite(x)[i] for i in (1, 3, 5, 11, 17)]
    else:
        state = vgg16_state(rng, widths)
        if network != "vgg16":
            drawn = [rng.uniform(0, 1, (1, channels, 1, 1)).astype(np.float32) for channels in widths]
            state |= {f"lin{i}.model.1.weight": w for i, w in enumerate(drawn)}
            weights = [torch.tensor(w) for w in drawn]
        maps = vgg16_twin(state)
    save_file(state, tmp_path / "net.safetensors")
    found, params = read_features(tmp_path / "net.safetensors")
    x, y = (rng.uniform(-1, 1, (2, 48, width, 3)).astype(np.float32) for _ in range(2))
    of_y = channel_first(y).requires_grad_()
    wanted = torch_distance(maps, channel_first(x), of_y, weights)
    wanted.sum().backward()
    ours = lambda y: perceptual_distance(found, params, jnp.asarray(x), y)
    value, pull = jax.vjp(jax.jit(ours), jnp.asarray(y))
    np.testing.assert_allclose(value, wanted.detach().numpy(), rtol=1e-4)
    gradient = channel_last(of_y.grad)
    np.testing.assert_allclose(pull(jnp.ones(2))[0], gradient, atol=1e-4 * np.abs(gradient).max())


RATE, SIZE, KL = 1e-3, 32, 1e-2


@pytest.mark.parametrize(
    "adversarial", [pytest.param(False, id="plain", marks=pytest.mark.slow), pytest.param(True, id="adversarial")]
)
def test_one_training_step(adversarial: bool, tmp_path: Path, rng: np.random.Generator) -> None:
    """The same weights, images and posterior noise give the same loss and the same parameters after AdamW."""
    module, vae, params = twins.vae_twin("SD 1.x and 2.x", tmp_path)
    terms, trainable, critic = Terms(vae=vae, kl_weight=KL), {"vae": params}, None
    if adversarial:
        critic, network, own = discriminator_twin(SMALL)
        terms = Terms(vae=vae, kl_weight=KL, discriminator=network, discriminator_weight=0.8)
        trainable["discriminator"] = own
    pixels = rng.integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 0), 0)
    noise = jax.random.normal(key, (2, SIZE // vae.config.scale, SIZE // vae.config.scale, vae.config.latent_channels))

    step = make_step(functools.partial(autoencoder_loss, terms), make_optimizer("adamw", lambda _: RATE), seed=3)
    batch = {"pixel_values": pixels[None], "update": np.zeros((1, 2), np.int32)}
    state, metrics = step(init_state(trainable, make_optimizer("adamw", lambda _: RATE), False), {}, batch)
    x = channel_first(pixels / np.float32(127.5) - 1)
    theirs = torch_update(module, critic, x, channel_first(np.asarray(noise)))
    for name, value in theirs.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-5), name
    moments = optax.tree.get(state.opt_state, "mu")
    for name, net in (("vae", module), *([("discriminator", critic)] if adversarial else [])):
        compare(state.params[name], moments[name], net)


def compare(params: Any, moments: Any, module: Any) -> None:
    """The parameters, and the gradient: a tenth of it is AdamW's first moment after one step."""
    by_key = lambda tree: {torch_key(path): np.asarray(to_torch(path, leaf)) for path, leaf in flatten(tree).items()}
    after, gradients = by_key(params), by_key(moments)
    largest = max(float(value.grad.abs().max()) for value in module.parameters())
    for key, value in module.named_parameters():
        np.testing.assert_allclose(10 * gradients[key], value.grad.numpy(), atol=1e-5 * largest, rtol=1e-3, err_msg=key)
        # Adam divides by the root of a gradient's square, so where a gradient is all rounding its sign may differ.
        significant = np.abs(value.grad.numpy()) > 1e-6
        np.testing.assert_allclose(after[key][significant], value.detach().numpy()[significant], atol=1e-4, err_msg=key)


def torch_update(module: Any, critic: Any, x: Any, noise: Any) -> dict[str, float]:
    """One training step, with the two losses apart as users of PyTorch write them, and one AdamW."""
    y, reconstruction, loss = autoencoder_terms(module, x, noise, KL)
    found, parameters = {}, list(module.parameters())
    if critic is not None:
        last, deceit = module.decoder.conv_out.weight, -critic(y).mean()
        norms = [torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (reconstruction, deceit)]
        balance = (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()
        loss = loss + 0.8 * balance * deceit
        found = {"balance": balance.item(), "adversarial": deceit.item()}
    gradients = torch.autograd.grad(loss, parameters)
    if critic is not None:
        detected = 0.5 * (functional.relu(1 - critic(x)).mean() + functional.relu(1 + critic(y.detach())).mean())
        found["discriminator"] = detected.item()
        parameters, loss = parameters + list(critic.parameters()), loss + detected
        gradients += torch.autograd.grad(detected, list(critic.parameters()))
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01).step()
    return found | {"loss": loss.item()}
