"""The text recognizer english_g2: convolutions, two bidirectional LSTMs, CTC over 97 symbols."""

import string
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from examples.ocr.weights import load_weights

HEIGHT = 64
SYMBOLS = (
    string.digits
    + string.punctuation
    + " \N{EURO SIGN}"
    + string.ascii_uppercase
    + string.ascii_lowercase
)


def _pool(x: Array, width: int) -> Array:
    return nnx.max_pool(x, (2, width), strides=(2, width))


def _conv(m: int, n: int, rngs: nnx.Rngs, use_bias: bool = True) -> nnx.Conv:
    return nnx.Conv(m, n, (3, 3), padding=1, use_bias=use_bias, rngs=rngs)


class Features(nnx.Module):
    """Seven convolutions: gray images of height 64 to 256 features a step of four columns."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv0 = _conv(1, 32, rngs)
        self.conv3 = _conv(32, 64, rngs)
        self.conv6 = _conv(64, 128, rngs)
        self.conv8 = _conv(128, 128, rngs)
        self.conv11 = _conv(128, 256, rngs, use_bias=False)
        self.norm12 = nnx.BatchNorm(256, use_running_average=True, rngs=rngs)
        self.conv14 = _conv(256, 256, rngs, use_bias=False)
        self.norm15 = nnx.BatchNorm(256, use_running_average=True, rngs=rngs)
        self.conv18 = nnx.Conv(256, 256, (2, 2), padding="VALID", rngs=rngs)

    def __call__(self, x: Float[Array, "b h w 1"]) -> Float[Array, "b steps features"]:
        """Return the features of every step, averaged over the height."""
        x = _pool(nnx.relu(self.conv0(x)), 2)
        x = _pool(nnx.relu(self.conv3(x)), 2)
        x = nnx.relu(self.conv6(x))
        x = _pool(nnx.relu(self.conv8(x)), 1)
        x = nnx.relu(self.norm12(self.conv11(x)))
        x = _pool(nnx.relu(self.norm15(self.conv14(x))), 1)
        return nnx.relu(self.conv18(x)).mean(axis=1)


class LSTM(nnx.Module):
    """The parameters of one direction; gates in the order input, forget, cell, output."""

    def __init__(self, inputs: int, hidden: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal()
        self.inputs = nnx.Param(init(rngs.params(), (inputs, 4 * hidden)))
        self.hidden = nnx.Param(init(rngs.params(), (hidden, 4 * hidden)))
        self.bias = nnx.Param(jnp.zeros(4 * hidden))

    def gates(self, x: Float[Array, "steps b m"]) -> Float[Array, "steps b gates"]:
        """Return what the inputs add to the gates of every step."""
        bias = jnp.broadcast_to(self.bias[...], (1, 1, self.bias.shape[0]))
        return x @ self.inputs[...] + bias


class Recurrent(nnx.Module):
    """An LSTM in both directions and a linear map of what they say."""

    def __init__(self, inputs: int, hidden: int, outputs: int, *, rngs: nnx.Rngs):
        self.forward = LSTM(inputs, hidden, rngs=rngs)
        self.backward = LSTM(inputs, hidden, rngs=rngs)
        self.linear = nnx.Linear(2 * hidden, outputs, rngs=rngs)

    def __call__(self, x: Float[Array, "steps b m"]) -> Float[Array, "steps b n"]:
        """Return the outputs of every step."""
        weights = self.forward.hidden[...], self.backward.hidden[...]

        def step(states: Any, gates: Any) -> tuple[Any, Any]:
            pairs = zip(states, gates, weights, strict=True)
            states = tuple(_stepped(h, c, gate + h @ weight) for (h, c), gate, weight in pairs)
            return states, tuple(h for h, _ in states)

        # Both directions in one loop: on CPUs, their products run side by side.
        gates = self.forward.gates(x), self.backward.gates(x[::-1])
        zero = jnp.zeros((x.shape[1], weights[0].shape[0]), x.dtype)
        _, (ahead, back) = lax.scan(step, ((zero, zero), (zero, zero)), gates)
        return self.linear(jnp.concatenate([ahead, back[::-1]], axis=-1))


def _stepped(
    h: Float[Array, "b n"], c: Float[Array, "b n"], gates: Float[Array, "b gates"]
) -> tuple[Float[Array, "b n"], Float[Array, "b n"]]:
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    c = nnx.sigmoid(f) * c + nnx.sigmoid(i) * jnp.tanh(g)
    return nnx.sigmoid(o) * jnp.tanh(c), c


class Recognizer(nnx.Module):
    """Logits of the blank and 96 symbols for every step of four columns."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.features = Features(rngs=rngs)
        self.recurrent0 = Recurrent(256, 256, 256, rngs=rngs)
        self.recurrent1 = Recurrent(256, 256, 256, rngs=rngs)
        self.prediction = nnx.Linear(256, 1 + len(SYMBOLS), rngs=rngs)

    def __call__(self, x: Float[Array, "b h w 1"]) -> Float[Array, "b steps symbols"]:
        """Return the logits; ``x`` lies between -1 and 1."""
        steps = self.features(x).swapaxes(0, 1)
        return self.prediction(self.recurrent1(self.recurrent0(steps))).swapaxes(0, 1)


