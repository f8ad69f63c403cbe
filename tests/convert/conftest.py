import numpy as np
import pytest


@pytest.fixture(scope="session")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="session")
def torchvision_models(torchvision):
    return torchvision.models


@pytest.fixture(scope="session")
def randomize(torch):
    """Give a PyTorch model random weights and statistics that keep activations finite."""

    def randomize(model):
        torch.manual_seed(0)
        for name, value in model.state_dict().items():
            if name.endswith("running_var") or (name.endswith("weight") and value.ndim == 1):
                value.uniform_(0.5, 1.5)
            elif value.ndim > 1:
                limit = (6 / value[0].numel()) ** 0.5
                value.uniform_(-limit, limit)
            elif value.is_floating_point():
                value.uniform_(-0.5, 0.5)
        return model.eval()

    return randomize


@pytest.fixture(scope="session")
def arrays(torch):
    """Return the state dict of a PyTorch model as arrays."""
    return lambda model: {k: v.detach().numpy() for k, v in model.state_dict().items()}


@pytest.fixture(scope="session")
def logits_of(torch):
    """Return a PyTorch model's logits for images with channels last."""

    def logits_of(model, images):
        with torch.no_grad():
            return model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))

    return logits_of


def assert_close(actual, expected):
    scale = np.abs(expected).max()
    assert np.isfinite(scale)
    assert scale > 1e-3
    np.testing.assert_allclose(np.asarray(actual) / scale, expected / scale, rtol=0, atol=1e-4)
