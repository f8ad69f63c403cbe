"""The FALCON authors' models, written anew in PyTorch with their names, against ours."""

import jax.numpy as jnp
import numpy as np
import pytest

import falcon_jax as fj
from tests.convert.conftest import assert_close

WIDTHS = {
    "vgg16": (64, 64, "M", 128, 128, "M", *[256] * 3, "M", *[512] * 3, "M", *[512] * 3, "M"),
    "vgg19": (64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4, "M"),
}
COUNTS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}


@pytest.fixture
def authors_model(torch):
    nn = torch.nn

    class Terms(nn.Module):
        def __init__(self, m, n, stride, rank):
            super().__init__()
            self.names = [""] if rank == 1 else list(map(str, range(rank)))
            for term in self.names:
                self.add_module(f"pw{term}", nn.Conv2d(m, n, 1, bias=False))
                depthwise = nn.Conv2d(n, n, 3, stride, padding=1, groups=n, bias=False)
                self.add_module(f"dw{term}", depthwise)
            self.bn = nn.BatchNorm2d(n)

        def forward(self, x):
            modules = dict(self.named_children())
            return sum(modules[f"dw{t}"](modules[f"pw{t}"](x)) for t in self.names)

    def conv(m, n, stride, rank):
        return Terms(m, n, stride, rank) if rank else nn.Conv2d(m, n, 3, stride, padding=1)

    class Vgg(nn.Module):
        def __init__(self, widths, rank):
            super().__init__()
            layers, m = [], 3
            for n in widths:
                if n == "M":
                    layers.append(nn.MaxPool2d(2))
                    continue
                layers += [conv(m, n, 1, rank), nn.BatchNorm2d(n), nn.ReLU()]
                m = n
            self.layers = nn.Sequential(*layers)
            last = nn.Linear(512, 7)
            self.fc = nn.Sequential(nn.Linear(512, 512), nn.Dropout(0.3), nn.ReLU(), last)

        def forward(self, x):
            return self.fc(self.layers(x).flatten(1))

    class Stacked(nn.Module):
        def __init__(self, m, n, stride, rank):
            super().__init__()
            first = (conv(m, n, stride, rank), nn.BatchNorm2d(n), nn.ReLU())
            self.conv = nn.Sequential(*first, conv(n, n, 1, rank), nn.BatchNorm2d(n))

        def forward(self, x):
            return self.conv(x)

    class Residual(nn.Module):
        def __init__(self, m, n, stride, rank):
            super().__init__()
            self.stacked = Stacked(m, n, stride, rank)
            self.shortcut = nn.Sequential()
            if stride != 1 or m != n:
                projection = nn.Conv2d(m, n, 1, stride, bias=False)
                self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(n))

        def forward(self, x):
            return torch.relu(self.stacked(x) + self.shortcut(x))

    class Resnet(nn.Module):
        def __init__(self, counts, rank):
            super().__init__()
            stem = nn.Conv2d(3, 64, 3, padding=1)
            self.first = nn.Sequential(stem, nn.BatchNorm2d(64), nn.ReLU())
            blocks, m = [], 64
            for n, count in zip((64, 128, 256, 512), counts, strict=True):
                for index in range(count):
                    blocks.append(Residual(m, n, 1 if index else 2, rank))
                    m = n
            self.residuals = nn.Sequential(*blocks)
            self.fc = nn.Linear(512, 7)

        def forward(self, x):
            return self.fc(self.residuals(self.first(x)).mean((2, 3)))

    def authors_model(arch, rank):
        if arch in WIDTHS:
            return Vgg(WIDTHS[arch], rank)
        return Resnet(COUNTS[arch], rank)

    return authors_model


@pytest.mark.parametrize(
    ("arch", "rank"),
    [
        ("vgg16", 3),
        ("resnet18", 2),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("vgg19", 0), ("vgg19", 1), ("vgg19", 2), ("resnet18", 0), ("resnet34", 1))
        ),
    ],
)
def test_logits_are_those_of_the_authors_models(
    arch, rank, authors_model, randomize, arrays, logits_of
):
    theirs = randomize(authors_model(arch, rank))
    ours = fj.convert.falcon(arrays(theirs))
    ours.eval()
    x = np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)
    assert_close(ours(jnp.asarray(x)), logits_of(theirs, x).numpy())


def test_what_does_not_fit_is_refused(authors_model, arrays):
    state = arrays(authors_model("resnet18", 2))
    name = "residuals.3.stacked.conv.3"
    with pytest.raises(ValueError, match="the layers have different ranks"):
        fj.convert.falcon({k: v for k, v in state.items() if k != f"{name}.pw1.weight"})
    with pytest.raises(ValueError, match=f"has no {name}.dw1.weight"):
        fj.convert.falcon({k: v for k, v in state.items() if k != f"{name}.dw1.weight"})
    used = state | {f"{name}.bn.num_batches_tracked": np.asarray(5)}
    with pytest.raises(ValueError, match=f"BatchNorm inside {name} was used"):
        fj.convert.falcon(used)
    with pytest.raises(ValueError, match=r"first\.0\.bias is missing"):
        fj.convert.falcon({k: v for k, v in state.items() if k != "first.0.bias"})


def test_other_state_dicts_are_refused():
    with pytest.raises(ValueError, match=r"no state dict of the FALCON authors'.*it has conv1"):
        fj.convert.falcon({"conv1.weight": np.zeros((64, 3, 7, 7))})
    with pytest.raises(ValueError, match="it has none"):
        fj.convert.falcon({})