def load_recognizer() -> Recognizer:
    """Return the recognizer with its trained weights."""
    arrays = load_weights("english_g2.pth")
    model = Recognizer(rngs=nnx.Rngs(0))
    features = model.features
    for index in (0, 3, 6, 8, 11, 14, 18):
        conv, name = getattr(features, f"conv{index}"), f"FeatureExtraction.ConvNet.{index}"
        conv.kernel[...] = jnp.asarray(arrays[f"{name}.weight"].transpose(2, 3, 1, 0))
        if conv.bias is not None:
            conv.bias[...] = jnp.asarray(arrays[f"{name}.bias"])
    for index in (12, 15):
        norm, name = getattr(features, f"norm{index}"), f"FeatureExtraction.ConvNet.{index}"
        norm.scale[...] = jnp.asarray(arrays[f"{name}.weight"])
        norm.bias[...] = jnp.asarray(arrays[f"{name}.bias"])
        norm.mean[...] = jnp.asarray(arrays[f"{name}.running_mean"])
        norm.var[...] = jnp.asarray(arrays[f"{name}.running_var"])
    for index, recurrent in enumerate((model.recurrent0, model.recurrent1)):
        name = f"SequenceModeling.{index}"
        for lstm, suffix in ((recurrent.forward, ""), (recurrent.backward, "_reverse")):
            part = f"{name}.rnn.{{}}_l0{suffix}".format
            lstm.inputs[...] = jnp.asarray(arrays[part("weight_ih")].T)
            lstm.hidden[...] = jnp.asarray(arrays[part("weight_hh")].T)
            lstm.bias[...] = jnp.asarray(arrays[part("bias_ih")] + arrays[part("bias_hh")])
        _set_linear(recurrent.linear, arrays, f"{name}.linear")
    _set_linear(model.prediction, arrays, "Prediction")
    return model


def _set_linear(linear: nnx.Linear, arrays: dict[str, np.ndarray], name: str) -> None:
    linear.kernel[...] = jnp.asarray(arrays[f"{name}.weight"].T)
    linear.bias[...] = jnp.asarray(arrays[f"{name}.bias"])  # type: ignore[index]


def read(
    logits: Float[np.ndarray, "b steps symbols"] | Float[Array, "b steps symbols"],
) -> list[str]:
    """Return the texts by greedy CTC decoding: repeats merged, blanks left out."""
    texts = []
    for best in np.asarray(jnp.argmax(jnp.asarray(logits), axis=-1)):
        kept = best[np.append(True, best[1:] != best[:-1])]
        texts.append("".join(SYMBOLS[i - 1] for i in kept if i))
    return texts


@jax.jit
def normalized(images: Array) -> Float[Array, "b h w 1"]:
    """Return gray images of bytes as the recognizer takes them."""
    return (images.astype(jnp.float32) / 255 - 0.5)[..., None] / 0.5
